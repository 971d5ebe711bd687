"""What is compared: arms, each paired with a BF16 arm, and the questions that they answer."""

import dataclasses
import functools
from typing import Any

from flax.linen import fp8_ops as flax_fp8_ops

import flax_fp8 as fp8
from flax_fp8 import formats
from lm.step import FP8_SIZED
from trials.rounding import RoundedDot

GATES = 16  # of a trial, at equal distances


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
  """One way to train. All arms of a seed start from the same parameters, on the same batches."""

  name: str
  config: fp8.Fp8Config | None = None  # of the conversion to FP8; None for BF16
  dot_general_cls: Any = None  # of a BF16 model whose operands are rounded
  gates: range = range(GATES)  # the stretches in FP8; the others are in BF16
  # relative size of a random change of the initial parameters
  perturbed: float = 0.0
  learning_rate: float = 1.0  # as a multiple of the preset's
  spikes: bool = False  # one batch in eight has a loss that is 4,096 times as large
  keep_state: bool = True  # False resets scales and histories after each step
  base: str = "bf16"  # the arm whose loss is subtracted


def fp8_arm(name: str, recipe: fp8.Recipe, *, exclude: Any = (), **named: Any) -> Arm:
  """An arm whose projections are in FP8, except the excluded ones."""
  return Arm(name=name, config=fp8.Fp8Config(recipe=recipe, exclude=exclude), **named)


DELAYED = fp8.DelayedScaling()
E5M2 = fp8.Format(formats.E5M2, formats.E5M2)
ONE_ULP = 2.0**-23

BF16 = Arm(name="bf16")
SPIKES = Arm(name="bf16, spikes", spikes=True, base="bf16, spikes")
SLOWER = Arm(name="bf16, half rate", learning_rate=0.5, base="bf16, half rate")
FASTER = Arm(name="bf16, double rate", learning_rate=2.0, base="bf16, double rate")
FLOORS = (
  Arm(name="bf16, one ulp", perturbed=ONE_ULP),
  Arm(name="bf16, fp8-sized", perturbed=FP8_SIZED),
)
RECIPES = tuple(fp8_arm(name, fp8.get_recipe(name)) for name in fp8.RECIPES)
FLAX = Arm(name="flax.linen.fp8_ops", dot_general_cls=flax_fp8_ops.Fp8DotGeneral)
CONTROLS = (
  fp8_arm("delayed, scales 1", DELAYED, keep_state=False),
  fp8_arm("delayed, E5M2 forward", fp8.DelayedScaling(fp8_format=E5M2)),
  fp8_arm(
    "delayed, most recent, spikes",
    fp8.DelayedScaling(amax_compute_algo="most_recent"),
    spikes=True,
    base=SPIKES.name,
  ),
)
PARTS = (
  fp8_arm("delayed, fprop alone", fp8.DelayedScaling(high_precision=("dgrad", "wgrad"))),
  fp8_arm("delayed, backward alone", fp8.DelayedScaling(high_precision=("fprop",))),
  Arm(
    name="bf16, kernels rounded", dot_general_cls=functools.partial(RoundedDot, kernels="nearest")
  ),
  Arm(name="bf16, inputs rounded", dot_general_cls=functools.partial(RoundedDot, inputs="nearest")),
)
LAYERS = (
  fp8_arm("delayed, q k v in BF16", DELAYED, exclude=("*/query", "*/key", "*/value")),
  fp8_arm("delayed, out in BF16", DELAYED, exclude="*/out"),
  fp8_arm("delayed, gate up in BF16", DELAYED, exclude=("*/gate", "*/up")),
  fp8_arm("delayed, down in BF16", DELAYED, exclude="*/down"),
  fp8_arm("delayed, first block in BF16", DELAYED, exclude="*Block_0/*"),
  fp8_arm("delayed, second block in BF16", DELAYED, exclude="*Block_1/*"),
)
REMEDIES = (
  fp8_arm("delayed, first eighth in BF16", DELAYED, gates=range(GATES // 8, GATES)),
  fp8_arm("delayed, last eighth in BF16", DELAYED, gates=range(GATES - GATES // 8)),
  fp8_arm("delayed, gradients in E4M3", fp8.DelayedScaling(fp8_format=fp8.Format.E4M3)),
  Arm(
    name="bf16, kernels stochastic",
    dot_general_cls=functools.partial(RoundedDot, kernels="stochastic"),
  ),
  SLOWER,
  fp8_arm("delayed, half rate", DELAYED, learning_rate=0.5, base=SLOWER.name),
  FASTER,
  fp8_arm("delayed, double rate", DELAYED, learning_rate=2.0, base=FASTER.name),
)

QUESTIONS: dict[str, tuple[Arm, ...]] = {
  "recipes": (BF16, *FLOORS, *RECIPES, FLAX, SPIKES, *CONTROLS),
  "parts": (BF16, RECIPES[0], *PARTS),
  "layers": (BF16, RECIPES[0], *LAYERS),
  "remedies": (BF16, RECIPES[0], *REMEDIES),
  "size": (BF16, FLOORS[1], RECIPES[0]),
}
ARMS = {arm.name: arm for arms in QUESTIONS.values() for arm in arms}
