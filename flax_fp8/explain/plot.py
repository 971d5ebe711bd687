"""Plots bytes and roofline time of programs as stacked bars."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from typing import Any, TypeAlias

from flax_fp8.explain.roofline import ClassTotal
from flax_fp8.explain.traffic import KernelClass

Bars: TypeAlias = Sequence[tuple[str, Sequence[ClassTotal]]]


def draw(bars: Bars, device_kind: str) -> Any:
  """Draws a bar per program, stacked by class of kernels; bytes left, roofline right.

  Args:
    bars: name and totals of each program.
    device_kind: name of the GPU in the title.

  Returns:
    A matplotlib figure: ``figure.savefig("report.png")``.

  Raises:
    ImportError: matplotlib is not installed.
  """
  figure = _matplotlib("figure:Figure")(figsize=(9, 1.8 + 0.6 * len(bars)), layout="constrained")
  rated = all(total.seconds is not None for _, totals in bars for total in totals)
  left, *right = figure.subplots(1, 2 if rated else 1, squeeze=False)[0]
  _stack(left, bars, lambda total: total.bytes / 2**20, "MiB moved")
  for axes in right:
    _stack(axes, bars, lambda total: 1e3 * (total.seconds or 0.0), "roofline, ms")
    axes.set_yticklabels([])
  handles, labels = left.get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=4)
  figure.suptitle(f"One step, as compiled for {device_kind}")
  return figure


def formats() -> list[str]:
  """Returns the suffixes of supported image formats.

  Raises:
    ImportError: matplotlib is not installed.
  """
  return sorted(_matplotlib("backend_bases:FigureCanvasBase").get_supported_filetypes())


def _matplotlib(name: str) -> Any:
  try:
    return pkgutil.resolve_name(f"matplotlib.{name}")
  except ImportError as error:
    raise ImportError(
      "plot: drawing needs matplotlib; got none installed. Run: pip install matplotlib"
    ) from error


def _stack(axes: Any, bars: Bars, measure: Any, label: str) -> None:
  starts = [0.0] * len(bars)
  for index, kind in enumerate(KernelClass):
    widths = [sum(measure(t) for t in totals if t.kind is kind) for _, totals in bars]
    if any(any(t.kind is kind for t in totals) for _, totals in bars):
      color = f"C{index % 10}"
      axes.barh(range(len(bars)), widths, left=starts, color=color, label=kind.value)
      starts = [start + width for start, width in zip(starts, widths, strict=True)]
  axes.set_yticks(range(len(bars)), [name for name, _ in bars])
  axes.invert_yaxis()
  axes.set_xlabel(label)
