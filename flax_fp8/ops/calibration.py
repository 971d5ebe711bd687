"""Calibration: contractions compute in the dtype of their operands while recipes observe.

State is observed in high precision, for what FP8 loses at scales that are not right yet, no later
layer would see. The switch is a context that JAX's compilation caches know of, so that a function
compiled under it and the same function without it are two programs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flax_fp8.recipes.base import Recipe, Role, StatefulRecipe, TensorState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
  """What contractions do instead of multiplying in FP8.

  Attributes:
    finalizes: whether the new state is the old one with the scale that its history implies, instead
      of one that recorded the tensor; metrics are those at that scale.
    percentile: that of the magnitudes which is recorded as the largest; None for the largest.
  """

  finalizes: bool = False
  percentile: float | None = None

  def clip(self, x: jax.Array) -> jax.Array:
    """Limits magnitudes to their percentile; float32 where there is one."""
    if self.percentile is None or not x.size:
      return x
    x = x.astype(jnp.float32)
    limit = jnp.percentile(jnp.abs(x), self.percentile)
    return jnp.clip(x, -limit, limit)

  def finalize(self, recipe: Recipe, state: TensorState, role: Role) -> TensorState:
    """Returns the state with the scale that the next step would use; as it is without a scale."""
    if not isinstance(recipe, StatefulRecipe):
      return state
    return recipe.finalize_scale(state, role)


_context: Any = jax.make_user_context(None)


def calibrating(how: Calibration) -> Any:
  """Makes the context in which contractions calibrate; for a ``with`` statement."""
  return _context(how)


def current() -> Calibration | None:
  """Returns how contractions calibrate here; None where they don't."""
  return _context.value
