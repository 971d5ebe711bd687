"""Two programs side by side."""

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
  """Two programs side by side, with the ratio of the first to the second; ``print`` it.

  Attributes:
    names: of the two programs.
    figures: of each, its numbers by label.
    totals: of each, what its classes of kernels move and take.
    device_kind: the GPU that the first is compiled for.
  """

  names: tuple[str, str]
  figures: tuple[Mapping[str, float], Mapping[str, float]]
  totals: tuple[tuple[ClassTotal, ...], tuple[ClassTotal, ...]]
  device_kind: str

  def rows(self) -> list[tuple[str, float, float]]:
    """Label, the first program's number, the second's; what a program lacks is zero."""
    one, other = self.figures
    labels = [*one, *(label for label in other if label not in one)]
    return [(label, one.get(label, 0.0), other.get(label, 0.0)) for label in labels]

  def to_dict(self) -> dict[str, Any]:
    """Both numbers of each line, and their ratio (None by zero), in types that JSON knows."""
    return {
      label: {"one": one, "other": other, "ratio": one / other if other else None}
      for label, one, other in self.rows()
    } | {"names": list(self.names)}

  def to_markdown(self) -> str:
    """The comparison as Markdown."""
    return tables.markdown([self._table()])

  def __str__(self) -> str:
    """The comparison as text, as wide as the terminal."""
    return tables.terminal([self._table()])

  def plot(self) -> Any:
    """Draws both programs' bytes and times, stacked by class; a matplotlib figure."""
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
