"""The two steps of every GEMM: quantize the operands, then multiply them.

Both steps have the derivatives of the tensors before quantization, so a backward pass that uses
them can be differentiated again. State has no derivative here, because its gradient is its new
value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from flax_fp8.amax import joined
from flax_fp8.contraction import View
from flax_fp8.meta_dtype import to_float32
from flax_fp8.ops import metrics
from flax_fp8.ops.calibration import Calibration
from flax_fp8.ops.plan import Plan, PlannedGemm, Tensor
from flax_fp8.products import dot_high_precision
from flax_fp8.quantize import QTensor, dequantize
from flax_fp8.recipes.base import Recipe, StatefulRecipe, TensorState
from flax_fp8.sharding import explicit_sharding, in_auto, replicated_as
from flax_fp8.straight_through import QuantizedDType, with_tangent

State: TypeAlias = Mapping[str, TensorState]  # by the values of ``Role``
Quantized: TypeAlias = QTensor | jax.Array  # an array if the GEMM is in high precision


def read(state: TensorState) -> TensorState:
  """Returns the state of a tensor in float32, without a derivative."""
  return {name: lax.stop_gradient(to_float32(leaf)) for name, leaf in state.items()}


def prepare(plan: Plan, state: State, *tensors: Tensor) -> dict[str, TensorState]:
  """Prepares the scales of tensors together. Leaves out tensors that need no preparation."""
  recipe = plan.recipe
  own = {each.role.value: read(state[each.role.value]) for each in tensors if plan.records(each)}
  if not own or not isinstance(recipe, StatefulRecipe):
    return {}
  return recipe.prepare({role: metrics.split(leaves)[0] for role, leaves in own.items()})


def quantize(
  plan: Plan,
  tensor: Tensor,
  x: jax.Array,
  state: TensorState,
  prepared: TensorState | None,
  key: jax.Array | None = None,
  *,
  observed: bool = True,
) -> tuple[tuple[Quantized, Quantized], TensorState]:
  """Readies a tensor for its two GEMMs: in FP8, or unchanged for a high-precision GEMM.

  Args:
    plan: plan of the contraction.
    tensor: the tensor of the plan that ``x`` is the value of.
    x: float32, bfloat16 or float16.
    state: state of the tensor, with its metrics if any; float32 or fp32_max_grad.
    prepared: what ``prepare`` returned for the tensor, if anything.
    key: PRNG key for stochastic rounding, or None.
    observed: whether to observe the tensor.

  Returns:
    The tensor for each GEMM, and what ``record`` needs to know of it.
  """
  recipe, as_is = plan.recipe, plan.in_high_precision(tensor)
  if all(as_is):
    return (x, x), {}
  own, old_metrics = metrics.split(read(state))
  values = lax.stop_gradient(x)
  if plan.calibration is not None:
    return (x, x), _calibrate(plan, plan.calibration, tensor, values, own, old_metrics)
  if prepared is not None and isinstance(recipe, StatefulRecipe):
    q, seen = recipe.quantize_prepared(values, own, prepared, tensor.role, key, observed=observed)
    pair = q, q
  else:
    pair, seen = recipe.quantize(values, own, tensor.role, tensor.views, key, observed=observed)
  if old_metrics and observed:
    seen = {**seen, **_measure(plan, tensor, values, pair, old_metrics)}
  first = x if as_is[0] else _stand_for(recipe, pair[0], x, tensor.views[0])
  if pair[0] is pair[1] and not any(as_is):
    return (first, first), seen
  second = x if as_is[1] else _stand_for(recipe, pair[1], x, tensor.views[1])
  return (first, second), seen


def record(plan: Plan, state: State, seen: Mapping[str, TensorState]) -> dict[str, TensorState]:
  """Returns the new states of all tensors, in float32.

  Args:
    plan: plan of the contraction.
    state: the old states.
    seen: what ``quantize`` returned of each tensor.

  Returns:
    The new states, with metrics if any. The state of a tensor stays unchanged if both of its GEMMs
    are in high precision.
  """
  recipe = plan.recipe
  old = {role: read(leaves) for role, leaves in state.items()}
  own, measured = ({r: metrics.split(s)[part] for r, s in seen.items()} for part in (0, 1))
  recorded = [t.role.value for t in (plan.lhs, plan.rhs, plan.output_grad) if plan.records(t)]
  if isinstance(recipe, StatefulRecipe) and recorded:
    before = {role: metrics.split(old[role])[0] for role in recorded}
    after = recipe.record(before, {role: own[role] for role in before})
    own |= {role: joined(after[role], before[role]) for role in before}
  return {role: {**old[role], **own[role], **measured[role]} for role in seen}


def _calibrate(
  plan: Plan,
  how: Calibration,
  tensor: Tensor,
  x: jax.Array,
  own: TensorState,
  old_metrics: TensorState,
) -> TensorState:
  """Returns the new state of a tensor that is multiplied without quantization."""
  if how.finalizes:
    own = how.finalize(plan.recipe, own, tensor.role)
    if not old_metrics:
      return own
  x = in_auto(how.clip, explicit_sharding(x), x)
  pair, new = plan.recipe.quantize(x, own, tensor.role, tensor.views)
  new = own if how.finalizes else new
  return {**new, **_measure(plan, tensor, x, pair, old_metrics)} if old_metrics else new


def multiply(plan: Plan, planned: PlannedGemm, lhs: Quantized, rhs: Quantized) -> jax.Array:
  """Multiplies two tensors that ``quantize`` prepared.

  The derivative is the derivative of the product of the dequantized tensors, in high precision.
  """
  recipe, gemm, dtype = plan.recipe, planned.gemm, planned.dtype
  if not (isinstance(lhs, QTensor) and isinstance(rhs, QTensor)):
    assert not isinstance(lhs, QTensor)
    assert not isinstance(rhs, QTensor)
    return dot_high_precision(lhs, rhs, gemm, dtype)

  def value(lhs: QTensor, rhs: QTensor) -> jax.Array:
    return recipe.contract(_in_fp8(lhs), _in_fp8(rhs), gemm, planned.kind, dtype)

  def dot(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    wide = jnp.promote_types(jnp.promote_types(lhs.dtype, rhs.dtype), dtype)
    dims = (((2,), (2,)), ((0,), (0,)))
    out = lax.dot_general(lhs.astype(wide), rhs.astype(wide), dims).reshape(gemm.shape)
    return lax.transpose(out, gemm.permutation)

  def product_rule(lhs: QTensor, rhs: QTensor, lhs_dot: Any, rhs_dot: Any) -> jax.Array:
    terms: list[jax.Array] = []
    if lhs_dot is not None:
      left = recipe.in_matrices(QTensor(lhs_dot, lhs.scale), gemm.lhs).data
      terms.append(dot(left, _dequantize(recipe, rhs, gemm.rhs)))
    if rhs_dot is not None:
      right = recipe.in_matrices(QTensor(rhs_dot, rhs.scale), gemm.rhs).data
      terms.append(dot(_dequantize(recipe, lhs, gemm.lhs), right))
    return sum(terms[1:], terms[0]).astype(dtype)

  def tangent(primals: Any, dots: Any) -> jax.Array:
    return in_auto(product_rule, gemm.sharding, *primals, *(dot.data for dot in dots))

  return with_tangent(value, tangent, lhs, rhs)


def _stand_for(recipe: Recipe, q: QTensor, x: jax.Array, view: View) -> QTensor:
  """Gives FP8 data the derivatives of the original tensor."""
  dtype, values = QuantizedDType(q.data.dtype, x.dtype), x.dtype

  def tangent(primals: Any, dots: Any) -> jax.Array:
    data, scale, _ = primals

    def lay_out(x_dot: jax.Array, scale: jax.Array) -> jax.Array:
      data_of = lambda data: recipe.in_matrices(QTensor(data, scale), view).data
      inverse = jax.linear_transpose(data_of, jax.ShapeDtypeStruct(data.shape, values))
      return inverse(view.matrices(x_dot))[0]

    return in_auto(lay_out, explicit_sharding(data), dots[2], scale)

  convert = lambda data, scale, x: lax.convert_element_type(data, dtype)
  return QTensor(with_tangent(convert, tangent, q.data, q.scale, x), q.scale)


def _in_fp8(q: QTensor) -> QTensor:
  dtype: Any = q.data.dtype
  return QTensor(lax.convert_element_type(q.data, dtype.fp8), q.scale)


def _dequantize(recipe: Recipe, q: QTensor, view: View) -> jax.Array:
  """Dequantizes a tensor to ``[batch, kept, contracted]``, with the original's derivatives."""
  stands_for: Any = q.data.dtype
  dtype = stands_for.tangent

  def value(q: QTensor) -> jax.Array:
    matrices = recipe.in_matrices(_in_fp8(q), view)
    return dequantize(matrices.data, matrices.scale, dtype)

  def tangent(primals: Any, dots: Any) -> jax.Array:
    return recipe.in_matrices(QTensor(dots[0].data, primals[0].scale), view).data

  return with_tangent(value, tangent, q)


def _measure(
  plan: Plan, tensor: Tensor, x: jax.Array, pair: tuple[QTensor, QTensor], old: TensorState
) -> TensorState:
  """Measures the metrics of a tensor, only once if both GEMMs use the same scale."""
  recipe = plan.recipe
  seen = [
    (q, v)
    for q, v, kind in zip(pair, tensor.views, tensor.kinds, strict=True)
    if not recipe.is_high_precision(kind)
  ]
  if seen[0][0].scale is seen[-1][0].scale:
    seen = seen[:1]

  def measure(x: jax.Array, tensors: list[QTensor], old: TensorState) -> TensorState:
    views = [view for _, view in seen]
    seen_as = [(recipe.in_matrices(q, v), v) for q, v in zip(tensors, views, strict=True)]
    return metrics.measure(x, seen_as, recipe.float8(tensor.role), old)

  return in_auto(measure, replicated_as(explicit_sharding(x)), x, [q for q, _ in seen], old)
