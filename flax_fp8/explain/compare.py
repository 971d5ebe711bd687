"""Comparison of two compiled programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax_fp8 import tables
from flax_fp8.explain import plot
from flax_fp8.explain.roofline import ClassTotal
from flax_fp8.tables import Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
  """Numbers of two programs, and the ratios of the first to the second. Print it for a table.

  Attributes:
    names: names of the two programs.
    figures: numbers of each program, by label.
    totals: bytes and seconds of each program, by class of kernels.
    device_kind: the GPU that the first program is compiled for.
  """

  names: tuple[str, str]
  figures: tuple[Mapping[str, float], Mapping[str, float]]
  totals: tuple[tuple[ClassTotal, ...], tuple[ClassTotal, ...]]
  device_kind: str

  def rows(self) -> list[tuple[str, float, float]]:
    """Returns each label with the numbers of both programs; a missing number is zero."""
    one, other = self.figures
    labels = [*one, *(label for label in other if label not in one)]
    return [(label, one.get(label, 0.0), other.get(label, 0.0)) for label in labels]

  def to_dict(self) -> dict[str, Any]:
    """Returns the numbers and ratios as JSON types; a ratio to zero is None."""
    return {
      label: {"one": one, "other": other, "ratio": one / other if other else None}
      for label, one, other in self.rows()
    } | {"names": list(self.names)}

  def to_markdown(self) -> str:
    """Returns the comparison as Markdown."""
    return tables.markdown([self._table()])

  def __str__(self) -> str:
    """Returns the comparison as text, at the width of the terminal."""
    return tables.terminal([self._table()])

  def plot(self) -> Any:
    """Draws the bytes and times of both programs as bars, stacked by class of kernels.

    Returns:
      A matplotlib figure.

    Raises:
      ImportError: matplotlib is not installed.
    """
    return plot.draw(list(zip(self.names, self.totals, strict=True)), self.device_kind)

  def _table(self) -> Table:
    rows = (
      (label, _number(one), _number(other), f"{one / other:.2f}" if other else "")
      for label, one, other in self.rows()
    )
    return Table(("<", *self.names, "ratio"), tuple(rows))


def _number(value: float) -> str:
  if value == int(value):
    return f"{int(value):,}"
  return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"
