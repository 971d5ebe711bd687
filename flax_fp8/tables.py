"""Tables, for a terminal and for Markdown."""

from __future__ import annotations

import dataclasses
import io
import itertools
import re
import shutil
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text


@dataclasses.dataclass(frozen=True)
class Table:
  """A table.

  Attributes:
    columns: their names; those that start with ``<`` are aligned to the left.
    rows: the cells.
    grouped: whether a terminal shows the first cell of successive rows once, on a line of its own.
  """

  columns: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]
  grouped: bool = False


def markdown(parts: Sequence[Table | str]) -> str:
  """Renders tables and lines of text as GitHub's Markdown."""
  return "\n\n".join(_markdown(part) if isinstance(part, Table) else part for part in parts) + "\n"


def _markdown(table: Table) -> str:
  heads = [name.removeprefix("<") for name in table.columns]
  rules = ["---" if name.startswith("<") else "---:" for name in table.columns]
  rows = [[cell.replace("|", "\\|") for cell in row] for row in (heads, rules, *table.rows)]
  return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def terminal(parts: Sequence[Table | str]) -> str:
  """Renders tables and lines of text at the width of the terminal, without colours."""
  width = max(60, shutil.get_terminal_size(fallback=(100, 24)).columns)
  console = Console(
    file=io.StringIO(), width=width, color_system=None, highlight=False, force_jupyter=False
  )
  with console.capture() as captured:
    for part in parts:
      for piece in _pieces(part):
        console.print(piece)
      console.print()
  lines = (line.rstrip() for line in captured.get().splitlines())
  return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def _pieces(part: Table | str) -> Iterator[RichTable | Padding | Text]:
  if isinstance(part, str):
    yield Text(part)
  elif not part.grouped:
    yield _grid(part.columns, part.rows, part.rows)
  else:
    columns, rows = part.columns[1:], [row[1:] for row in part.rows]
    heads = tuple(name.removeprefix("<") for name in columns)
    yield _indented(columns, rows, [heads])
    for heading, group in itertools.groupby(part.rows, key=lambda row: row[0]):
      yield Text(heading)
      yield _indented(columns, rows, [row[1:] for row in group])


def _indented(
  columns: Sequence[str], measured: Sequence[tuple[str, ...]], shown: Sequence[tuple[str, ...]]
) -> Padding:
  return Padding(_grid(columns, measured, shown, headed=False), (0, 0, 0, 2))


def _grid(
  columns: Sequence[str],
  measured: Sequence[tuple[str, ...]],
  shown: Sequence[tuple[str, ...]],
  *,
  headed: bool = True,
) -> RichTable:
  """Lays out ``shown`` in columns as wide as ``measured`` needs; text folds if that is too wide."""
  names = [name.removeprefix("<") for name in columns]
  grid = RichTable(box=box.SIMPLE_HEAD if headed else None, show_header=headed, pad_edge=False)
  for name, column, *cells in zip(names, columns, *measured, strict=True):
    is_text = column.startswith("<")
    grid.add_column(
      name,
      justify="left" if is_text else "right",
      min_width=min(12 if is_text else 24, max(map(len, (name, *cells)))),
      overflow="fold",
    )
  for row in shown:
    grid.add_row(*(Text(cell) for cell in row))
  return grid
