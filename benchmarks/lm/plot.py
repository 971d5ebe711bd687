"""One picture of the comparison: the curves above, the validation gap below."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import flax_fp8 as fp8
from lm.curve import Result
from lm.files import whole_file
from lm.runs import BF16, BF16_AGAIN, FLOAT16, Run, label, recipe_name

# The points of the runs nearly coincide: marks of different shapes show each.
MARKERS = "ox+^vsd*"
SMOOTHED_PERCENT = 3


def place(run: Run) -> int:
  """The run's place among all there are, which gives it the same looks in every picture."""
  return (BF16, *fp8.RECIPES, BF16_AGAIN, FLOAT16).index(recipe_name(run))


def color(run: Run) -> str:
  """The run's colour."""
  return f"C{place(run)}"


def marker(run: Run) -> str:
  """The shape of the run's points."""
  return MARKERS[place(run) % len(MARKERS)]


def smooth(losses: list[float], width: int) -> tuple[np.ndarray, np.ndarray]:
  """Averages every ``width`` neighbouring losses.

  Args:
    losses: one a step.
    width: at least 1, at most the number of losses.

  Returns:
    The step at each window's end, and the window's mean.
  """
  sums = np.cumsum(np.concatenate([[0.0], losses]))
  return np.arange(width, len(losses) + 1), (sums[width:] - sums[:-width]) / width


def draw_curves(axes: Axes, results: list[Result]) -> None:
  """Draws the smoothed training loss as a line, validation as points."""
  for result in results:
    run, curve = result.run, result.curve
    steps, losses = smooth(curve.train, max(1, len(curve.train) * SMOOTHED_PERCENT // 100))
    name = label(run)
    axes.plot(steps, losses, color=color(run), alpha=0.5, label=f"{name} train, smoothed")
    axes.plot(
      *zip(*curve.validation, strict=True),
      marker(run),
      color=color(run),
      fillstyle="none",
      markersize=8,
      label=f"{name} validation",
    )
  axes.set_ylabel("loss, nats a byte")
  axes.legend()


def draw_gaps(axes: Axes, bf16: Result, others: list[Result]) -> None:
  """Draws how far the validation loss of each recipe is above BF16's."""
  steps, base = zip(*bf16.curve.validation, strict=True)
  axes.axhline(0.0, color="gray", linewidth=0.8)
  for other in others:
    _, losses = zip(*other.curve.validation, strict=True)
    gaps = 100 * (np.array(losses) / np.array(base) - 1)
    axes.plot(steps, gaps, "o-", color=color(other.run))
  axes.set_ylabel("FP8 above BF16, %")


def write_png(results: list[Result], path: Path) -> None:
  """Draws what there is: the gaps only when BF16 ran, and FP8 too."""
  bf16 = next((result for result in results if result.run == BF16), None)
  others = [result for result in results if result.run != BF16]
  figure = Figure(figsize=(7, 6 if bf16 and others else 4), layout="constrained")
  if bf16 and others:
    curves, gaps = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    draw_gaps(gaps, bf16, others)
    gaps.set_xlabel("steps")
  else:
    curves = figure.subplots()
    curves.set_xlabel("steps")
  draw_curves(curves, results)
  with whole_file(path) as beside:
    figure.savefig(beside, dpi=120)
