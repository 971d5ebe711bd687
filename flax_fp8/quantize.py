"""Computes scales, casts to FP8 with saturation, and pairs FP8 data with its scale for a GEMM.

A scale is always the *dequantization* multiplier, ``x ≈ q * scale``. All arithmetic on scales and
quotients is float32, regardless of the tensor's dtype.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from flax_fp8.amax import largest_magnitude
from flax_fp8.formats import Float8

# Name of the amaxes that scales of the same step come from, for policies of ``jax.checkpoint``.
AMAX = "fp8_amax"

# Scales and their reciprocals stay within the normal float32 range.
_SMALLEST_SCALE = 2.0**-126
_LARGEST_SCALE = 2.0**126


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
  """A quantized tensor: ``x ≈ data * scale``.

  Attributes:
    data: the values in FP8; shape of the tensor.
    scale: float32, or float8_e8m0fnu if matrix units apply it. The shape is ``()`` for per-tensor
      scaling. Otherwise the recipe's product in ``flax_fp8.products`` defines it.
  """

  data: jax.Array
  scale: jax.Array


def saturating_cast(x: jax.Array, float8: Float8, key: jax.Array | None = None) -> jax.Array:
  """Casts to FP8, clamping to the largest finite values.

  ``clip(x, -max, max).astype(fp8)``

  Args:
    x: values; any shape; float32, bfloat16 or float16.
    float8: the format.
    key: PRNG key. If given, values are rounded stochastically.

  Returns:
    The values in ``float8.dtype``; shape of ``x``.

  Numerics:
    Rounds to nearest, ties to even, including subnormals. Values below half the smallest subnormal
    become zero, which has no sign in an FNUZ format. ±inf and overflow saturate to ±max, as in the
    hardware's satfinite conversion. NaN stays NaN. In a layer, the recipe
    makes ±inf NaN before this cast, as described in ``quantize``.

    Stochastic rounding rounds up with a probability equal to the relative distance from the value
    below, in steps of ``2**-16`` of the spacing, including subnormals. The expectation is the
    clamped value to within one such step.

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
  """Rounds float32 values stochastically to one of the two neighboring FP8 values."""
  exponent = (lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF
  smallest = 127 + math.frexp(float8.smallest_normal)[1] - 1
  spacing_exponent = jnp.maximum(exponent, smallest) - float8.mantissa_bits
  spacing = lax.bitcast_convert_type(spacing_exponent << 23, jnp.float32)
  # Fewer than 5 integer bits and 16 fractional bits, exact in float32. So floor is exact too.
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
  """Quantizes with a given scale.

  ``data = saturating_cast(x / scale)``

  Args:
    x: values; shape ``[...]``; float32, bfloat16 or float16.
    scale: dequantization multiplier; float32. The shape must broadcast to that of ``x`` without
      adding dimensions.
    float8: the format.
    inverse: ``1 / scale`` with the shape of ``scale``, if it is known without a second rounding.
      Then ``x`` is multiplied by it.
    key: PRNG key. If given, values are rounded stochastically.
    stale: whether the scale was computed from other values than ``x``. Infinities in ``x`` then
      become NaN here. A scale computed from an infinity is NaN already.

  Returns:
    The ``QTensor`` of data and scale.

  Numerics:
    The quotient is float32 and rounded once to FP8 (see ``saturating_cast``). With a stale scale,
    finite values beyond the range saturate, and infinities become NaN.

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
    # Zero times infinity is NaN. This multiplies x and not the quotient, since the quotient of a
    # finite value may overflow. A select would make XLA write its condition in a separate kernel.
    quotient += x.astype(jnp.float32) * 0.0
  return QTensor(saturating_cast(quotient, float8, key), scale)


def round_in_place(x: jax.Array) -> jax.Array:
  """Makes XLA keep the rounding of ``x`` to its dtype, so that all kernels read ``x`` as rounded.

  XLA removes a cast from float32 to bfloat16 and back. A kernel that quantizes then needs the
  float32 value: XLA computes it again in each kernel, or writes it to memory at twice the size.
  """
  kind = jnp.finfo(x.dtype)
  return lax.reduce_precision(x, kind.nexp, kind.nmant)


def cast_apart(q: QTensor) -> QTensor:
  """Keeps the cast of a tensor in a GPU kernel apart from a transposition of its FP8 data.

  The kernel that casts may compute the amax too. Without the barrier, XLA casts and transposes in
  one kernel, which is slower than two, and reads the tensor again for the amax.
  """
  return QTensor(lax.optimization_barrier(q.data), q.scale)


def dequantize(data: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
  """Multiplies by the scale in float32 and casts.

  ``(data.astype(float32) * scale).astype(dtype)``

  Args:
    data: FP8 values, or the result of a GEMM on them; shape ``[...]``.
    scale: dequantization multiplier; float32; broadcasts to the shape of ``data`` as in
      ``quantize``.
    dtype: dtype of the result.

  Returns:
    The dequantized values in ``dtype``; shape of ``data``.

  Numerics:
    Rounds once to float32 and once to ``dtype``.

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
  """Multiplies two scales. Clamps overflow, since infinity times zero would be NaN."""
  return jnp.minimum(lhs_scale * rhs_scale, np.finfo(np.float32).max)


def dequantize_product(
  out: jax.Array, lhs_scale: jax.Array, rhs_scale: jax.Array, dtype: Any
) -> jax.Array:
  """Multiplies the result of a GEMM by the scales of both operands.

  ``(out * (lhs_scale * rhs_scale)).astype(dtype)``

  Args:
    out: the product of FP8 values; float32; shape ``[...]``.
    lhs_scale: scale of the left operand; float32; shape ``()`` or the shape of ``out``.
    rhs_scale: scale of the right operand; float32; shape ``()`` or the shape of ``out``.
    dtype: dtype of the result.

  Returns:
    The scaled product in ``dtype``; shape of ``out``.

  Numerics:
    XLA's CPU code flushes subnormal numbers to zero. If the product of the scales is not a normal
    float32, a CPU multiplies ``out`` by the larger scale first and then by the smaller one. This
    keeps every result that float32 can represent. On other platforms the product of the scales may
    be subnormal, and it is zero below 2**-149.

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
    # The barrier stops XLA from merging the two factors into one product.
    return (lax.optimization_barrier(scaled) * widen(second)).astype(dtype)

  return lax.platform_dependent(out, lhs_scale, rhs_scale, cpu=one_by_one, default=at_once)


def scale_from_amax(
  amax: jax.Array,
  fallback: jax.Array,
  float8_max: float | jax.Array,
  margin: float = 0,
  power_of_two: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Computes the scale that maps ``amax`` to the format's largest value, and its inverse.

  ``inverse = float8_max / amax / 2**margin``; ``scale = 1 / inverse``

  Args:
    amax: largest magnitude; float32; units of the tensor; any shape.
    fallback: the scale if ``amax`` is zero, NaN or infinite; float32; shape of ``amax``.
    float8_max: largest finite value of the format.
    margin: headroom in powers of two.
    power_of_two: rounds the scale up to a power of two, which makes scaling exact.

  Returns:
    The dequantization multiplier and its inverse, the quantization multiplier; float32; shape of
    ``amax``.

  Numerics:
    Scales are clamped to ``[2**-126, 2**126]``. With a valid fallback, neither result is zero,
    infinite or NaN. Both round as in a compiled program of flax.linen.fp8_ops, whose compiler turns
    the division by a quotient into a product. FP8 values are bit-identical to Flax's. With
    ``power_of_two``, both are exact: the smallest power of two at which nothing saturates.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8 import quantize
    >>> amax = jnp.array([896.0, 0.0, jnp.inf])
    >>> quantize.scale_from_amax(amax, jnp.ones(3), 448.0)[0]
    Array([2., 1., 1.], dtype=float32)

  References:
    Micikevicius et al., FP8 Formats for Deep Learning, https://arxiv.org/abs/2209.05433, section 4.
  """
  usable = (amax > 0.0) & (amax < np.inf)
  # Avoids an intermediate infinity, at which JAX's debug modes would stop.
  largest = jnp.where(usable, amax, 1.0)
  if power_of_two:
    limit = jnp.float32(float8_max) / jnp.float32(2.0**margin)
    scale, inverse = _power_of_two(largest, jnp.broadcast_to(limit, largest.shape))
  else:
    inverse = (jnp.float32(float8_max) / largest) / jnp.float32(2.0**margin)
    inverse = jnp.clip(inverse, 1.0 / _LARGEST_SCALE, 1.0 / _SMALLEST_SCALE)
    scale = 1.0 / inverse
  return jnp.where(usable, scale, fallback), jnp.where(usable, inverse, 1.0 / fallback)


def _power_of_two(amax: jax.Array, limit: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the smallest power of two that is at least ``amax / limit``, and its inverse.

  Computes with exponents and mantissas. A division on a GPU is not exact, and its last bit would
  double a scale.
  """
  mantissa = np.int32(0x7FFFFF)
  a, b = (lax.bitcast_convert_type(x, jnp.int32) for x in (amax, limit))
  exponent = (a >> 23) - (b >> 23) + jnp.where((a & mantissa) > (b & mantissa), 1, 0)
  exponent = jnp.clip(exponent, -126, 126)
  to_float = lambda exponent: lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
  return to_float(exponent), to_float(-exponent)


def current_scale(
  x: jax.Array, float8: Float8, axes: tuple[int, ...] | None = None, power_of_two: bool = False
) -> tuple[jax.Array, jax.Array]:
  """Computes scales from the values that will be quantized with them.

  ``scale_from_amax(max(|x|, axes, keepdims))``

  Args:
    x: values; any shape; float32, bfloat16 or float16.
    float8: the format.
    axes: axes that share a scale. None shares one scale for all axes.
    power_of_two: rounds scales up to powers of two, which makes scaling exact.

  Returns:
    The dequantization multipliers and their inverses; float32. The shape is ``()`` if ``axes`` is
    None, else that of ``x`` with size 1 along ``axes``.

  Numerics:
    The scale is 1 if all values are zero, and NaN if one is NaN or infinite. All values with a NaN
    scale become NaN, so a bad value stays visible.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8 import formats, quantize
    >>> x = jnp.array([[224.0, 1.0], [0.0, 0.0], [jnp.inf, 1.0]])
    >>> quantize.current_scale(x, formats.E4M3, axes=(1,))[0].ravel()
    Array([0.5, 1. , nan], dtype=float32)

  References:
    Transformer Engine, transformer_engine.common.recipe.Float8CurrentScaling.
  """
  amax = checkpoint_name(largest_magnitude(x, axes), AMAX)
  return scale_of_amax(amax, float8, power_of_two)


def scale_of_amax(
  amax: jax.Array, float8: Float8, power_of_two: bool
) -> tuple[jax.Array, jax.Array]:
  """Computes scales of current values from their amax, as ``current_scale`` does.

  Kernels call this function too, so it uses only operations that Pallas has.
  """
  fallback = jnp.where(amax < np.inf, 1.0, amax * 0.0)  # NaN if amax is infinite or NaN
  return scale_from_amax(amax, fallback, float8.max, power_of_two=power_of_two)
