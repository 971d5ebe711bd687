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
from flax_fp8.contraction import DimensionNumbers, Gemm
from flax_fp8.meta_dtype import like, to_float32
from flax_fp8.ops import check
from flax_fp8.recipes.base import GemmKind, Recipe, Role, TensorState

State: TypeAlias = Mapping[str, TensorState]


def dot_general(
  lhs: jax.Array,
  rhs: jax.Array,
  dimension_numbers: Any,
  *,
  recipe: Recipe,
  state: State,
  preferred_element_type: Any = None,
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
  check.state(name, recipe, state)
  return _scaled_dot_general(recipe, dims, dtype, lhs, rhs, {r.value: state[r.value] for r in Role})


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _scaled_dot_general(
  recipe: Recipe, dims: DimensionNumbers, dtype: Any, lhs: jax.Array, rhs: jax.Array, state: State
) -> jax.Array:
  return _forward(recipe, dims, dtype, lhs, rhs, state)[0]


def _forward(
  recipe: Recipe, dims: DimensionNumbers, dtype: Any, lhs: jax.Array, rhs: jax.Array, state: State
) -> tuple[jax.Array, Any]:
  (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dims
  lhs_axes = (lhs_contract, contraction.kept_axes(lhs.ndim, lhs_contract, lhs_batch))
  rhs_axes = (rhs_contract, contraction.kept_axes(rhs.ndim, rhs_contract, rhs_batch))
  as_float = jax.tree.map(to_float32, state)
  q_lhs, lhs_seen = recipe.quantize(lhs, as_float["input"], Role.INPUT, lhs_axes)
  q_rhs, rhs_seen = recipe.quantize(rhs, as_float["kernel"], Role.KERNEL, rhs_axes)
  out = recipe.contract(q_lhs[0], q_rhs[0], dims, GemmKind.FPROP)
  operands = (_Operand.of(lhs), _Operand.of(rhs))
  return out.astype(dtype), (q_lhs[1], q_rhs[1], lhs_seen, rhs_seen, state, operands)


def _backward(
  recipe: Recipe, dims: DimensionNumbers, dtype: Any, residuals: Any, grad: jax.Array
) -> tuple[jax.Array, jax.Array, State]:
  del dtype
  q_lhs, q_rhs, lhs_seen, rhs_seen, state, (lhs, rhs) = residuals
  as_float = jax.tree.map(to_float32, state)
  dgrad, wgrad = contraction.backward_gemms(dims, q_lhs.data.ndim, q_rhs.data.ndim)
  grad_axes = (dgrad.dimension_numbers[0][0], wgrad.dimension_numbers[0][0])
  q_grad, grad_seen = recipe.quantize(grad, as_float["output_grad"], Role.OUTPUT_GRAD, grad_axes)

  def gemm(gemm: Gemm, kind: GemmKind, q_grad: Any, q_operand: Any) -> jax.Array:
    out = recipe.contract(q_grad, q_operand, gemm.dimension_numbers, kind)
    return lax.transpose(out, gemm.permutation)

  grad_lhs = lhs.reduce(gemm(dgrad, GemmKind.DGRAD, q_grad[0], q_rhs))
  grad_rhs = rhs.reduce(gemm(wgrad, GemmKind.WGRAD, q_grad[1], q_lhs))
  seen = {"input": lhs_seen, "kernel": rhs_seen, "output_grad": grad_seen}
  new = {r.value: recipe.update(as_float[r.value], seen[r.value], r) for r in Role}
  return grad_lhs, grad_rhs, jax.tree.map(_as_cotangent, new, state)


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
    """Casts a gradient to its operand's dtype and sums it over axes where the operand is one."""
    grad = grad.astype(self.dtype)
    axes = _compat.varying_axes(grad) - self.varying
    return lax.psum(grad, tuple(sorted(axes))) if axes else grad


_scaled_dot_general.defvjp(_forward, _backward)
