"""Delayed scaling of single tensors, with the signatures of ``flax.linen.fp8_ops``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from flax_fp8 import amax as _amax
from flax_fp8.formats import float8
from flax_fp8.meta_dtype import like, to_float32
from flax_fp8.quantize import QTensor, scale_from_amax
from flax_fp8.quantize import dequantize as _dequantize
from flax_fp8.quantize import quantize as _quantize
from flax_fp8.recipes.delayed import next_scale, roll_history


def quantize(x: jax.Array, q_dtype: Any, scale: jax.Array, compute_dtype: Any) -> jax.Array:
  """Quantizes a tensor with a given scale.

  ``saturating_cast(x / scale)``

  Args:
    x: values of any shape; float32, bfloat16 or float16.
    q_dtype: an FP8 dtype.
    scale: dequantization multiplier; float32; shape ``()``, ``(1,)``, or broadcastable to ``x``.
    compute_dtype: accepted for compatibility and ignored; the division is in float32.

  Returns:
    FP8 values of the shape of ``x``.

  Raises:
    ValueError: ``q_dtype`` is not an FP8 dtype.

  Numerics:
    As ``flax_fp8.quantize.saturating_cast``. Infinities saturate, as in Flax. Functions with state
    (``quantize_dequantize_update``, ``in_q`` and the contractions) convert them to NaN instead.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8 import fp8_ops
    >>> x = jnp.array([1.0, 1000.0])
    >>> fp8_ops.quantize(x, jnp.float8_e4m3fn, jnp.float32(1), jnp.float32)
    Array([1, 448], dtype=float8_e4m3fn)

  References:
    flax.linen.fp8_ops.quantize.
  """
  del compute_dtype
  return _quantize(x, _fit(scale, x), float8(q_dtype)).data


def dequantize(x: jax.Array, dq_dtype: Any, scale: jax.Array) -> jax.Array:
  """Dequantizes a tensor with a given scale.

  ``(x.astype(float32) * scale).astype(dq_dtype)``

  Args:
    x: FP8 values or the result of a GEMM; any shape.
    dq_dtype: dtype of the result.
    scale: dequantization multiplier; as in ``quantize``.

  Returns:
    The values in ``dq_dtype``, of the shape of ``x``.

  Numerics:
    The product is float32, then rounded once.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8 import fp8_ops
    >>> fp8_ops.dequantize(jnp.array([2.0], jnp.float8_e5m2), jnp.float32, jnp.float32(3))
    Array([6.], dtype=float32)

  References:
    flax.linen.fp8_ops.dequantize.
  """
  return _dequantize(x, _fit(scale, x), dq_dtype)


def qdq(x: jax.Array, q_dtype: Any, scale: jax.Array, compute_dtype: Any) -> jax.Array:
  """Quantizes and dequantizes a tensor.

  ``dequantize(quantize(x, q_dtype, scale, compute_dtype), x.dtype, scale)``

  Args:
    x: values of any shape; float32, bfloat16 or float16.
    q_dtype: an FP8 dtype.
    scale: dequantization multiplier; as in ``quantize``.
    compute_dtype: accepted for compatibility and ignored; arithmetic is float32.

  Returns:
    The rounded values, of the shape and dtype of ``x``.

  Raises:
    ValueError: ``q_dtype`` is not an FP8 dtype.

  Numerics:
    As ``quantize`` and ``dequantize``.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8 import fp8_ops
    >>> fp8_ops.qdq(jnp.array([1.06]), jnp.float8_e4m3fn, jnp.float32(1), jnp.float32)
    Array([1.], dtype=float32)

  References:
    flax.linen.fp8_ops.qdq.
  """
  return dequantize(quantize(x, q_dtype, scale, compute_dtype), x.dtype, scale)


def update_fp8_meta(
  x: jax.Array, q_dtype: Any, scale: jax.Array, amax_history: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Updates scale and amax history by one step of delayed scaling.

  ``max(amax_history) / fp8_max, compute_amax_history(x, amax_history)``

  Args:
    x: values of any shape; float32, bfloat16 or float16.
    q_dtype: an FP8 dtype.
    scale: scale of the previous step; float32 or ``fp32_max_grad``; shape ``()`` or ``(1,)``.
    amax_history: history with slot 0 newest and slot 1 oldest; the same dtype; shape
      ``(length,)``.

  Returns:
    The scale of this step and the history for the next step, in the dtype of the inputs.

  Raises:
    ValueError: ``q_dtype`` is not an FP8 dtype.

  Numerics:
    As ``DelayedScaling``.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8 import fp8_ops
    >>> one, empty = jnp.ones(1), jnp.zeros(3)
    >>> fp8_ops.update_fp8_meta(jnp.array([-2.0]), jnp.float8_e4m3fn, one, empty)[1]
    Array([2., 0., 0.], dtype=float32)

  References:
    flax.linen.fp8_ops.update_fp8_meta.
  """
  return delayed_step(x, q_dtype, scale, amax_history)[1:]


def delayed_step(
  x: jax.Array, q_dtype: Any, scale: jax.Array, amax_history: jax.Array
) -> tuple[QTensor, jax.Array, jax.Array]:
  """Quantizes with delayed scaling. Returns the values, the new scale and the new history."""
  float8_format = float8(q_dtype)
  given = to_float32(scale), to_float32(amax_history)
  new_scale, inverse = next_scale(*given, float8_format.max)
  q = _quantize(x, _fit(new_scale, x), float8_format, _fit(inverse, x), stale=True)
  seen = _amax.amax(x, (scale, amax_history))
  new_history = roll_history(to_float32(amax_history), seen)
  return q, like(new_scale, scale), like(new_history, amax_history)


def quantize_dequantize_update(
  x: jax.Array, q_dtype: Any, scale: jax.Array, amax_history: jax.Array, compute_dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Quantizes and dequantizes with delayed scaling, and returns the new state.

  ``qdq(x, q_dtype, new_scale, compute_dtype), new_scale, new_history``

  Args:
    x: values of any shape; float32, bfloat16 or float16.
    q_dtype: an FP8 dtype.
    scale: as in ``update_fp8_meta``.
    amax_history: as in ``update_fp8_meta``.
    compute_dtype: accepted for compatibility and ignored; arithmetic is float32.

  Returns:
    The rounded values, the new scale and the new history.

  Raises:
    ValueError: ``q_dtype`` is not an FP8 dtype.

  Numerics:
    As ``qdq`` and ``update_fp8_meta``, but infinities become NaN.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8 import fp8_ops
    >>> e4m3, one, empty = jnp.float8_e4m3fn, jnp.ones(1), jnp.zeros(2)
    >>> fp8_ops.quantize_dequantize_update(jnp.array([1.06]), e4m3, one, empty, jnp.float32)[0]
    Array([1.], dtype=float32)

  References:
    flax.linen.fp8_ops.quantize_dequantize_update.
  """
  del compute_dtype
  q, new_scale, new_history = delayed_step(x, q_dtype, scale, amax_history)
  return _dequantize(q.data, q.scale, x.dtype), new_scale, new_history


def _fit(scale: jax.Array, x: jax.Array) -> jax.Array:
  """Reshapes a scale with one element to a scalar, so that it broadcasts to any tensor."""
  scale = to_float32(jnp.asarray(scale))
  return scale.reshape(()) if scale.size == 1 else scale


def get_fp8_max(fp8_dtype: Any, out_dtype: Any) -> jax.Array:
  """Returns the largest finite value of an FP8 dtype.

  Args:
    fp8_dtype: an FP8 dtype.
    out_dtype: dtype of the result.

  Returns:
    A scalar in ``out_dtype``.

  Raises:
    ValueError: ``fp8_dtype`` is not an FP8 dtype.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8 import fp8_ops
    >>> fp8_ops.get_fp8_max(jnp.float8_e4m3fn, jnp.float32)
    Array(448., dtype=float32)

  References:
    flax.linen.fp8_ops.get_fp8_max.
  """
  return jnp.asarray(float8(fp8_dtype).max, out_dtype)


def compute_scale(
  amax: jax.Array, scale: jax.Array, fp8_max: jax.Array | float, margin: float = 0
) -> jax.Array:
  """Computes the scale that maps ``amax`` to ``fp8_max / 2**margin``.

  ``amax / fp8_max * 2**margin``

  Args:
    amax: largest magnitude; float32; any shape.
    scale: the previous scale, returned if ``amax`` is zero or not finite.
    fp8_max: largest finite value of the format.
    margin: headroom in powers of two.

  Returns:
    The dequantization multiplier in float32. It is never zero, infinite or NaN.

  Numerics:
    As ``flax_fp8.quantize.scale_from_amax``.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8 import fp8_ops
    >>> fp8_ops.compute_scale(jnp.float32(896), jnp.float32(1), 448.0)
    Array(2., dtype=float32)

  References:
    flax.linen.fp8_ops.compute_scale.
  """
  return scale_from_amax(jnp.asarray(amax), jnp.asarray(scale), fp8_max, margin)[0]


def compute_amax_history(x: jax.Array, amax_history: jax.Array) -> jax.Array:
  """Records the amax of ``x``.

  ``roll(amax_history, -1).at[0].set(max(|x|))``

  Args:
    x: values of any shape; float32, bfloat16 or float16.
    amax_history: float32; shape ``(length,)``; slot 0 newest, slot 1 oldest.

  Returns:
    The history for the next step, of the shape of ``amax_history``.

  Numerics:
    A non-finite amax is recorded as zero, like a missing one.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8 import fp8_ops
    >>> fp8_ops.compute_amax_history(jnp.array([-3.0]), jnp.array([1.0, 7.0, 8.0]))
    Array([3., 8., 1.], dtype=float32)

  References:
    flax.linen.fp8_ops.compute_amax_history.
  """
  return roll_history(amax_history, _amax.amax(x, amax_history))
