"""Tables from column specifications, for a terminal and for Markdown.

COLUMNS = (Column("FP8 GEMMs", "{fp8_gemms}/{gemms}"), Column("kernels", "{kernels:,}"))
print_table(console, "One layer", COLUMNS, rows)
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table

Row: TypeAlias = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Column:
  """A column."""

  heading: str  # its name
  # a format string over the row's keys, or a function from the row to its text
  cell: str | Callable[[Row], str]
  left: bool = False  # align to the left

  def text(self, row: Row) -> str:
    """The cell of a row; empty where the row lacks a value of the format string."""
    if callable(self.cell):
      return self.cell(row)
    try:
      return self.cell.format_map(row)
    except (KeyError, TypeError):
      return ""


CASE = Column("", "{title}", left=True)
TIMES = (
  *(Column("ms", "{ms[median]:.3f}"), Column("TFLOP/s", "{tflops[median]:,.0f}")),
  Column("speedup", "{speedup[median]:.3f}"),
  Column("quartiles", "{speedup[low]:.3f}-{speedup[high]:.3f}"),
  Column("peak MiB", "{peak_mib:,.0f}"),
)


def rows_of(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
  """A row for each variant of each case, from figures by case and variant."""
  return [
    {"case": case, "title": "" if index else case, "variant": name, **own[name]}
    for case, own in found.items()
    for index, name in enumerate(own)
  ]


def print_table(
  console: Console,
  title: str,
  columns: Sequence[Column],
  rows: Sequence[Row],
  group: str | None = "case",
) -> None:
  """Prints rows; rows with the same value of ``group`` stand between two lines."""
  grid = Table(title=title)
  for column in columns:
    justify = "left" if column.left else "right"
    grid.add_column(column.heading, justify=justify, overflow="fold")
  previous: Any = None
  for row in rows:
    if group and previous not in (None, row.get(group)):
      grid.add_section()
    previous = row.get(group) if group else None
    grid.add_row(*(column.text(row) for column in columns))
  console.print(grid)


def markdown(columns: Sequence[Column], rows: Sequence[Row]) -> str:
  """The same table in GitHub's Markdown."""
  head = [column.heading for column in columns]
  rule = ["---" if column.left else "---:" for column in columns]
  cells = [[column.text(row) for column in columns] for row in rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *cells)) + "\n"
