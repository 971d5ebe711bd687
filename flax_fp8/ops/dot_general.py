"""The contraction: one GEMM forward, two backward, the new state leaving as the old one's gradient.

Forward, both operands are quantised and multiplied; what the backward GEMMs need is kept in FP8
only. Backward, the output gradient is quantised once and multiplied twice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from flax_fp8 import _compat, contraction
from flax_fp8.amax import emit_once
from flax_fp8.contraction import Axes, DimensionNumbers
from flax_fp8.meta_dtype import like, to_float32
from flax_fp8.ops import check
from flax_fp8.quantize import QTensor
from flax_fp8.recipes.base import GemmKind, Recipe, Role, TensorState

State: TypeAlias = Mapping[str, TensorState]
Roles: TypeAlias = tuple[Role, Role]


def dot_general(
  lhs: jax.Array,
  rhs: jax.Array,
  dimension_numbers: Any,
  *,
  recipe: Recipe,
  state: State,
  preferred_element_type: Any = None,
  roles: Roles = (Role.INPUT, Role.KERNEL),
  name: str = "dot_general",
) -> jax.Array:
  """Contracts two arrays in FP8; ``lax.dot_general`` with state.

  ``recipe.contract(recipe.quantize(lhs), recipe.quantize(rhs))``, and the same in the backward pass
  for the gradients of both operands. The gradient with respect to ``state`` is the new state.

  Args:
    lhs: left operand, the *input*; float32, bfloat16 or float16.
    rhs: right operand, the *kernel*; float32, bfloat16 or float16.
    dimension_numbers: of ``lax.dot_general``.
    recipe: how to scale.
    state: for each role, the leaves of ``recipe.init_state(role)``, float32 or fp32_max_grad.
    preferred_element_type: dtype of the result; the promoted dtype of the operands if None.
    roles: what ``lhs`` and ``rhs`` are; exchanged for a GEMM that takes the kernel first.
    name: what error messages call the operation.

  Returns:
    The product; shape as ``lax.dot_general``.

  Raises:
    TypeError: an operand is not float32, bfloat16 or float16; a leaf of the state is not float32
      or fp32_max_grad; ``recipe`` is no recipe.
    ValueError: dimension numbers do not fit the shapes; the state is not the recipe's.

  Numerics:
    GEMMs accumulate and are scaled in float32, then cast to the result's dtype. Where the state is
    shared by mapped (``vmap``) or replicated (``shard_map``) operands, the amax is over all.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> from flax_fp8 import ops
    >>> recipe = fp8.DelayedScaling(amax_history_len=2)
    >>> state = ops.init_state(recipe)
    >>> def loss(state, x, w):
    ...   return jnp.sum(
    ...     ops.dot_general(x, w, (((1,), (0,)), ((), ())), recipe=recipe, state=state)
    ...   )
    >>> new_state = jax.grad(loss)(state, jnp.full((2, 4), 3.0), jnp.ones((4, 2)))
    >>> new_state["input"]
    {'amax_history': Array([3., 0.], dtype=float32), 'scale': Array([1.], dtype=float32)}

  References:
    Micikevicius et al., FP8 Formats for Deep Learning, https://arxiv.org/abs/2209.05433;
    flax.linen.fp8_ops.
  """
  lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
  dtype = check.result_dtype(name, lhs, rhs, preferred_element_type)
  dims = check.dimension_numbers(name, dimension_numbers, lhs, rhs)
  check.recipe(name, recipe)
  check.state(name, recipe, state)
  call = _Call(recipe, dims, dtype, roles)
  return _scaled_dot_general(call, lhs, rhs, {role.value: state[role.value] for role in Role})


def init_state(recipe: Recipe) -> dict[str, TensorState]:
  """Makes the state of a contraction that never ran.

  Args:
    recipe: whose state.

  Returns:
    For each role, ``recipe.init_state(role)`` as JAX arrays.

  Example:
    >>> import flax_fp8 as fp8
    >>> from flax_fp8 import ops
    >>> sorted(ops.init_state(fp8.DelayedScaling()))
    ['input', 'kernel', 'output_grad']
  """
  return {role.value: jax.tree.map(jnp.asarray, recipe.init_state(role)) for role in Role}


_GRADIENT_OF = {Role.INPUT: GemmKind.DGRAD, Role.KERNEL: GemmKind.WGRAD}


@dataclasses.dataclass(frozen=True)
class _Call:
  """What is static about a contraction."""

  recipe: Recipe
  dimension_numbers: DimensionNumbers
  dtype: Any
  roles: Roles


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scaled_dot_general(call: _Call, lhs: jax.Array, rhs: jax.Array, state: State) -> jax.Array:
  return _forward(call, lhs, rhs, state)[0]


def _forward(call: _Call, lhs: jax.Array, rhs: jax.Array, state: State) -> tuple[jax.Array, Any]:
  """Quantises both operands and multiplies; keeps their FP8 copies and what the state will need."""
  (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = call.dimension_numbers
  lhs_axes = (lhs_contract, contraction.kept_axes(lhs.ndim, lhs_contract, lhs_batch))
  rhs_axes = (rhs_contract, contraction.kept_axes(rhs.ndim, rhs_contract, rhs_batch))
  (q_lhs, kept_lhs), lhs_seen = _quantize(call, lhs, state, call.roles[0], lhs_axes)
  (q_rhs, kept_rhs), rhs_seen = _quantize(call, rhs, state, call.roles[1], rhs_axes)
  gemm = contraction.plain_gemm(call.dimension_numbers, lhs.ndim, rhs.ndim)
  out = call.recipe.contract(q_lhs, q_rhs, gemm, GemmKind.FPROP, call.dtype)
  operands = (_Operand.of(lhs), _Operand.of(rhs))
  return out, (kept_lhs, kept_rhs, (lhs_seen, rhs_seen), state, operands)


def _backward(call: _Call, residuals: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array, State]:
  """Quantises the gradient and multiplies it with both kept operands; updates the state."""
  q_lhs, q_rhs, seen, state, (lhs, rhs) = residuals
  to_lhs, to_rhs = contraction.backward_gemms(
    call.dimension_numbers, q_lhs.data.ndim, q_rhs.data.ndim
  )
  axes = (to_lhs.dimension_numbers[0][0], to_rhs.dimension_numbers[0][0])
  (grad_to_lhs, grad_to_rhs), grad_seen = _quantize(call, grad, state, Role.OUTPUT_GRAD, axes)
  lhs_kind, rhs_kind = (_GRADIENT_OF[role] for role in call.roles)
  grad_lhs = call.recipe.contract(grad_to_lhs, q_rhs, to_lhs, lhs_kind, lhs.dtype)
  grad_rhs = call.recipe.contract(grad_to_rhs, q_lhs, to_rhs, rhs_kind, rhs.dtype)
  observed = dict(zip((*call.roles, Role.OUTPUT_GRAD), (*seen, grad_seen), strict=True))
  new_state = _new_state(call.recipe, state, observed)
  return lhs.reduce(grad_lhs), rhs.reduce(grad_rhs), new_state


def _quantize(
  call: _Call, x: jax.Array, state: State, role: Role, axes: tuple[Axes, Axes]
) -> tuple[tuple[QTensor, QTensor], Any]:
  return call.recipe.quantize(x, jax.tree.map(to_float32, state[role.value]), role, axes)


def _new_state(recipe: Recipe, state: State, observed: Mapping[Role, Any]) -> State:
  """Updates the state of each role, as cotangents of the old state."""
  new = {
    role.value: recipe.update(jax.tree.map(to_float32, state[role.value]), seen, role)
    for role, seen in observed.items()
  }
  return jax.tree.map(_as_cotangent, new, state)


def _as_cotangent(new: jax.Array, old: jax.Array) -> jax.Array:
  """Casts a new leaf of the state as the cotangent of the old one."""
  return like(emit_once(new.reshape(old.shape)), old)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Operand:
  """What the backward pass must know of an operand, without keeping the operand."""

  dtype: Any
  varying: frozenset[str]

  @classmethod
  def of(cls, operand: jax.Array) -> _Operand:
    return cls(operand.dtype, _compat.varying_axes(operand))

  def reduce(self, grad: jax.Array) -> jax.Array:
    """Sums a gradient over the mesh axes along which it varies and its operand does not."""
    axes = _compat.varying_axes(grad) - self.varying
    return lax.psum(grad, tuple(sorted(axes))) if axes else grad


_scaled_dot_general.defvjp(_forward, _backward)
