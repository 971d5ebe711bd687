"""One picture of the comparison: the curves above, the validation gap below."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lm.curve import Result

COLORS = {"bf16": "tab:blue", "fp8": "tab:orange"}
# The points of the two runs nearly coincide: a cross inside an open circle shows both.
MARKERS = {"bf16": "o", "fp8": "x"}
SMOOTHED_PERCENT = 3


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
    color, curve = COLORS[result.precision], result.curve
    steps, losses = smooth(curve.train, max(1, len(curve.train) * SMOOTHED_PERCENT // 100))
    name = result.precision.upper()
    axes.plot(steps, losses, color=color, alpha=0.5, label=f"{name} train, smoothed")
    axes.plot(
      *zip(*curve.validation, strict=True),
      MARKERS[result.precision],
      color=color,
      fillstyle="none",
      markersize=8,
      label=f"{name} validation",
    )
  axes.set_ylabel("loss, nats a byte")
  axes.legend()


def draw_gap(axes: Axes, bf16: Result, fp8: Result) -> None:
  """Draws how far FP8's validation loss is above BF16's."""
  steps, base = zip(*bf16.curve.validation, strict=True)
  _, losses = zip(*fp8.curve.validation, strict=True)
  axes.axhline(0.0, color="gray", linewidth=0.8)
  axes.plot(steps, 100 * (np.array(losses) / np.array(base) - 1), "o-", color=COLORS["fp8"])
  axes.set_ylabel("FP8 above BF16, %")


def write_png(results: list[Result], path: Path) -> None:
  """Draws what there is: the gap only when both precisions ran."""
  figure = Figure(figsize=(7, 6 if len(results) == 2 else 4), layout="constrained")
  if len(results) == 2:
    curves, gap = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    draw_gap(gap, *results)
    gap.set_xlabel("steps")
  else:
    curves = figure.subplots()
    curves.set_xlabel("steps")
  draw_curves(curves, results)
  figure.savefig(path, dpi=120)
