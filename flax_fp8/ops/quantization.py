"""Delayed scaling of single tensors: quantise an operand, dequantise a result, or both at once.

The building blocks for contractions of one's own. The calls are those of ``flax.linen.fp8_ops``;
scale and history go in as values, and their gradients are their new values.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from flax_fp8 import amax as _amax
from flax_fp8.formats import float8
from flax_fp8.meta_dtype import like, to_float32
from flax_fp8.quantize import dequantize as _dequantize
from flax_fp8.quantize import product
from flax_fp8.quantize import quantize as _quantize
from flax_fp8.recipes.delayed import next_scale, roll_history


def quantize(x: jax.Array, q_dtype: Any, scale: jax.Array, compute_dtype: Any) -> jax.Array:
  """Quantises with a given scale.

  ``saturating_cast(x / scale)``

  Args:
    x: values; any shape; float32, bfloat16 or float16.
    q_dtype: an FP8 dtype.
    scale: dequantisation multiplier; float32; shape ``()``, ``(1,)``, or broadcasting to ``x``.
    compute_dtype: taken for compatibility; the quotient is always float32.

  Returns:
    FP8 values; shape of ``x``.

  Raises:
    ValueError: ``q_dtype`` is no FP8 dtype.

  Numerics:
    See ``flax_fp8.quantize.saturating_cast``.

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
  """Multiplies by the scale.

  ``(x.astype(float32) * scale).astype(dq_dtype)``

  Args:
    x: FP8 values or a GEMM's result; any shape.
    dq_dtype: of the result.
    scale: dequantisation multiplier; as for ``quantize``.

  Returns:
    The values in ``dq_dtype``; shape of ``x``.

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
  """Quantises and dequantises: the value that FP8 makes of ``x``.

  ``dequantize(quantize(x))``

  Args:
    x: values; any shape; float32, bfloat16 or float16.
    q_dtype: an FP8 dtype.
    scale: dequantisation multiplier; as for ``quantize``.
    compute_dtype: taken for compatibility; arithmetic is float32.

  Returns:
    Values on the grid of FP8 times scale; shape and dtype of ``x``.

  Raises:
    ValueError: ``q_dtype`` is no FP8 dtype.

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
  """Takes a step of delayed scaling: the scale of this step, and the history for the next.

  ``scale = max(amax_history) / fp8_max``; ``amax_history = [max(|x|), *amax_history[2:], ...]``

  Args:
    x: the tensor; any shape.
    q_dtype: an FP8 dtype.
    scale: of the step before; float32 or fp32_max_grad; shape ``()`` or ``(1,)``.
    amax_history: slot 0 newest; same dtype; shape ``(length,)``.

  Returns:
    New scale and new history, of the dtype that came in.

  Raises:
    ValueError: ``q_dtype`` is no FP8 dtype.

  Numerics:
    See ``DelayedScaling``.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8 import fp8_ops
    >>> one, empty = jnp.ones(1), jnp.zeros(3)
    >>> fp8_ops.update_fp8_meta(jnp.array([-2.0]), jnp.float8_e4m3fn, one, empty)[1]
    Array([2., 0., 0.], dtype=float32)

  References:
    flax.linen.fp8_ops.update_fp8_meta.
  """
  seen = _amax.amax(x, (scale, amax_history))
  new_scale = next_scale(to_float32(scale), to_float32(amax_history), float8(q_dtype))
  new_history = roll_history(to_float32(amax_history), seen)
  return like(new_scale, scale), like(new_history, amax_history)


def quantize_dequantize_update(
  x: jax.Array, q_dtype: Any, scale: jax.Array, amax_history: jax.Array, compute_dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Quantises and dequantises by delayed scaling, and returns the new state.

  ``qdq(x, new_scale), new_scale, new_history``

  Args:
    x: values; any shape; float32, bfloat16 or float16.
    q_dtype: an FP8 dtype.
    scale: as for ``update_fp8_meta``.
    amax_history: as for ``update_fp8_meta``.
    compute_dtype: taken for compatibility; arithmetic is float32.

  Returns:
    The value that FP8 makes of ``x``, the new scale and the new history.

  Raises:
    ValueError: ``q_dtype`` is no FP8 dtype.

  Numerics:
    As ``qdq`` and ``update_fp8_meta``.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8 import fp8_ops
    >>> e4m3, one, empty = jnp.float8_e4m3fn, jnp.ones(1), jnp.zeros(2)
    >>> fp8_ops.quantize_dequantize_update(jnp.array([1.06]), e4m3, one, empty, jnp.float32)[0]
    Array([1.], dtype=float32)

  References:
    flax.linen.fp8_ops.quantize_dequantize_update.
  """
  new_scale, new_history = update_fp8_meta(x, q_dtype, scale, amax_history)
  return qdq(x, q_dtype, to_float32(new_scale), compute_dtype), new_scale, new_history


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_qdq(
  compute_dtype: Any, q_dtype: Any, inp: jax.Array, scale: jax.Array, amax_history: jax.Array
) -> jax.Array:
  """Rounds an operand to FP8's grid going forward; its gradient passes through unchanged.

  ``qdq(inp)``; the gradients of ``scale`` and ``amax_history`` are their new values.

  Args:
    compute_dtype: taken for compatibility; arithmetic is float32.
    q_dtype: an FP8 dtype.
    inp: values; any shape; float32, bfloat16 or float16.
    scale: as for ``update_fp8_meta``.
    amax_history: as for ``update_fp8_meta``.

  Returns:
    Values on the grid; shape and dtype of ``inp``.

  Raises:
    ValueError: ``q_dtype`` is no FP8 dtype.

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
  """Rounds the gradient to FP8's grid going backward; the value passes through unchanged.

  ``out``; its gradient is ``qdq(g)``, those of ``scale`` and ``amax_history`` their new values.

  Args:
    compute_dtype: taken for compatibility; arithmetic is float32.
    q_dtype: an FP8 dtype, E5M2 as a rule.
    out: values; any shape; float32, bfloat16 or float16.
    scale: of the gradient; as for ``update_fp8_meta``.
    amax_history: of the gradient; as for ``update_fp8_meta``.

  Returns:
    ``out``.

  Raises:
    ValueError: ``q_dtype`` is no FP8 dtype.

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
  """Quantises an operand by delayed scaling.

  ``quantize(inp, new_scale), new_scale``; the gradients of ``scale`` and ``amax_history`` are their
  new values. That of ``inp`` is zero: whoever multiplies the FP8 values defines it.

  Args:
    compute_dtype: taken for compatibility; arithmetic is float32.
    q_dtype: an FP8 dtype.
    inp: values; any shape; float32, bfloat16 or float16.
    scale: as for ``update_fp8_meta``.
    amax_history: as for ``update_fp8_meta``.

  Returns:
    FP8 values of the shape of ``inp``, and the scale that they were quantised with.

  Raises:
    ValueError: ``q_dtype`` is no FP8 dtype.

  Numerics:
    As ``quantize``.

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
  new_scale, new_history = update_fp8_meta(inp, q_dtype, scale, amax_history)
  q = quantize(inp, q_dtype, to_float32(new_scale), compute_dtype)
  return (q, new_scale), (new_scale, new_history)


def in_q_bwd(compute_dtype: Any, q_dtype: Any, res: Any, _: Any) -> tuple[Any, ...]:
  """Backward rule of ``in_q``."""
  del compute_dtype, q_dtype
  return None, *emit(res)


in_q.defvjp(in_q_fwd, in_q_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def out_dq(dq_type: Any, lhs_scale: jax.Array, rhs_scale: jax.Array, out: jax.Array) -> jax.Array:
  """Dequantises the product of two quantised operands; its gradient passes through unscaled.

  ``dequantize(out, lhs_scale * rhs_scale)``

  Args:
    dq_type: dtype of the result.
    lhs_scale: of the left operand; float32 or fp32_max_grad; shape ``()`` or ``(1,)``.
    rhs_scale: of the right operand; the same.
    out: the product of FP8 values, float32; any shape.

  Returns:
    The product in ``dq_type``; shape of ``out``.

  Numerics:
    Scales and product are multiplied in float32.

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


def _fit(scale: jax.Array, x: jax.Array) -> jax.Array:
  """Drops the dimensions of a ``(1,)`` scale that a scalar tensor lacks."""
  scale = to_float32(jnp.asarray(scale))
  return scale.reshape(()) if scale.size == 1 else scale


def emit(new: Any) -> tuple[jax.Array, ...]:
  """Returns new state as cotangents."""
  return tuple(like(_amax.emit_once(to_float32(leaf)), leaf) for leaf in new)
