"""Einsum in FP8: reductions of each operand in its own dtype, then one contraction."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_fp8.contraction import plan_einsum
from flax_fp8.ops import check
from flax_fp8.ops.dot_general import State, dot_general
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
  kernel_is_stored: bool = False,
  in_loop: bool = False,
  name: str = "einsum",
) -> jax.Array:
  """Contracts two arrays in FP8 by an einsum equation; ``jnp.einsum`` with state.

  ``transpose(dot_general(reduce(lhs), reduce(rhs)))``, where ``reduce`` takes diagonals and sums
  out the labels that neither the other operand nor the output has.

  Args:
    equation: any that ``jnp.einsum`` takes for two operands.
    lhs: left operand, the *input*; float32, bfloat16 or float16.
    rhs: right operand, the *kernel*; float32, bfloat16 or float16.
    recipe: how to scale.
    state: as for ``dot_general``.
    preferred_element_type: dtype of the result; the promoted dtype of the operands if None.
    out_sharding: as for ``dot_general``.
    key: as for ``dot_general``.
    kernel_is_stored: as for ``dot_general``.
    in_loop: as for ``dot_general``.
    name: what error messages call the operation.

  Returns:
    The contraction; shape as ``jnp.einsum``.

  Raises:
    TypeError: as for ``dot_general``, or ``equation`` is no string.
    ValueError: as for ``dot_general``, or the equation is malformed, has not two operands, or does
      not fit the shapes.

  Numerics:
    Labels are summed out in the operand's dtype before it is quantised. Else as ``dot_general``.

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
  if not isinstance(equation, str):
    raise TypeError(
      f"{name}: the equation must be a string; got {equation!r}. Write it as 'mk,kn->mn'."
    )
  lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
  dtype = check.result_dtype(name, lhs, rhs, preferred_element_type)
  plan = plan_einsum(equation, lhs.shape, rhs.shape)
  first = jnp.einsum(plan.lhs_reduction, lhs), Role.INPUT
  second = jnp.einsum(plan.rhs_reduction, rhs), Role.KERNEL
  if plan.swap:
    first, second = second, first
  sharding = check.canonical_sharding(name, out_sharding, len(plan.permutation))
  out = dot_general(
    first[0],
    second[0],
    plan.dimension_numbers,
    recipe=recipe,
    state=state,
    preferred_element_type=dtype,
    out_sharding=transposed(sharding, np.argsort(plan.permutation).tolist()),
    key=key,
    roles=(first[1], second[1]),
    kernel_is_stored=kernel_is_stored,
    in_loop=in_loop,
    name=name,
  )
  return lax.transpose(out, plan.permutation)
