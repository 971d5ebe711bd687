"""Inference with a kernel that is quantized in advance. Updates no state.

The results equal the forward pass of ``ops.dot_general`` and ``ops.einsum`` bit for bit.
``quantize_kernel`` runs once, and ``contract_frozen`` runs for each input.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_fp8.contraction import View
from flax_fp8.ops.plan import Operand, Plan
from flax_fp8.ops.quantized import State, multiply, prepare, quantize
from flax_fp8.quantize import QTensor
from flax_fp8.straight_through import QuantizedDType


def quantize_kernel(plan: Plan, kernel: jax.Array, state: State) -> QTensor:
  """Quantizes a kernel for the forward GEMM.

  Args:
    plan: plan of the contraction. Its recipe scales the kernel.
    kernel: float32, bfloat16 or float16; the dtype that the contraction would use.
    state: state of the contraction.

  Returns:
    Data and scale in the recipe's layout. If the data has the kernel's own axes, the contracted
    axes are moved last. FP8 GEMMs of NVIDIA GPUs before Blackwell support only this order.
  """
  operand = kernel_operand(plan)
  own = state.get(operand.role.value, {})
  (q, _), _ = plan.recipe.quantize(kernel, own, operand.role, operand.views, observed=False)
  if plan.recipe.in_gemm_layout:
    return q
  return QTensor(lax.transpose(q.data, _order(operand.views[0])), q.scale)


def contract_frozen(plan: Plan, x: jax.Array, kernel: QTensor, state: State) -> jax.Array:
  """Contracts an input with a quantized kernel.

  Args:
    plan: plan of the contraction.
    x: the input; float32, bfloat16 or float16.
    kernel: the result of ``quantize_kernel``.
    state: state of the input.

  Returns:
    The product.
  """
  operand, other = plan.rhs if plan.kernel_is_left else plan.lhs, kernel_operand(plan)
  role = operand.role.value
  prepared = prepare(plan, state, operand).get(role)
  (q, _), _ = quantize(plan, operand, x, state.get(role, {}), prepared, observed=False)
  data = kernel.data
  if not plan.recipe.in_gemm_layout:
    data = lax.transpose(data, np.argsort(_order(other.views[0])).tolist())
  dtype = QuantizedDType(data.dtype, jnp.dtype(other.dtype))
  frozen = QTensor(lax.convert_element_type(data, dtype), kernel.scale)
  operands = (frozen, q) if plan.kernel_is_left else (q, frozen)
  return multiply(plan, plan.fprop, *operands)


def contract_as_is(plan: Plan, x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Contracts in the dtype of the operands, for recipes with a high-precision forward GEMM."""
  operands = (kernel, x) if plan.kernel_is_left else (x, kernel)
  return multiply(plan, plan.fprop, *operands)


def kernel_operand(plan: Plan) -> Operand:
  """Returns the operand that is the kernel."""
  return plan.lhs if plan.kernel_is_left else plan.rhs


def _order(view: View) -> tuple[int, ...]:
  return view.batch + view.kept + view.contracting
