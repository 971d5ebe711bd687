"""Plots amax histories and the largest representable value of each tensor."""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Sequence
from typing import Any, TypeAlias

# Layer, role, amaxes with the oldest first, largest representable value.
History: TypeAlias = tuple[str, str, Sequence[float], float]


def draw(found: Sequence[History]) -> Any:
  """Draws a row of panels for each layer and a panel for each role.

  Args:
    found: layer, role, amaxes with the oldest first, and the largest representable value at the
      current scale. An amax of zero was not recorded and is not drawn.

  Returns:
    A matplotlib figure: ``figure.savefig("stats.png")``.

  Raises:
    ValueError: ``found`` is empty.
    ImportError: matplotlib is not installed.
  """
  if not found:
    raise ValueError(
      "Stats.plot: at least one tensor must have an amax history; got none. Use the state of "
      "DelayedScaling, or read the numbers of one step with Stats.scalars()."
    )
  names, roles = (list(dict.fromkeys(each[i] for each in found)) for i in (0, 1))
  figure = _figure_class()(
    figsize=(1 + 3.5 * len(roles), 1 + 1.8 * len(names)), layout="constrained"
  )
  grid = figure.subplots(len(names), len(roles), squeeze=False, sharex=True)
  for layer, role, history, limit in found:
    axes = grid[names.index(layer), roles.index(role)]
    _panel(axes, history, limit)
    axes.set_title(f"{layer} {role}", fontsize="small")
  for axes in grid[-1]:
    axes.set_xlabel("steps before the newest")
  handles, labels = next(axes for axes in grid.flat if axes.lines).get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=2)
  return figure


def _panel(axes: Any, history: Sequence[float], limit: float) -> None:
  """Draws one history and shades the range that is representable at the current scale."""
  ages = range(1 - len(history), 1)
  seen = [(age, amax) for age, amax in zip(ages, history, strict=True) if amax > 0]
  axes.set_yscale("log")
  axes.plot([age for age, _ in seen], [amax for _, amax in seen], marker=".", label="amax")
  if math.isfinite(limit):
    axes.axhline(limit, color="C3", linestyle="--", label="largest representable")
    bottom, top = axes.get_ylim()
    axes.axhspan(bottom, limit, color="C3", alpha=0.08)
    axes.set_ylim(bottom, top)


def _figure_class() -> Any:
  try:
    return pkgutil.resolve_name("matplotlib.figure:Figure")
  except ImportError as error:
    raise ImportError(
      "Stats.plot: drawing needs matplotlib; got none installed. Run: pip install matplotlib"
    ) from error
