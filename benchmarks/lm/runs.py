"""A run's name says how it computes.

``bf16`` and ``float16`` have no FP8. A recipe's name, such as ``delayed``, has FP8 with that
recipe. Words after it change the run: ``delayed-fused`` has fused projections,
``delayed-converted`` converts the BF16 model with ``fp8_linear_layers``, and ``delayed-float16``
computes activations in float16 with loss scaling. ``bf16-perturbed`` starts from parameters that
are changed by 2.6 %, as E4M3 rounds. Its gap to ``bf16`` shows how far chance moves a run.
"""

from collections.abc import Iterable
from typing import TypeAlias

import flax_fp8 as fp8

Run: TypeAlias = str

BF16, FLOOR, FLOAT16 = "bf16", "bf16-perturbed", "float16"
FUSED, CONVERTED = "fused", "converted"
ALL = "all"
RECIPE_CHOICES = (*fp8.RECIPES, ALL)


def has(run: Run, word: str) -> bool:
  return word in run.split("-")


def recipe_name(run: Run) -> str:
  return run.split("-")[0]


def recipe_of(run: Run) -> fp8.Recipe | None:
  """The recipe of the projections; None without FP8."""
  name = recipe_name(run)
  return fp8.get_recipe(name) if name in fp8.RECIPES else None


def label(run: Run) -> str:
  """The name in tables and plots: ``BF16``, ``FP8 delayed fused``."""
  words = run.replace(BF16, "BF16").replace("-", " ")
  return f"FP8 {words}" if recipe_of(run) else words


def named_recipes(names: Iterable[str]) -> tuple[Run, ...]:
  """Each named recipe once; ``"all"`` names every recipe."""
  names = tuple(names)
  return tuple(fp8.RECIPES) if ALL in names else tuple(dict.fromkeys(names))
