"""What a run is called, and what its GEMMs are: ``"bf16"``, or a recipe's name for FP8 with it.

``"delayed-fused"`` is FP8 with the fused projections of ``flax_fp8``, from the same parameters;
``"delayed-converted"`` is FP8 by ``fp8_linear_layers`` of the model of BF16.

``"delayed-float16"`` computes in float16 what else is BF16, with loss scaling; ``"float16"`` is the
same without FP8.

``"bf16-again"`` is BF16 from initial parameters that were rounded to bfloat16: how far its loss is
from BF16's is how far two runs drift apart by a rounding, whatever its kind.
"""

from collections.abc import Iterable
from typing import TypeAlias

import flax_fp8 as fp8
from lm.errors import UsageError

Run: TypeAlias = str

BF16: Run = "bf16"
BF16_AGAIN: Run = "bf16-again"
FLOAT16: Run = "float16"
ALL = "all"
FUSED, CONVERTED, IN_FLOAT16 = "-fused", "-converted", f"-{FLOAT16}"
RECIPE_CHOICES = (*fp8.RECIPES, ALL)


def in_float16(run: Run) -> Run:
  """The same run, computed in float16."""
  return FLOAT16 if run == BF16 else run + IN_FLOAT16


def is_float16(run: Run) -> bool:
  """Whether the run computes in float16, and scales its loss."""
  return run == FLOAT16 or run.endswith(IN_FLOAT16)


def fused(run: Run) -> Run:
  """The run of the same recipe with fused projections."""
  return run + FUSED


def is_fused(run: Run) -> bool:
  """Whether the run's projections are fused."""
  return run.removesuffix(IN_FLOAT16).endswith(FUSED)


def converted(run: Run) -> Run:
  """The run of the same recipe with the twin of an unmodified model."""
  return run + CONVERTED


def is_converted(run: Run) -> bool:
  """Whether the run's model is the twin of an unmodified one."""
  return run.removesuffix(IN_FLOAT16).endswith(CONVERTED)


def recipe_name(run: Run) -> str:
  """The recipe's name, however its projections are made; runs without FP8 keep theirs."""
  return run.removesuffix(IN_FLOAT16).removesuffix(FUSED).removesuffix(CONVERTED)


def recipe_of(run: Run) -> fp8.Recipe | None:
  """The recipe of the projections' GEMMs; None without FP8."""
  return None if run in (BF16, BF16_AGAIN, FLOAT16) else fp8.get_recipe(recipe_name(run))


def label(run: Run) -> str:
  """What a run is called where people read it: ``BF16``, ``FP8 delayed``, ``FP8 delayed fused``."""
  whole = {BF16: "BF16", BF16_AGAIN: "BF16 again", FLOAT16: "float16"}
  return whole.get(run, f"FP8 {run.replace('-', ' ')}")


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
