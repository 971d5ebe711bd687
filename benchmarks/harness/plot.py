"""Plots: one look, and rules that every plot keeps.

Each plot has a title with its hardware and how its numbers were made. At most five lines are in a
panel. Where x is logarithmic, y is too. ``names`` gives colors and markers.
"""

import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any

from harness.names import color, label, marker

MOST_LINES = 5


def make_figure(title: str, content: Mapping[str, Any], size: tuple[float, float]) -> Any:
  """A Matplotlib figure of a size in inches; the JSON has what stands below its title."""
  figure = pkgutil.resolve_name("matplotlib.figure:Figure")(figsize=size, layout="constrained")
  figure.suptitle(f"{title}\n{subtitle(content)}", fontsize="medium")
  return figure


def subtitle(content: Mapping[str, Any]) -> str:
  """Hardware, method and date: ``H100, compiled, not timed, 2026-11-26``."""
  environment = content["environment"]
  device = content.get("target", environment["device"])
  name = "CPU, FP8 emulated" if environment.get("fp8_emulated") and device == "cpu" else device
  parts = [name.upper() if content.get("target") else name, content.get("note", "")]
  versions = f"JAX {environment['jax']}" if "jax" in environment else ""
  return ", ".join(filter(None, [*parts, versions, environment["date"][:10]]))


def lines(
  axes: Any,
  x: Sequence[float],
  curves: Mapping[str, Sequence[float]],
  *,
  log: bool = False,
  **named: Any,
) -> None:
  """Draws one line for each variant; ``named`` is what ``axes.set`` takes."""
  for name, y in curves.items():
    axes.plot(x, y, f"{marker(name)}-", color=color(name), markersize=4, label=label(name))
  if log:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if f"{y:e}"[0] in "23468" else "")
  axes.set(**named)
  check(axes)


def check(axes: Any) -> None:
  """Raises where a panel has more than five lines with a label."""
  labels = [line.get_label() for line in axes.lines]
  shown = [name for name in labels if not str(name).startswith("_")]
  if len(shown) > MOST_LINES:
    raise ValueError(f"plot: a panel has at most {MOST_LINES} lines; got {shown}. Draw fewer.")


def legend(figure: Any) -> None:
  """One legend below all panels, with each label once."""
  found: dict[str, Any] = {}
  for axes in figure.axes:
    for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
      found.setdefault(name, handle)
  where = {"loc": "outside lower center", "ncols": len(found), "fontsize": "small"}
  figure.legend(found.values(), found.keys(), **where)
