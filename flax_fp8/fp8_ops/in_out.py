"""Differentiable quantization of operands and dequantization of results, for custom contractions.

The signatures are those of ``flax.linen.fp8_ops``. The gradients of a scale and a history are their
new values.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from flax_fp8 import varying
from flax_fp8.fp8_ops.quantization import delayed_step, dequantize, quantize_dequantize_update
from flax_fp8.meta_dtype import like, to_float32
from flax_fp8.quantize import product
from flax_fp8.state_cast import emit_once


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_qdq(
  compute_dtype: Any, q_dtype: Any, inp: jax.Array, scale: jax.Array, amax_history: jax.Array
) -> jax.Array:
  """Quantizes and dequantizes an operand. Its gradient passes through unchanged.

  ``qdq(inp, q_dtype, new_scale, compute_dtype)``

  The gradients of ``scale`` and ``amax_history`` are their new values.

  Args:
    compute_dtype: accepted for compatibility and ignored; arithmetic is float32.
    q_dtype: an FP8 dtype.
    inp: values of any shape; float32, bfloat16 or float16.
    scale: as in ``update_fp8_meta``.
    amax_history: as in ``update_fp8_meta``.

  Returns:
    The rounded values, of the shape and dtype of ``inp``.

  Raises:
    ValueError: ``q_dtype`` is not an FP8 dtype.

  Numerics:
    As ``qdq``.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from flax_fp8 import fp8_ops
    >>> f = lambda s, h: fp8_ops.in_qdq(jnp.float32, jnp.float8_e4m3fn, 3.0, s, h)
    >>> jax.grad(f, (0, 1))(jnp.float32(1), jnp.zeros(2))
    (Array(1., dtype=float32), Array([3., 0.], dtype=float32))

  References:
    flax.linen.fp8_ops.in_qdq.
  """
  return in_qdq_fwd(compute_dtype, q_dtype, inp, scale, amax_history)[0]


def in_qdq_fwd(
  compute_dtype: Any, q_dtype: Any, inp: jax.Array, scale: jax.Array, amax_history: jax.Array
) -> tuple[jax.Array, Any]:
  """Forward rule of ``in_qdq``."""
  inp = jnp.asarray(inp)
  out, *new = quantize_dequantize_update(inp, q_dtype, scale, amax_history, compute_dtype)
  return out, tuple(new)


def in_qdq_bwd(compute_dtype: Any, q_dtype: Any, res: Any, g: jax.Array) -> tuple[Any, ...]:
  """Backward rule of ``in_qdq``."""
  del compute_dtype, q_dtype
  return g, *emit(res)


in_qdq.defvjp(in_qdq_fwd, in_qdq_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def out_qdq(
  compute_dtype: Any, q_dtype: Any, out: jax.Array, scale: jax.Array, amax_history: jax.Array
) -> jax.Array:
  """Quantizes and dequantizes the gradient. The value passes through unchanged.

  ``out``, with the gradient ``qdq(g, q_dtype, new_scale, compute_dtype)``

  The gradients of ``scale`` and ``amax_history`` are their new values.

  Args:
    compute_dtype: accepted for compatibility and ignored; arithmetic is float32.
    q_dtype: an FP8 dtype, usually E5M2.
    out: values of any shape; float32, bfloat16 or float16.
    scale: scale of the gradient; as in ``update_fp8_meta``.
    amax_history: amax history of the gradient; as in ``update_fp8_meta``.

  Returns:
    ``out``.

  Raises:
    ValueError: ``q_dtype`` is not an FP8 dtype.

  Numerics:
    As ``qdq``.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from flax_fp8 import fp8_ops
    >>> f = lambda x, s, h: 1.1 * fp8_ops.out_qdq(jnp.float32, jnp.float8_e5m2, x, s, h)
    >>> jax.grad(f)(3.0, jnp.float32(1), jnp.zeros(2))
    Array(1., dtype=float32)

  References:
    flax.linen.fp8_ops.out_qdq.
  """
  del compute_dtype, q_dtype, scale, amax_history
  return out


def out_qdq_fwd(
  compute_dtype: Any, q_dtype: Any, out: jax.Array, scale: jax.Array, amax_history: jax.Array
) -> tuple[jax.Array, Any]:
  """Forward rule of ``out_qdq``."""
  del compute_dtype, q_dtype
  return out, (scale, amax_history)


def out_qdq_bwd(compute_dtype: Any, q_dtype: Any, res: Any, g: jax.Array) -> tuple[Any, ...]:
  """Backward rule of ``out_qdq``."""
  scale, amax_history = res
  q_g, *new = quantize_dequantize_update(g, q_dtype, scale, amax_history, compute_dtype)
  return q_g, *emit(new)


out_qdq.defvjp(out_qdq_fwd, out_qdq_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_q(
  compute_dtype: Any, q_dtype: Any, inp: jax.Array, scale: jax.Array, amax_history: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Quantizes an operand with delayed scaling.

  ``quantize(inp, q_dtype, new_scale, compute_dtype), new_scale``

  The gradients of ``scale`` and ``amax_history`` are their new values. The gradient of ``inp`` is
  zero. The function that multiplies the FP8 values, such as ``quantized_dot``, must define it.

  Args:
    compute_dtype: accepted for compatibility and ignored; arithmetic is float32.
    q_dtype: an FP8 dtype.
    inp: values of any shape; float32, bfloat16 or float16.
    scale: as in ``update_fp8_meta``.
    amax_history: as in ``update_fp8_meta``.

  Returns:
    FP8 values of the shape of ``inp``, and the scale used to quantize them.

  Raises:
    ValueError: ``q_dtype`` is not an FP8 dtype.

  Numerics:
    As ``quantize``, but infinities become NaN.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8 import fp8_ops
    >>> x, one, empty = jnp.array([0.5]), jnp.ones(1), jnp.zeros(2)
    >>> fp8_ops.in_q(jnp.float32, jnp.float8_e4m3fn, x, one, empty)[0]
    Array([0.5], dtype=float8_e4m3fn)

  References:
    flax.linen.fp8_ops.in_q.
  """
  return in_q_fwd(compute_dtype, q_dtype, inp, scale, amax_history)[0]


def in_q_fwd(
  compute_dtype: Any, q_dtype: Any, inp: jax.Array, scale: jax.Array, amax_history: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], Any]:
  """Forward rule of ``in_q``."""
  inp = jnp.asarray(inp)
  del compute_dtype
  q, new_scale, new_history = delayed_step(inp, q_dtype, scale, amax_history)
  return (q.data, new_scale), (new_scale, new_history)


def in_q_bwd(compute_dtype: Any, q_dtype: Any, res: Any, _: Any) -> tuple[Any, ...]:
  """Backward rule of ``in_q``."""
  del compute_dtype, q_dtype
  return None, *emit(res)


in_q.defvjp(in_q_fwd, in_q_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def out_dq(dq_type: Any, lhs_scale: jax.Array, rhs_scale: jax.Array, out: jax.Array) -> jax.Array:
  """Dequantizes the product of two quantized operands. Its gradient passes through unscaled.

  ``dequantize(out, dq_type, lhs_scale * rhs_scale)``

  Args:
    dq_type: dtype of the result.
    lhs_scale: scale of the left operand; float32 or ``fp32_max_grad``; shape ``()`` or ``(1,)``.
    rhs_scale: scale of the right operand; the same dtype and shape.
    out: float32 product of FP8 values; any shape.

  Returns:
    The product in ``dq_type``, of the shape of ``out``.

  Numerics:
    The product and the scales are multiplied in float32.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8 import fp8_ops
    >>> fp8_ops.out_dq(jnp.float32, jnp.ones(1) * 2, jnp.ones(1) * 3, jnp.ones((2,)))
    Array([6., 6.], dtype=float32)

  References:
    flax.linen.fp8_ops.out_dq.
  """
  return dequantize(out, dq_type, product(to_float32(lhs_scale), to_float32(rhs_scale)))


def out_dq_fwd(
  dq_type: Any, lhs_scale: jax.Array, rhs_scale: jax.Array, out: jax.Array
) -> tuple[jax.Array, Any]:
  """Forward rule of ``out_dq``."""
  return out_dq(dq_type, lhs_scale, rhs_scale, out), None


def out_dq_bwd(dq_type: Any, _: Any, g: jax.Array) -> tuple[Any, ...]:
  """Backward rule of ``out_dq``."""
  del dq_type
  return None, None, g


out_dq.defvjp(out_dq_fwd, out_dq_bwd)


def emit(new: Any) -> tuple[jax.Array, ...]:
  """Returns new state as cotangents."""
  axes = varying.unchecked_manual_axes()
  return tuple(like(emit_once(to_float32(leaf), axes), leaf) for leaf in new)
