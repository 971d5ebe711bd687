"""Einsum in FP8: reduces each operand in its own dtype, then runs one FP8 contraction."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_fp8 import contraction, fields
from flax_fp8.contraction import Axes
from flax_fp8.ops import check
from flax_fp8.ops.dot_general import State, contract
from flax_fp8.ops.plan import Plan, make_plan
from flax_fp8.recipes.base import Recipe, Role
from flax_fp8.sharding import transposed


def einsum(
  equation: str,
  lhs: jax.Array,
  rhs: jax.Array,
  *,
  recipe: Recipe,
  state: State,
  preferred_element_type: Any = None,
  out_sharding: Any = None,
  key: jax.Array | None = None,
  name: str = "einsum",
) -> jax.Array:
  """Contracts two arrays in FP8 by an einsum equation, like ``jnp.einsum`` with state.

  Computes ``transpose(dot_general(reduce(lhs), reduce(rhs)))``. Here ``reduce`` takes diagonals and
  sums over labels that occur neither in the other operand nor in the output.

  Args:
    equation: any equation that ``jnp.einsum`` accepts for two operands.
    lhs: left operand, the *input*; float32, bfloat16 or float16.
    rhs: right operand, the *kernel*; float32, bfloat16 or float16.
    recipe: the scaling recipe.
    state: as for ``dot_general``.
    preferred_element_type: dtype of the result. None uses the promoted dtype of the operands.
    out_sharding: as for ``dot_general``.
    key: as for ``dot_general``.
    name: name of the operation in error messages.

  Returns:
    The result; same shape as from ``jnp.einsum``.

  Raises:
    TypeError: as for ``dot_general``, or ``equation`` is not a string.
    ValueError: as for ``dot_general``, or the equation is malformed, does not have two operands, or
      does not match the shapes.

  Numerics:
    Labels are summed in the operand's dtype before the operand is quantized. Otherwise as
    ``dot_general``.

  Example:
    >>> import jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> from flax_fp8 import ops
    >>> recipe = fp8.DelayedScaling()
    >>> x, w = jnp.ones((2, 3, 4)), jnp.ones((2, 4, 5))
    >>> ops.einsum("ebk,ekn->ebn", x, w, recipe=recipe, state=ops.init_state(recipe)).shape
    (2, 3, 5)

  References:
    numpy.einsum; flax.linen.fp8_ops.Fp8Einsum.
  """
  lhs, rhs = check.operand(name, "lhs", lhs), check.operand(name, "rhs", rhs)
  parts = plan_einsum(
    name,
    recipe,
    equation,
    lhs,
    rhs,
    preferred_element_type=preferred_element_type,
    out_sharding=out_sharding,
  )
  return lax.transpose(contract(parts.plan, *parts.operands, state, key), parts.permutation)


@dataclasses.dataclass(frozen=True)
class Einsum:
  """An einsum as one contraction of reduced operands and a transposition.

  Attributes:
    plan: plan of the contraction.
    operands: the reduced operands, in the order of the contraction.
    kernel_reduction: einsum equation that reduces the right operand to the kernel.
    permutation: transposition of the contraction's result.
  """

  plan: Plan
  operands: tuple[jax.Array, jax.Array]
  kernel_reduction: str
  permutation: Axes


def plan_einsum(
  name: str,
  recipe: Recipe,
  equation: Any,
  lhs: jax.Array,
  rhs: jax.Array,
  *,
  preferred_element_type: Any,
  out_sharding: Any,
) -> Einsum:
  """Checks the arguments of ``einsum`` and splits it into its steps."""
  if not isinstance(equation, str):
    raise TypeError(
      f"{name}: the equation must be a string; got {fields.show(equation)}. Pass a string such as "
      "'mk,kn->mn'."
    )
  dtype = check.result_dtype(name, lhs, rhs, preferred_element_type)
  check.recipe(name, recipe)
  parts = contraction.plan_einsum(equation, lhs.shape, rhs.shape, name)
  first, second = jnp.einsum(parts.lhs_reduction, lhs), jnp.einsum(parts.rhs_reduction, rhs)
  roles = (Role.INPUT, Role.KERNEL)
  if parts.swap:
    first, second, roles = second, first, (Role.KERNEL, Role.INPUT)
  wanted = check.canonical_sharding(name, out_sharding, len(parts.permutation))
  wanted = transposed(wanted, np.argsort(parts.permutation).tolist())
  dims = parts.dimension_numbers
  sharding = check.sharding_of_product(name, dims, first, second, wanted)
  plan = make_plan(name, recipe, dims, first, second, roles=roles, dtype=dtype, sharding=sharding)
  return Einsum(plan, (first, second), parts.rhs_reduction, parts.permutation)
