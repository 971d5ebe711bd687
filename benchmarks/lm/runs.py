"""What a run is called, and what its GEMMs are: ``"bf16"``, or a recipe's name for FP8 with it."""

from collections.abc import Iterable
from typing import TypeAlias

import flax_fp8 as fp8
from lm.errors import UsageError

Run: TypeAlias = str

BF16: Run = "bf16"
ALL = "all"
RECIPE_CHOICES = (*fp8.RECIPES, ALL)


def recipe_of(run: Run) -> fp8.Recipe | None:
  """The recipe of the projections' GEMMs; None for BF16."""
  return None if run == BF16 else fp8.get_recipe(run)


def label(run: Run) -> str:
  """What a run is called where people read it: ``BF16``, ``FP8 delayed``."""
  return "BF16" if run == BF16 else f"FP8 {run}"


def named_recipes(names: Iterable[str]) -> tuple[Run, ...]:
  """Every recipe that is named, once; ``"all"`` names all there are."""
  names = tuple(names)
  return tuple(fp8.RECIPES) if ALL in names else tuple(dict.fromkeys(names))


def require_fp8_hardware(runs: Iterable[Run]) -> None:
  """Raises where the FP8 of a run would be a slow surprise."""
  refusals = []
  for run in runs:
    if (recipe := recipe_of(run)) is not None:
      supported, reason = fp8.capability(recipe=recipe)
      refusals += [] if supported else [f"{label(run)} on {reason}"]
  if refusals:
    raise UsageError(
      "--recipe: the device must multiply the FP8 that the recipe needs, or be a CPU; got "
      f"{', '.join(refusals)}. Use another recipe, another GPU, or JAX_PLATFORMS=cpu."
    )
