"""Scales, the saturating cast, and the pair of FP8 data and scale that a GEMM takes.

A scale is always the *dequantisation* multiplier, ``x ≈ q * scale``, and all arithmetic on scales
and quotients is float32, whatever dtype the tensor has.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_fp8.amax import largest_magnitude
from flax_fp8.formats import Float8

# Scales stay inside the normal float32 range, with room for the reciprocal.
_SMALLEST_SCALE = 2.0**-126
_LARGEST_SCALE = 2.0**126


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
  """A quantised tensor: ``x ≈ data * scale``.

  Attributes:
    data: the values in FP8; shape of the tensor.
    scale: float32, or float8_e8m0fnu where a matrix unit applies it; shape ``()`` for a scale per
      tensor, else as the recipe and its product of ``flax_fp8.products`` agree.
  """

  data: jax.Array
  scale: jax.Array


def saturating_cast(x: jax.Array, float8: Float8, key: jax.Array | None = None) -> jax.Array:
  """Casts to FP8, clamping to the largest finite values.

  ``clip(x, -max, max).astype(fp8)``

  Args:
    x: values; any shape; float32, bfloat16 or float16.
    float8: the format.
    key: PRNG key; if given, values are rounded stochastically.

  Returns:
    The values in ``float8.dtype``; shape of ``x``.

  Numerics:
    Rounds to nearest, ties to even, subnormals included; values below half the smallest subnormal
    become zero (which in a fnuz format has no sign). ±inf and overflow saturate to ±max, as the
    hardware's satfinite conversion does. NaN stays NaN.
    Stochastic rounding goes up with the probability of the distance from the value below, in steps
    of ``2**-16`` of the spacing, subnormals included: to within such a step, the expectation is the
    clamped value.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8 import formats, quantize
    >>> quantize.saturating_cast(jnp.array([1.06, 1e6, -jnp.inf, jnp.nan]), formats.E4M3)
    Array([1, 448, -448, nan], dtype=float8_e4m3fn)

  References:
    OCP 8-bit Floating Point Specification (OFP8), section 5.2, saturating mode.
  """
  limit = jnp.asarray(float8.max, jnp.float32)
  clipped = jnp.clip(x.astype(jnp.float32), -limit, limit)
  if key is not None:
    clipped = _round_stochastically(clipped, float8, key)
  return clipped.astype(float8.dtype)


def _round_stochastically(x: jax.Array, float8: Float8, key: jax.Array) -> jax.Array:
  """Rounds float32 values to one of the two neighbours that FP8 has."""
  exponent = (lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF
  smallest = 127 + math.frexp(float8.smallest_normal)[1] - 1
  spacing_exponent = jnp.maximum(exponent, smallest) - float8.mantissa_bits
  spacing = lax.bitcast_convert_type(spacing_exponent << 23, jnp.float32)
  # Fewer than 5 integer and 16 fractional bits: exact in float32, so floor is exact too.
  fraction = jnp.floor(jnp.abs(x) / spacing * 2.0**16)
  chance = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.float32)
  magnitude = jnp.floor((fraction + chance) * 2.0**-16) * spacing
  return jnp.where(jnp.isnan(x), x, jnp.copysign(magnitude, x))


def quantize(
  x: jax.Array,
  scale: jax.Array,
  float8: Float8,
  inverse: jax.Array | None = None,
  key: jax.Array | None = None,
  *,
  stale: bool = False,
) -> QTensor:
  """Quantises with a given scale.

  ``data = saturating_cast(x / scale)``

  Args:
    x: values; shape ``[...]``; float32, bfloat16 or float16.
    scale: dequantisation multiplier; float32; of a shape that broadcasts against ``x`` without
      adding dimensions.
    float8: the format.
    inverse: ``1 / scale``, of the shape of ``scale``, where it is known without another rounding;
      then ``x`` is multiplied by it.
    key: PRNG key; if given, values are rounded stochastically.
    stale: whether the scale is that of other values than ``x``, so that infinities must be made NaN
      here. The scale of values with an infinity among them is NaN already.

  Returns:
    The ``QTensor`` of data and scale.

  Numerics:
    The quotient is float32, rounded once to FP8: see ``saturating_cast``. Where the scale is stale,
    finite values beyond the range saturate, and infinite ones become NaN.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8 import formats, quantize
    >>> quantize.quantize(jnp.array([0.5, 3.0]), jnp.float32(0.5), formats.E5M2).data
    Array([1, 6], dtype=float8_e5m2)

  References:
    Micikevicius et al., FP8 Formats for Deep Learning, https://arxiv.org/abs/2209.05433, section 4.
  """
  if inverse is None:
    quotient = x.astype(jnp.float32) / jnp.broadcast_to(scale, x.shape)
  else:
    quotient = x.astype(jnp.float32) * jnp.broadcast_to(inverse, x.shape)
  if stale:
    # Zero times infinity is NaN. Zero times the value, since the quotient of a finite one may
    # overflow; and no select, since XLA would write what it hangs on by a kernel of its own.
    quotient += x.astype(jnp.float32) * 0.0
  return QTensor(saturating_cast(quotient, float8, key), scale)


def dequantize(data: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
  """Multiplies by the scale in float32 and casts.

  ``(data.astype(float32) * scale).astype(dtype)``

  Args:
    data: FP8 values, or the result of a GEMM on them; shape ``[...]``.
    scale: dequantisation multiplier; float32; broadcasts against ``data`` as in ``quantize``.
    dtype: of the result.

  Returns:
    The dequantised values; shape of ``data``; ``dtype``.

  Numerics:
    One rounding to float32 and one to ``dtype``.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8 import quantize
    >>> q = jnp.array([1.0, 6.0], jnp.float8_e4m3fn)
    >>> quantize.dequantize(q, jnp.float32(0.5), jnp.bfloat16)
    Array([0.5, 3], dtype=bfloat16)

  References:
    Micikevicius et al., FP8 Formats for Deep Learning, https://arxiv.org/abs/2209.05433, section 4.
  """
  scaled = data.astype(jnp.float32) * jnp.broadcast_to(scale, data.shape)
  return scaled.astype(dtype)


def product(lhs_scale: jax.Array, rhs_scale: jax.Array) -> jax.Array:
  """Multiplies two scales without overflow to infinity, which would turn a zero into NaN."""
  return jnp.minimum(lhs_scale * rhs_scale, np.finfo(np.float32).max)


def dequantize_product(
  out: jax.Array, lhs_scale: jax.Array, rhs_scale: jax.Array, dtype: Any
) -> jax.Array:
  """Multiplies the result of a GEMM by the scales of both operands.

  ``(out * (lhs_scale * rhs_scale)).astype(dtype)``

  Args:
    out: the product of FP8 values; float32; shape ``[...]``.
    lhs_scale: of the left operand; float32; shape ``()`` or that of ``out``.
    rhs_scale: of the right operand; the same.
    dtype: of the result.

  Returns:
    The scaled product; shape of ``out``; ``dtype``.

  Numerics:
    On a CPU, which has no subnormal numbers, ``out`` is multiplied by the larger scale and then by
    the smaller one where their product is no normal float32, so that what float32 can hold of the
    result is there. Elsewhere their product may be subnormal; below 2**-149 it is zero.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8 import quantize
    >>> tiny = jnp.float32(2.0**-70)
    >>> out = jnp.array([2.0**16])
    >>> quantize.dequantize_product(out, tiny, tiny, jnp.float32) == 2.0**-124
    Array([ True], dtype=bool)
  """
  widen = lambda scale: jnp.broadcast_to(scale, out.shape)

  def at_once(out: jax.Array, lhs_scale: jax.Array, rhs_scale: jax.Array) -> jax.Array:
    return dequantize(out, product(lhs_scale, rhs_scale), dtype)

  def one_by_one(out: jax.Array, lhs_scale: jax.Array, rhs_scale: jax.Array) -> jax.Array:
    both = product(lhs_scale, rhs_scale)
    is_normal = both >= np.finfo(np.float32).tiny
    first = lax.select(is_normal, both, lax.max(lhs_scale, rhs_scale))
    second = lax.select(is_normal, jnp.ones_like(both), lax.min(lhs_scale, rhs_scale))
    scaled = out.astype(jnp.float32) * widen(first)
    # XLA may not make one product of the two factors.
    return (lax.optimization_barrier(scaled) * widen(second)).astype(dtype)

  return lax.platform_dependent(out, lhs_scale, rhs_scale, cpu=one_by_one, default=at_once)


def scale_from_amax(
  amax: jax.Array,
  fallback: jax.Array,
  float8_max: float | jax.Array,
  margin: float = 0,
  power_of_two: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Computes the scale under which ``amax`` is the format's largest value, and its inverse.

  ``inverse = float8_max / amax / 2**margin``; ``scale = 1 / inverse``

  Args:
    amax: largest magnitude; float32; units of the tensor; any shape.
    fallback: scale where ``amax`` is zero, NaN or infinite; float32; shape of ``amax``.
    float8_max: largest finite value of the format.
    margin: headroom in powers of two.
    power_of_two: rounds the scale up to a power of two, so that scaling is exact.

  Returns:
    The dequantisation multiplier and its inverse, by which to quantise; float32; shape of ``amax``.

  Numerics:
    Neither is ever zero, infinite or NaN for a sound fallback: scales are kept within
    ``[2**-126, 2**126]``. Both round as in a compiled program of flax.linen.fp8_ops, where the
    compiler turns the division by a quotient into a product: bit for bit the same FP8 values.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8 import quantize
    >>> amax = jnp.array([896.0, 0.0, jnp.inf])
    >>> quantize.scale_from_amax(amax, jnp.ones(3), 448.0)[0]
    Array([2., 1., 1.], dtype=float32)

  References:
    Micikevicius et al., FP8 Formats for Deep Learning, https://arxiv.org/abs/2209.05433, section 4.
  """
  usable = (amax > 0.0) & jnp.isfinite(amax)
  # No infinity comes up that is then left out: JAX's debug modes would stop at it.
  inverse = (jnp.float32(float8_max) / jnp.where(usable, amax, 1.0)) / jnp.float32(2.0**margin)
  inverse = jnp.clip(inverse, 1.0 / _LARGEST_SCALE, 1.0 / _SMALLEST_SCALE)
  scale = 1.0 / inverse
  if power_of_two:
    scale = _round_up_to_power_of_two(scale)
    inverse = 1.0 / scale
  return jnp.where(usable, scale, fallback), jnp.where(usable, inverse, 1.0 / fallback)


def current_scale(
  x: jax.Array, float8: Float8, axes: tuple[int, ...] | None = None, power_of_two: bool = False
) -> tuple[jax.Array, jax.Array]:
  """Computes scales from the values that are about to be quantised.

  ``scale_from_amax(max(|x|, axes, keepdims))``

  Args:
    x: values; any shape; float32, bfloat16 or float16.
    float8: the format.
    axes: those that share a scale; None for all.
    power_of_two: rounds scales up to powers of two, so that scaling is exact.

  Returns:
    The dequantisation multipliers and their inverses; float32; of shape ``()`` if ``axes`` is None,
    else 1 along ``axes``.

  Numerics:
    1 where all values are zero. NaN where one is NaN or infinite: what a scale can't be found for
    becomes NaN as a whole, and is seen, where any other scale would hide it.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8 import formats, quantize
    >>> x = jnp.array([[224.0, 1.0], [0.0, 0.0], [jnp.inf, 1.0]])
    >>> quantize.current_scale(x, formats.E4M3, axes=(1,))[0].ravel()
    Array([0.5, 1. , nan], dtype=float32)

  References:
    Transformer Engine, transformer_engine.common.recipe.Float8CurrentScaling.
  """
  amax = largest_magnitude(x, axes)
  fallback = jnp.where(jnp.isfinite(amax), 1.0, amax * 0.0)  # NaN for infinity and NaN
  return scale_from_amax(amax, fallback, float8.max, power_of_two=power_of_two)


def _round_up_to_power_of_two(scale: jax.Array) -> jax.Array:
  bits = lax.bitcast_convert_type(scale, jnp.uint32)
  mantissa = bits & np.uint32(0x7FFFFF)
  exponent = (bits >> np.uint32(23)) + (mantissa != 0).astype(jnp.uint32)
  return lax.bitcast_convert_type(exponent << np.uint32(23), jnp.float32)
