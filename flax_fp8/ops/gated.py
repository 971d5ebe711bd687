"""Activations of gated MLPs: ``activation(gate) * up``, forward and backward in float32.

JAX differentiates ``silu(gate) * up`` one operation at a time, in the dtype of the arrays. XLA then
writes the gradient of ``gate`` to memory in bfloat16 and reads it again to quantize it. These
functions compute each gradient in float32 from ``gate`` and ``up`` and round it once. With delayed
scaling, XLA makes both gradients and their casts to FP8 in one kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from flax_fp8 import fields
from flax_fp8.ops import check


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """Computes the activation of a SwiGLU MLP.

  ``silu(gate) * up``, with ``silu(x) = x * sigmoid(x)``

  Use it between the projections of a gated MLP: ``down(fp8.swiglu(gate(x), up(x)))``. It also
  saves memory in BF16 models.

  Args:
    gate: the array that goes through the activation; float32, bfloat16 or float16, or float64 if
      JAX has it enabled.
    up: the array that it multiplies; same shape and dtypes.

  Returns:
    The product; same shape, in the promoted dtype of ``gate`` and ``up``.

  Raises:
    TypeError: ``gate`` or ``up`` is not an array of one of these dtypes.
    ValueError: ``gate`` and ``up`` differ in shape. There is no implicit broadcasting.

  Numerics:
    Computed in float32 (float64 for float64) and rounded once to the dtype of the result. The
    backward pass needs only ``gate`` and ``up``. It computes in float32 too, and rounds each
    gradient once to the dtype of its array. Infinities and NaN propagate as in
    ``jax.nn.silu(gate) * up`` in float32. Derivatives of any order and forward mode are those of
    this formula.

  Example:
    >>> import jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> fp8.swiglu(jnp.float32([-1, 0, 2]), jnp.float32([1, 1, 3]))
    Array([-0.26894143,  0.        ,  5.2847824 ], dtype=float32)

  References:
    Shazeer, GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202.
  """
  return _gated("swiglu", jax.nn.silu, gate, up)


def geglu(gate: jax.Array, up: jax.Array, *, approximate: bool = True) -> jax.Array:
  """Computes the activation of a GEGLU MLP.

  ``gelu(gate) * up``, with ``gelu(x) = x * P(normal <= x)``

  Args:
    gate: as in ``swiglu``.
    up: as in ``swiglu``.
    approximate: as in ``jax.nn.gelu``. True approximates the probability by a ``tanh``, as Gemma
      and T5 1.1 do. False computes it with ``erf``.

  Returns:
    The product; same shape, in the promoted dtype of ``gate`` and ``up``.

  Raises:
    TypeError: ``gate`` or ``up`` is not an array of a supported dtype, or ``approximate`` is not a
      bool.
    ValueError: ``gate`` and ``up`` differ in shape.

  Numerics:
    As ``swiglu``, with ``jax.nn.gelu``.

  Example:
    >>> import jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> fp8.geglu(jnp.float32([-1, 0, 2]), jnp.float32([1, 1, 3]))
    Array([-0.15880796,  0.        ,  5.8637934 ], dtype=float32)

  References:
    Shazeer, GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202.
  """
  fields.flag("geglu", "approximate", approximate)
  return _gated("geglu", functools.partial(jax.nn.gelu, approximate=approximate), gate, up)


def reglu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """Computes the activation of a ReGLU MLP.

  ``relu(gate) * up``, with ``relu(x) = max(x, 0)``

  Args:
    gate: as in ``swiglu``.
    up: as in ``swiglu``.

  Returns:
    The product; same shape, in the promoted dtype of ``gate`` and ``up``.

  Raises:
    TypeError: ``gate`` or ``up`` is not an array of a supported dtype.
    ValueError: ``gate`` and ``up`` differ in shape.

  Numerics:
    As ``swiglu``, with ``jax.nn.relu``. The derivative of ``relu`` at zero is zero.

  Example:
    >>> import jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> fp8.reglu(jnp.float32([-1, 0, 2]), jnp.float32([1, 1, 3]))
    Array([0., 0., 6.], dtype=float32)

  References:
    Shazeer, GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202.
  """
  return _gated("reglu", jax.nn.relu, gate, up)


def _gated(
  name: str, activation: Callable[[jax.Array], jax.Array], gate: jax.Array, up: jax.Array
) -> jax.Array:
  """Computes ``activation(gate) * up`` and recomputes it in the backward pass."""
  gate, up = _operand(name, "gate", gate), _operand(name, "up", up)
  if gate.shape != up.shape:
    raise ValueError(
      f"{name}: gate and up must have the same shape; got gate={fields.show(gate)}, "
      f"up={fields.show(up)}. Broadcast one of them with jnp.broadcast_to."
    )
  dtype = jnp.result_type(gate, up)
  wide = jnp.float64 if dtype == jnp.float64 else jnp.float32

  def product(gate: jax.Array, up: jax.Array) -> jax.Array:
    return (activation(gate.astype(wide)) * up.astype(wide)).astype(dtype)

  # Without prevent_cse=False, JAX adds barriers, and XLA writes some operands to memory once more.
  return jax.checkpoint(product, prevent_cse=False)(gate, up)


def _operand(name: str, side: str, x: jax.Array) -> jax.Array:
  """Returns gate or up as an array; raises TypeError for an unsupported type or dtype."""
  x = check.operand(name, side, x)
  if x.dtype.name not in (*check.COMPUTE_DTYPES, "float64"):
    raise TypeError(
      f"{name}: operands must be of dtype {', '.join(check.COMPUTE_DTYPES)}; got {side} of dtype "
      f"{x.dtype} and shape {x.shape}. Cast it to one of these."
    )
  return x
