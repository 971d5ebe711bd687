"""The FP8 contraction: one forward GEMM and two backward GEMMs.

The forward pass quantizes and multiplies both operands, and saves them in FP8 for the backward
pass. The backward pass quantizes the output gradient and multiplies it with both. The gradient of
the state is the new state.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from flax_fp8.meta_dtype import like, to_float32
from flax_fp8.ops import check, saved
from flax_fp8.ops.plan import Plan, make_plan
from flax_fp8.ops.quantized import Quantized, State, multiply, prepare, quantize, record
from flax_fp8.recipes.base import Recipe, Role, TensorState
from flax_fp8.state_cast import cast_once, emit_once


def dot_general(
  lhs: jax.Array,
  rhs: jax.Array,
  dimension_numbers: Any,
  *,
  recipe: Recipe,
  state: State,
  preferred_element_type: Any = None,
  out_sharding: Any = None,
  key: jax.Array | None = None,
  name: str = "dot_general",
) -> jax.Array:
  """Contracts two arrays in FP8, like ``lax.dot_general`` with state.

  Computes ``recipe.contract(recipe.quantize(lhs), recipe.quantize(rhs))``. The backward pass
  computes the gradients of both operands in the same way. The gradient with respect to ``state`` is
  the new state.

  Args:
    lhs: left operand, the *input*; float32, bfloat16 or float16.
    rhs: right operand, the *kernel*; float32, bfloat16 or float16.
    dimension_numbers: dimension numbers of ``lax.dot_general``.
    recipe: the scaling recipe.
    state: for each role, the leaves of ``recipe.init_state(role)``; float32 or fp32_max_grad. A
      role may also hold all five metrics ``amax``, ``saturated``, ``flushed``, ``noise`` and
      ``nonfinite``, each of shape ``(1,)``. They are measured if present.
    preferred_element_type: dtype of the result. None uses the promoted dtype of the operands.
    out_sharding: sharding of the result, a ``PartitionSpec`` or ``NamedSharding``. Required only on
      a mesh with explicit axes, where ``lax.dot_general`` requires it too.
    key: PRNG key for recipes that round output gradients stochastically. Required only for
      differentiation.
    name: name of the operation in error messages.

  Returns:
    The product; same shape as from ``lax.dot_general``.

  Raises:
    TypeError: an operand is not float32, bfloat16 or float16; the state is not a mapping of
      mappings, or a leaf of it is not float32 or fp32_max_grad; ``recipe`` is not a recipe, or
      ``key`` is not a key.
    ValueError: the dimension numbers do not match the shapes; the state does not match the recipe;
      the gradient is computed without the key that the recipe needs; the sharding of the result is
      ambiguous on a mesh with explicit axes.

  Numerics:
    GEMMs accumulate in float32. The result is scaled in float32 and then cast to its dtype. If
    mapped (``vmap``) or sharded (``shard_map``) operands share one state, the amax covers all of
    them. Second derivatives are those of the dequantized tensors, multiplied in the dtype of the
    operands.

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
  lhs, rhs = check.operand(name, "lhs", lhs), check.operand(name, "rhs", rhs)
  plan = plan_dot_general(
    name,
    recipe,
    lhs,
    rhs,
    dimension_numbers,
    preferred_element_type=preferred_element_type,
    out_sharding=out_sharding,
  )
  return contract(plan, lhs, rhs, state, key)


def plan_dot_general(
  name: str,
  recipe: Recipe,
  lhs: jax.Array,
  rhs: jax.Array,
  dimension_numbers: Any,
  *,
  preferred_element_type: Any,
  out_sharding: Any,
) -> Plan:
  """Checks the arguments of ``dot_general`` and plans the contraction."""
  dtype = check.result_dtype(name, lhs, rhs, preferred_element_type)
  dims = check.dimension_numbers(name, dimension_numbers, lhs, rhs)
  check.recipe(name, recipe)
  sharding = check.sharding_of_product(name, dims, lhs, rhs, out_sharding)
  return make_plan(name, recipe, dims, lhs, rhs, dtype=dtype, sharding=sharding)


def contract(
  plan: Plan, lhs: jax.Array, rhs: jax.Array, state: State, key: jax.Array | None
) -> jax.Array:
  """Runs a planned contraction. The arguments are those of ``dot_general``."""
  check.state(plan.name, plan.recipe, state)
  if key is not None:
    check.one_key(plan.name, key)
  of_all = {role.value: jax.tree.map(cast_once, dict(state.get(role.value, {}))) for role in Role}
  return _contract(plan, lhs, rhs, of_all, key if plan.recipe.rounds_by_key else None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contract(
  plan: Plan, lhs: jax.Array, rhs: jax.Array, state: State, key: jax.Array | None
) -> jax.Array:
  """Contracts without differentiation: records no state and saves no residuals."""
  del key
  prepared = prepare(plan, state, plan.lhs, plan.rhs)
  operands: list[Quantized] = []
  for operand, x in ((plan.lhs, lhs), (plan.rhs, rhs)):
    role = operand.role.value
    of_tensor = state[role], prepared.get(role)
    (q, _), _ = quantize(plan, operand, x, *of_tensor, observed=False)
    operands.append(q)
  return multiply(plan, plan.fprop, *operands)


def _forward(
  plan: Plan, lhs: jax.Array, rhs: jax.Array, state: State, key: jax.Array | None
) -> tuple[jax.Array, Any]:
  """Quantizes and multiplies both operands. Saves them and their amaxes for the backward pass."""
  now: list[Quantized] = []
  later: list[Quantized] = []
  seen: dict[str, TensorState] = {}
  prepared = prepare(plan, state, plan.lhs, plan.rhs, plan.output_grad)
  prepared = saved.name(prepared, saved.ONCE)
  for operand, x in ((plan.lhs, lhs), (plan.rhs, rhs)):
    role = operand.role.value
    of_tensor = state[role], prepared.get(role)
    (forward, backward), of_operand = quantize(plan, operand, x, *of_tensor)
    if operand.role is Role.KERNEL:
      forward, of_operand = saved.name((forward, of_operand), saved.ONCE)
    now.append(forward)
    seen[role] = of_operand
    later.append(saved.name(backward, saved.OF_ROLE[operand.role]))
  out = multiply(plan, plan.fprop, *now)
  is_batched = bool(plan.fprop.gemm.lhs.batch)
  out = saved.name(out, saved.BATCHED_OUTPUT if is_batched else saved.OUTPUT)
  scalars = saved.pack((seen, prepared.get(Role.OUTPUT_GRAD.value)))
  return out, (*later, state, saved.name(scalars, saved.SCALARS), key)


def _backward(
  plan: Plan, residuals: Any, grad: jax.Array
) -> tuple[jax.Array, jax.Array, State, None]:
  """Quantizes the output gradient, multiplies it with both operands, and records all tensors."""
  q_lhs, q_rhs, state, scalars, key = residuals
  seen, prepared = saved.unpack(scalars)
  if plan.rounds_gradients:
    check.key(plan.name, plan.recipe, key)
  role = Role.OUTPUT_GRAD.value
  quantized = quantize(plan, plan.output_grad, grad, state[role], prepared, key)
  (grad_for_lhs, grad_for_rhs), of_grad = quantized
  lhs_grad = multiply(plan, plan.lhs_gemm, grad_for_lhs, q_rhs)
  rhs_grad = multiply(plan, plan.rhs_gemm, grad_for_rhs, q_lhs)
  new = record(plan, state, {**seen, role: of_grad})
  new = {role: _as_cotangent(new[role], state[role]) for role in state}
  if axes := plan.summed_axes():
    new = jax.tree.map(lambda leaf: like(emit_once(to_float32(leaf), axes), leaf), new)
  return plan.lhs.reduce(lhs_grad), plan.rhs.reduce(rhs_grad), new, None


def _as_cotangent(new: TensorState, old: TensorState) -> TensorState:
  """Casts and reshapes a new state into a cotangent of the old state."""
  return jax.tree.map(lambda new, old: like(new.reshape(old.shape), old), new, dict(old))


_contract.defvjp(_forward, _backward)


def init_state(recipe: Recipe) -> dict[str, TensorState]:
  """Creates the initial state of a contraction.

  Args:
    recipe: the recipe of the contraction.

  Returns:
    For each role, ``recipe.init_state(role)`` as JAX arrays.

  Raises:
    TypeError: ``recipe`` is not a recipe.

  Example:
    >>> import flax_fp8 as fp8
    >>> from flax_fp8 import ops
    >>> sorted(ops.init_state(fp8.DelayedScaling()))
    ['input', 'kernel', 'output_grad']
  """
  check.recipe("init_state", recipe)
  return {role.value: jax.tree.map(jnp.asarray, recipe.init_state(role)) for role in Role}
