"""Calibration: contractions compute in the dtype of their operands, and recipes record amaxes.

FP8 with scales that are not calibrated yet would lose values, and later layers would never see
them. Calibration therefore computes in high precision. The switch is a JAX user context, which is
part of the compilation cache key. A function compiles to separate programs with and without it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flax_fp8.recipes.base import Recipe, Role, StatefulRecipe, TensorState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
  """How contractions calibrate instead of multiplying in FP8.

  Attributes:
    finalizes: whether to compute the new scale from the stored history instead of recording the
      tensor. Metrics are measured at this scale.
    percentile: percentile of the magnitudes to record as the amax. None records the maximum.
  """

  finalizes: bool = False
  percentile: float | None = None

  def clip(self, x: jax.Array) -> jax.Array:
    """Clips magnitudes to the percentile, in float32. Returns ``x`` unchanged without one."""
    if self.percentile is None or not x.size:
      return x
    x = x.astype(jnp.float32)
    limit = jnp.percentile(jnp.abs(x), self.percentile)
    return jnp.clip(x, -limit, limit)

  def finalize(self, recipe: Recipe, state: TensorState, role: Role) -> TensorState:
    """Returns the state with the scale of the next step. Stateless recipes return it unchanged."""
    if not isinstance(recipe, StatefulRecipe):
      return state
    return recipe.finalize_scale(state, role)


_context: Any = jax.make_user_context(None)


def calibrating(how: Calibration) -> Any:
  """Returns a context manager in which contractions calibrate."""
  return _context(how)


def current() -> Calibration | None:
  """Returns the current calibration; None outside of ``calibrating``."""
  return _context.value
