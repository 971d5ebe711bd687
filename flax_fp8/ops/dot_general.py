"""The contraction: one GEMM forward, two backward, the new state leaving as the old one's gradient.

Forward, both operands are quantised and multiplied; what the backward GEMMs need is kept in FP8
only. Backward, the output gradient is quantised once and multiplied twice.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from flax_fp8.amax import emit_once
from flax_fp8.contraction import Gemm, View
from flax_fp8.meta_dtype import as_written, like, to_float32
from flax_fp8.ops import calibration, check, metrics, saved
from flax_fp8.ops.call import Call, Operand, Roles
from flax_fp8.products import dot_high_precision
from flax_fp8.quantize import QTensor
from flax_fp8.recipes.base import GemmKind, Recipe, Role, TensorState
from flax_fp8.sharding import explicit_sharding, in_auto, replicated_as

State: TypeAlias = Mapping[str, TensorState]
Quantized: TypeAlias = QTensor | jax.Array  # an array where the GEMM is in high precision


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
  roles: Roles = (Role.INPUT, Role.KERNEL),
  kernel_is_stored: bool = False,
  kernel_dtype: Any = None,
  in_loop: bool = False,
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
      Beside them there may be the metrics ``amax``, ``saturated``, ``flushed``, ``noise`` and
      ``nonfinite``, all five, ``(1,)``: where they are there, they are measured.
    preferred_element_type: dtype of the result; the promoted dtype of the operands if None.
    out_sharding: of the result, a ``PartitionSpec`` or ``NamedSharding``; needed on a mesh with
      explicit axes alone, and there where ``lax.dot_general`` needs it.
    key: PRNG key, by which a recipe that asks for it rounds output gradients stochastically; needed
      for differentiation alone.
    roles: what ``lhs`` and ``rhs`` are; exchanged for a GEMM that takes the kernel first.
    kernel_is_stored: whether the kernel is a parameter, read from memory, that nothing computes:
      then it is kept for the backward pass as it is.
    kernel_dtype: to which the kernel is cast before all else; as it is if None.
    in_loop: whether operands and state are slices, as in the body of a scan.
    name: what error messages call the operation.

  Returns:
    The product; shape as ``lax.dot_general``.

  Raises:
    TypeError: an operand is not float32, bfloat16 or float16; a leaf of the state is not float32
      or fp32_max_grad; ``recipe`` is no recipe.
    ValueError: dimension numbers do not fit the shapes; the state is not the recipe's; the gradient
      is taken without the key that the recipe asks for; on a mesh with explicit axes, the sharding
      of the result is ambiguous.

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
  used_lhs, used_rhs = (
    x.astype(kernel_dtype) if role is Role.KERNEL and kernel_dtype is not None else x
    for x, role in zip((lhs, rhs), roles, strict=True)
  )
  dtype = check.result_dtype(name, used_lhs, used_rhs, preferred_element_type)
  dims = check.dimension_numbers(name, dimension_numbers, lhs, rhs)
  check.recipe(name, recipe)
  check.state(name, recipe, state)
  call = Call(
    recipe=recipe,
    dimension_numbers=dims,
    dtypes=(used_lhs.dtype, used_rhs.dtype),
    dtype=dtype,
    sharding=check.sharding_of_product(name, dims, lhs, rhs, out_sharding),
    roles=roles,
    kernel_is_stored=kernel_is_stored,
    kernels_once=saved.are_kernels_once(),
    in_loop=in_loop,
    name=name,
    calibration=calibration.current(),
  )
  used = {role.value: state.get(role.value, {}) for role in Role}
  return _scaled_dot_general(call, lhs, rhs, used, key if recipe.rounds_by_key else None)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scaled_dot_general(
  call: Call, lhs: jax.Array, rhs: jax.Array, state: State, key: jax.Array | None
) -> jax.Array:
  return _forward(call, lhs, rhs, state, key, alone=True)[0]


_NAMES = {Role.INPUT: saved.INPUT, Role.KERNEL: saved.KERNEL}


def _forward(
  call: Call,
  lhs: jax.Array,
  rhs: jax.Array,
  state: State,
  key: jax.Array | None,
  *,
  alone: bool = False,
) -> tuple[jax.Array, Any]:
  """Quantises both operands and multiplies; keeps what the backward pass takes of them.

  Alone, without a backward pass, nothing is observed. A stored kernel is kept as it is, and
  quantised again: in a loop, keeping it in FP8 would take memory. There XLA can't merge the two,
  and one pass over the kernel makes less of it than the other: the observation is the backward's.
  """
  given, operands = (lhs, rhs), (Operand.of(lhs), Operand.of(rhs))
  prepared = {role: saved.name_once(own) for role, own in _prepare(call, state).items()}
  tensors: list[Quantized] = []
  kept: list[Quantized] = []
  seen: list[tuple[Any, ...]] = []
  for index, role in enumerate(call.roles):
    is_again = call.is_again(index)
    observed = not alone and not (is_again and call.in_loop)
    (now, again), saw = _quantize_operand(
      call, index, given[index], operands, state, prepared, observed=observed
    )
    tensors.append(saved.name_once(now) if role is Role.KERNEL else now)
    kept.append(given[index] if is_again else saved.name(again, _NAMES[role]))
    seen.append(saw)
  gemm = call.forward_gemm(operands).sharded(call.sharding)
  out = _contract(call.recipe, tensors[0], tensors[1], gemm, GemmKind.FPROP, call.dtype)
  out = saved.name(out, saved.BATCHED_OUTPUT if gemm.lhs.batch else saved.OUTPUT)
  later = (Role.KERNEL, Role.OUTPUT_GRAD) if call.is_again(call.kernel) else (Role.OUTPUT_GRAD,)
  added = {role.value: _added(prepared[role], state[role.value]) for role in later}
  seen, added = saved.name((seen, added), saved.SCALARS)
  return out, (kept, seen, state, added, key, operands)


def _backward(
  call: Call, residuals: Any, grad: jax.Array
) -> tuple[jax.Array, jax.Array, State, None]:
  """Quantises the gradient and multiplies it with both kept operands; updates the state."""
  kept, seen, state, added, key, operands = residuals
  prepared = {role: {**_own(state, role), **added.get(role.value, {})} for role in Role}
  if call.is_again(i := call.kernel):
    kept[i], seen[i] = _quantize_again(call, kept[i], seen[i], operands, state, prepared)
  (q_lhs, q_rhs), (lhs, rhs) = kept, operands
  if call.calibration is None:
    check.key(call.name, call.recipe, key)
  to_lhs, to_rhs = call.backward_gemms(operands)
  lhs_kind, rhs_kind = call.backward_kinds
  (by_rhs, by_lhs), grad_seen = _quantize(
    call,
    grad,
    state,
    prepared,
    Role.OUTPUT_GRAD,
    (lhs_kind, rhs_kind),
    (to_lhs.lhs, to_rhs.lhs),
    key,
  )
  to_lhs, to_rhs = to_lhs.sharded(lhs.sharding), to_rhs.sharded(rhs.sharding)
  grad_lhs = _contract(call.recipe, by_rhs, q_rhs, to_lhs, lhs_kind, call.dtypes[0])
  grad_rhs = _contract(call.recipe, by_lhs, q_lhs, to_rhs, rhs_kind, call.dtypes[1])
  observed = dict(zip((*call.roles, Role.OUTPUT_GRAD), (*seen, grad_seen), strict=True))
  new_state = _new_state(call, state, observed)
  return lhs.reduce(grad_lhs), rhs.reduce(grad_rhs), new_state, None


def _quantize_operand(
  call: Call,
  index: int,
  x: jax.Array,
  operands: tuple[Operand, Operand],
  state: State,
  prepared: Mapping[Role, TensorState],
  *,
  observed: bool = True,
) -> tuple[tuple[Quantized, Quantized], tuple[Any, ...]]:
  """Prepares the left operand, 0, or the right one, 1, for its two GEMMs."""
  gemm, backward = call.forward_gemm(operands), call.backward_gemms(operands)[1 - index]
  kinds = GemmKind.FPROP, call.backward_kinds[1 - index]
  views = (gemm.lhs, gemm.rhs)[index], backward.rhs
  x, role = x.astype(call.dtypes[index]), call.roles[index]
  return _quantize(call, x, state, prepared, role, kinds, views, observed=observed)


def _quantize_again(
  call: Call,
  kernel: jax.Array,
  seen: tuple[Any, ...],
  operands: tuple[Operand, Operand],
  state: State,
  prepared: Mapping[Role, TensorState],
) -> tuple[Quantized, tuple[Any, ...]]:
  """Quantises a kernel that was kept as it is for its backward GEMM.

  Returns:
    The tensor; and what was seen of it, here where the forward pass left that open.
  """
  observation = seen[0] if seen else None
  recalled = {**prepared[Role.KERNEL], **(observation or {})}
  prepared = {**prepared, Role.KERNEL: recalled}
  (_, again), saw = _quantize_operand(call, call.kernel, kernel, operands, state, prepared)
  return again, (saw[0], seen[1]) if saw and observation is None else seen


def _prepare(call: Call, state: State) -> dict[Role, TensorState]:
  """Prepares the state of each tensor without its metrics, for its quantization."""
  return {**call.recipe.prepare({role: _own(state, role) for role in Role})}


def _added(prepared: TensorState, own: Mapping[str, Any]) -> TensorState:
  """Returns what preparing has added to a state."""
  return {key: leaf for key, leaf in prepared.items() if key not in own}


def _own(state: State, role: Role) -> TensorState:
  """Returns the state of a tensor, float32, without its metrics."""
  return metrics.split(jax.tree.map(to_float32, state[role.value]))[0]


def _quantize(
  call: Call,
  x: jax.Array,
  state: State,
  prepared: Mapping[Role, TensorState],
  role: Role,
  kinds: tuple[GemmKind, GemmKind],
  views: tuple[View, View],
  key: jax.Array | None = None,
  *,
  observed: bool = True,
) -> tuple[tuple[Quantized, Quantized], tuple[Any, ...]]:
  """Prepares a tensor for its two GEMMs: in FP8, or as it is for one in high precision.

  Returns:
    The tensor for each; and the recipe's observation with the metrics, none where neither GEMM is
    in FP8.
  """
  recipe, how = call.recipe, call.calibration
  whole = [recipe.is_high_precision(kind) for kind in kinds]
  _, old_metrics = metrics.split(jax.tree.map(to_float32, state[role.value]))
  settles = how is not None and how.settles
  if all(whole) or (settles and not old_metrics):
    return (x, x), ()
  clipped = x if how is None else in_auto(how.clip, explicit_sharding(x), x)
  pair, seen = recipe.quantize(clipped, prepared[role], role, views, key, observed=observed)
  measured: TensorState = {}
  if old_metrics:
    used = [(q, v) for is_whole, q, v in zip(whole, pair, views, strict=True) if not is_whole]
    measured = _measure(recipe, clipped, used, role, old_metrics)
  if how is not None:
    return (x, x), (seen, measured)
  first, second = (x if is_whole else q for is_whole, q in zip(whole, pair, strict=True))
  return (first, second), (seen, measured)


def _measure(
  recipe: Recipe, x: jax.Array, used: list[tuple[QTensor, View]], role: Role, old: TensorState
) -> TensorState:
  """Measures the metrics of a tensor; once, where both GEMMs take values of one scale."""
  if used[0][0].scale is used[-1][0].scale:
    used = used[:1]

  def measure(x: jax.Array, tensors: list[QTensor], old: TensorState) -> TensorState:
    views = [view for _, view in used]
    matrices = [recipe.in_matrices(q, v, x.shape) for q, v in zip(tensors, views, strict=True)]
    return metrics.measure(x, list(zip(matrices, views, strict=True)), recipe.float8(role), old)

  sharding = replicated_as(explicit_sharding(x))
  return in_auto(measure, sharding, x, [q for q, _ in used], old)


def _contract(
  recipe: Recipe, lhs: Quantized, rhs: Quantized, gemm: Gemm, kind: GemmKind, dtype: Any
) -> jax.Array:
  """Multiplies two tensors as ``_quantize`` prepared them."""
  if isinstance(lhs, QTensor) and isinstance(rhs, QTensor):
    return recipe.contract(lhs, rhs, gemm, kind, dtype)
  assert not isinstance(lhs, QTensor)
  assert not isinstance(rhs, QTensor)
  return dot_high_precision(lhs, rhs, gemm, dtype)


def _new_state(call: Call, state: State, observed: Mapping[Role, tuple[Any, ...]]) -> State:
  """Updates the state of each role that was observed, as cotangents of the old state."""
  recipe, settles = call.recipe, call.calibration is not None and call.calibration.settles
  new: dict[str, TensorState] = {}
  for role, seen in observed.items():
    own, old_metrics = metrics.split(jax.tree.map(to_float32, state[role.value]))
    observation, measured = seen or (None, old_metrics)
    if settles:
      own = recipe.settle(own, role)
    elif seen:
      own = recipe.update(own, observation, role)
    new[role.value] = {**own, **measured}
  return jax.tree.map(_as_cotangent, new, dict(state))


def _as_cotangent(new: jax.Array, old: jax.Array) -> jax.Array:
  """Casts a new leaf of the state as the cotangent of the old one."""
  new = new.reshape(old.shape)
  emitted = emit_once(new)
  cotangent = like(emitted, old)
  return as_written(cotangent) if emitted is new else cotangent


_scaled_dot_general.defvjp(_forward, _backward)
