"""The contraction functions of ``flax.linen.fp8_ops``, with the same signatures."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_fp8 import contraction, fields
from flax_fp8.formats import E5M2, Format
from flax_fp8.fp8_ops.in_out import emit
from flax_fp8.fp8_ops.quantization import delayed_step, dequantize
from flax_fp8.meta_dtype import to_float32
from flax_fp8.ops.dot_general import dot_general
from flax_fp8.quantize import product
from flax_fp8.recipes.delayed import DelayedScaling


def fp8_scaled_dot_general(
  lhs: jax.Array,
  rhs: jax.Array,
  dimension_numbers: Any,
  precision: Any = None,
  preferred_element_type: Any = None,
  *,
  lhs_scale: jax.Array,
  rhs_scale: jax.Array,
  grad_scale: jax.Array,
  lhs_amax_history: jax.Array,
  rhs_amax_history: jax.Array,
  grad_amax_history: jax.Array,
  quantize_compute_type: Any = jnp.float32,
  fp8_format: Format = Format.HYBRID,
) -> jax.Array:
  """Contracts in FP8 with delayed scaling. The state is passed as separate arrays.

  ``ops.dot_general(lhs, rhs, dimension_numbers, recipe=DelayedScaling(), state=...)``

  Args:
    lhs: left operand; float32, bfloat16 or float16.
    rhs: right operand; float32, bfloat16 or float16.
    dimension_numbers: as in ``lax.dot_general``.
    precision: ignored, with a warning.
    preferred_element_type: dtype of the result; the promoted dtype of the operands if None.
    lhs_scale: scale of ``lhs``; float32 or ``fp32_max_grad``; shape ``(1,)``.
    rhs_scale: scale of ``rhs``; the same dtype and shape.
    grad_scale: scale of the output gradient; the same dtype and shape.
    lhs_amax_history: amax history of ``lhs``; float32 or ``fp32_max_grad``; shape ``(length,)``.
    rhs_amax_history: amax history of ``rhs``; the same dtype and shape.
    grad_amax_history: amax history of the output gradient; the same dtype and shape.
    quantize_compute_type: accepted for compatibility and ignored; arithmetic is float32.
    fp8_format: FP8 formats of operands and gradients.

  Returns:
    The product. The shape is that of ``lax.dot_general``.

  Raises:
    TypeError: as ``ops.dot_general``.
    ValueError: as ``ops.dot_general``.

  Numerics:
    As ``ops.dot_general``.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8 import fp8_ops
    >>> one, empty = jnp.ones(1), jnp.zeros(2)
    >>> state = {f"{t}_scale": one for t in ("lhs", "rhs", "grad")}
    >>> state |= {f"{t}_amax_history": empty for t in ("lhs", "rhs", "grad")}
    >>> dims = (((1,), (0,)), ((), ()))
    >>> fp8_ops.fp8_scaled_dot_general(jnp.ones((1, 2)), jnp.ones((2, 1)), dims, **state)
    Array([[2.]], dtype=float32)

  References:
    flax.linen.fp8_ops.fp8_scaled_dot_general.
  """
  del quantize_compute_type
  warn_of_precision("fp8_scaled_dot_general", precision)
  if not getattr(lhs_amax_history, "ndim", 0):
    raise TypeError(
      "fp8_scaled_dot_general: lhs_amax_history must be an array (length,); got "
      f"lhs_amax_history={fields.show(lhs_amax_history)}. Pass jnp.zeros(length)."
    )
  pair = lambda scale, history: {"scale": scale, "amax_history": history}
  return dot_general(
    lhs,
    rhs,
    dimension_numbers,
    recipe=DelayedScaling(amax_history_len=lhs_amax_history.shape[0], fp8_format=fp8_format),
    state={
      "input": pair(lhs_scale, lhs_amax_history),
      "kernel": pair(rhs_scale, rhs_amax_history),
      "output_grad": pair(grad_scale, grad_amax_history),
    },
    preferred_element_type=preferred_element_type,
    name="fp8_scaled_dot_general",
  )


def warn_of_precision(name: str, precision: Any) -> None:
  """Warns that ``precision`` is ignored."""
  if precision is not None:
    message = f"{name}: the recipe sets the accumulation of FP8 GEMMs; {precision=} is ignored."
    warnings.warn(message, stacklevel=3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def quantized_dot(
  lhs: jax.Array,
  q_lhs: jax.Array,
  lhs_scale: jax.Array,
  rhs: jax.Array,
  q_rhs: jax.Array,
  rhs_scale: jax.Array,
  out_grad_scale: jax.Array,
  out_grad_amax_history: jax.Array,
  dimension_numbers: Any,
  preferred_element_type: Any = None,
) -> jax.Array:
  """Multiplies two quantized operands without scaling. The backward pass quantizes the gradient.

  ``lax.dot_general(q_lhs, q_rhs, dimension_numbers)``

  Dequantize the result with ``out_dq``. The gradients of ``out_grad_scale`` and
  ``out_grad_amax_history`` are their new values.

  Args:
    lhs: left operand before quantization. It receives the gradient of the left operand.
    q_lhs: left operand in FP8.
    lhs_scale: scale of ``q_lhs``; float32 or ``fp32_max_grad``; shape ``(1,)``.
    rhs: right operand before quantization. It receives the gradient of the right operand.
    q_rhs: right operand in FP8.
    rhs_scale: scale of ``q_rhs``; the same dtype and shape.
    out_grad_scale: scale of the output gradient; the same dtype and shape.
    out_grad_amax_history: amax history of the output gradient; the same dtype; shape
      ``(length,)``.
    dimension_numbers: as in ``lax.dot_general``.
    preferred_element_type: dtype of the product and of the gradients; float32 if None. Use float32
      or bfloat16: the product is unscaled and may overflow in float16. ``fp8_scaled_dot_general``
      has no such limit.

  Returns:
    The unscaled product. The shape is that of ``lax.dot_general``.

  Numerics:
    The output gradient is quantized to E5M2. The gradients of the operands are scaled in float32
    after the GEMM.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8 import fp8_ops
    >>> x, one, empty = jnp.ones((1, 2)), jnp.ones(1), jnp.zeros(2)
    >>> q, dims = x.astype(jnp.float8_e4m3fn), (((1,), (1,)), ((), ()))
    >>> fp8_ops.quantized_dot(x, q, one, x, q, one, one, empty, dims)
    Array([[2.]], dtype=float32)

  References:
    flax.linen.fp8_ops.quantized_dot.
  """
  del lhs, lhs_scale, rhs, rhs_scale, out_grad_scale, out_grad_amax_history
  dtype = jnp.dtype(preferred_element_type or jnp.float32)
  return _dot(q_lhs, q_rhs, dimension_numbers, lax.Precision.DEFAULT, dtype)


def quantized_dot_fwd(*args: Any) -> tuple[jax.Array, Any]:
  """Forward rule of ``quantized_dot``."""
  *operands, dimension_numbers, preferred_element_type = args
  return quantized_dot(*operands, dimension_numbers, preferred_element_type), tuple(operands)


def quantized_dot_bwd(
  dimension_numbers: Any, preferred_element_type: Any, res: Any, g: jax.Array
) -> tuple[Any, ...]:
  """Backward rule of ``quantized_dot``."""
  lhs, q_lhs, lhs_scale, rhs, q_rhs, rhs_scale, scale, history = res
  dtype = preferred_element_type or jnp.float32
  q, new_scale, new_history = delayed_step(g, E5M2.dtype, scale, history)
  q_g, g_scale = q.data, to_float32(new_scale)
  how: Any = {
    "dimension_numbers": dimension_numbers,
    "precision": lax.Precision.HIGHEST,
    "preferred_element_type": jnp.float32,
  }
  grad_lhs = dot_general_transpose_lhs(q_g, lhs, q_rhs, **how)
  grad_rhs = dot_general_transpose_rhs(q_g, q_lhs, rhs, **how)
  grad_lhs = dequantize(grad_lhs, dtype, product(to_float32(rhs_scale), g_scale))
  grad_rhs = dequantize(grad_rhs, dtype, product(to_float32(lhs_scale), g_scale))
  return grad_lhs, None, None, grad_rhs, None, None, *emit((new_scale, new_history))


quantized_dot.defvjp(quantized_dot_fwd, quantized_dot_bwd)


def dot_general_transpose_lhs(
  g: jax.Array,
  x: jax.Array,
  y: jax.Array,
  *,
  dimension_numbers: Any,
  precision: Any,
  preferred_element_type: Any,
  swap_ans: bool = False,
) -> jax.Array:
  """Returns the gradient of the left operand of ``dot_general(x, y)``.

  ``transpose(dot_general(g, y))``

  Args:
    g: gradient of the product, with batch axes first, then the axes of ``x``, then those of ``y``.
    x: left operand. Only its shape is used.
    y: right operand.
    dimension_numbers: dimension numbers of the forward product.
    precision: as in ``lax.dot_general``.
    preferred_element_type: dtype of the result.
    swap_ans: whether the axes of ``y`` come before the axes of ``x`` in ``g``.

  Returns:
    The gradient, of the shape of ``x``.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8 import fp8_ops
    >>> x, y, dims = jnp.ones((2, 3)), jnp.ones((3, 4)), (((1,), (0,)), ((), ()))
    >>> options = dict(dimension_numbers=dims, precision=None, preferred_element_type=jnp.float32)
    >>> fp8_ops.dot_general_transpose_lhs(x @ y, x, y, **options).shape
    (2, 3)

  References:
    flax.linen.fp8_ops.dot_general_transpose_lhs.
  """
  (x_contract, y_contract), (x_batch, y_batch) = dimension_numbers
  if swap_ans:
    swapped = ((y_contract, x_contract), (y_batch, x_batch))
    gemm = contraction.backward_gemms(_tuples(swapped), jnp.shape(y), jnp.shape(x))[1]
  else:
    gemm = contraction.backward_gemms(_tuples(dimension_numbers), jnp.shape(x), jnp.shape(y))[0]
  out = _dot(g, y, gemm.dimension_numbers, precision, preferred_element_type)
  return lax.transpose(out, gemm.permutation)


def dot_general_transpose_rhs(
  g: jax.Array,
  x: jax.Array,
  y: jax.Array,
  *,
  dimension_numbers: Any,
  precision: Any,
  preferred_element_type: Any,
) -> jax.Array:
  """Returns the gradient of the right operand of ``dot_general(x, y)``.

  ``transpose(dot_general(g, x))``

  Args:
    g: gradient of the product, with batch axes first, then the axes of ``x``, then those of ``y``.
    x: left operand.
    y: right operand. Only its shape is used.
    dimension_numbers: dimension numbers of the forward product.
    precision: as in ``lax.dot_general``.
    preferred_element_type: dtype of the result.

  Returns:
    The gradient, of the shape of ``y``.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8 import fp8_ops
    >>> x, y, dims = jnp.ones((2, 3)), jnp.ones((3, 4)), (((1,), (0,)), ((), ()))
    >>> options = dict(dimension_numbers=dims, precision=None, preferred_element_type=jnp.float32)
    >>> fp8_ops.dot_general_transpose_rhs(x @ y, x, y, **options).shape
    (3, 4)

  References:
    flax.linen.fp8_ops.dot_general_transpose_rhs.
  """
  (x_contract, y_contract), (x_batch, y_batch) = dimension_numbers
  return dot_general_transpose_lhs(
    g,
    y,
    x,
    dimension_numbers=((y_contract, x_contract), (y_batch, x_batch)),
    precision=precision,
    preferred_element_type=preferred_element_type,
    swap_ans=True,
  )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def dot_general_with_precision(
  lhs: jax.Array,
  rhs: jax.Array,
  dimension_numbers: Any,
  precision: Any = None,
  preferred_element_type: Any = None,
) -> jax.Array:
  """Contracts with fast accumulation in the forward pass and full accumulation in the backward.

  ``lax.dot_general(lhs, rhs, dimension_numbers)``

  Args:
    lhs: left operand.
    rhs: right operand.
    dimension_numbers: as in ``lax.dot_general``.
    precision: ignored, with a warning.
    preferred_element_type: ignored, with a warning.

  Returns:
    The product. The shape is that of ``lax.dot_general``.

  Numerics:
    The forward GEMM has ``precision=DEFAULT``, which allows fast accumulation of FP8 products. The
    GEMMs of the derivatives have ``precision=HIGHEST``.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8 import fp8_ops
    >>> x = jnp.ones((1, 2))
    >>> fp8_ops.dot_general_with_precision(x, x, (((1,), (1,)), ((), ())))
    Array([[2.]], dtype=float32)

  References:
    flax.linen.fp8_ops.dot_general_with_precision.
  """
  warn_of_precision("dot_general_with_precision", precision or preferred_element_type)
  return lax.dot_general(lhs, rhs, dimension_numbers, precision=lax.Precision.DEFAULT)


@dot_general_with_precision.defjvp
def dot_general_with_precision_jvp(
  dimension_numbers: Any,
  precision: Any,
  preferred_element_type: Any,
  primals: Any,
  tangents: Any,
) -> tuple[jax.Array, jax.Array]:
  """Differentiation rule of ``dot_general_with_precision``."""
  del precision, preferred_element_type
  (lhs, rhs), (lhs_dot, rhs_dot) = primals, tangents
  full = functools.partial(
    lax.dot_general, dimension_numbers=dimension_numbers, precision=lax.Precision.HIGHEST
  )
  out = dot_general_with_precision(lhs, rhs, dimension_numbers)
  return out, full(lhs_dot, rhs) + full(lhs, rhs_dot)


def _dot(lhs: jax.Array, rhs: jax.Array, dims: Any, precision: Any, dtype: Any) -> jax.Array:
  return lax.dot_general(lhs, rhs, dims, precision=precision, preferred_element_type=dtype)


def _tuples(dimension_numbers: Any) -> contraction.DimensionNumbers:
  (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
  return (tuple(lhs_contract), tuple(rhs_contract)), (tuple(lhs_batch), tuple(rhs_batch))
