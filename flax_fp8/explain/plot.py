"""Where the bytes and the time of programs go, as stacked bars."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flax_fp8.explain.traffic import KernelClass

if TYPE_CHECKING:
  from flax_fp8.explain.report import Report


def _matplotlib() -> Any:
  """Imports matplotlib, which only pictures need."""
  try:
    return importlib.import_module("matplotlib.figure")
  except ImportError as error:
    raise ImportError(
      "Report.plot: drawing needs matplotlib; got none installed. Run: pip install matplotlib"
    ) from error


def draw(reports: Sequence[Report]) -> Any:
  """Draws a bar a program, stacked by class of kernels; bytes left, roofline right.

  Args:
    reports: the programs.

  Returns:
    A matplotlib figure: ``figure.savefig("report.png")``.
  """
  figure = _matplotlib().Figure(figsize=(9, 1.6 + 0.6 * len(reports)), layout="constrained")
  rated = all(report.seconds is not None for report in reports)
  left, *right = figure.subplots(1, 2 if rated else 1, squeeze=False)[0]
  colours = {kind: f"C{index % 10}" for index, kind in enumerate(KernelClass)}
  _bars(left, reports, colours, "bytes", 1 / 2**20, "MiB moved")
  for axes in right:
    _bars(axes, reports, colours, "seconds", 1e3, "roofline, ms")
    axes.set_yticklabels([])
  handles = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
  figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
  device = reports[0].device_kind
  figure.suptitle(f"One step on {device}" + (", as compiled" if reports[0].described else ""))
  return figure


def _bars(
  axes: Any,
  reports: Sequence[Report],
  colours: dict[KernelClass, str],
  quantity: str,
  unit: float,
  label: str,
) -> None:
  names = [report.name for report in reports]
  starts = [0.0] * len(reports)
  for kind, colour in colours.items():
    widths = [unit * (getattr(report.total(kind), quantity) or 0) for report in reports]
    if any(widths):
      axes.barh(range(len(names)), widths, left=starts, color=colour, label=kind.value)
      starts = [start + width for start, width in zip(starts, widths, strict=True)]
  axes.set_yticks(range(len(names)), names)
  axes.invert_yaxis()
  axes.set_xlabel(label)
