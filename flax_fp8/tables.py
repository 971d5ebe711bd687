"""Renders tables for a terminal and for Markdown."""

from __future__ import annotations

import dataclasses
import io
import itertools
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

Rows: TypeAlias = Sequence[tuple[str, ...]]
_NARROW = 8  # minimum width in characters of a column of folded text


@dataclasses.dataclass(frozen=True)
class Table:
  """A table.

  Attributes:
    columns: names of the columns. A name that starts with ``<`` aligns its column to the left.
    rows: the cells.
    grouped: whether a terminal shows the first cell once for successive rows that share it, on its
      own line.
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
  """Renders tables and lines of text at the width of the terminal, without colors."""
  width = max(20, shutil.get_terminal_size(fallback=(100, 24)).columns)
  console = Console(
    file=io.StringIO(), width=width, color_system=None, highlight=False, force_jupyter=False
  )
  with console.capture() as captured:
    for part in parts:
      for piece in _pieces(part, width):
        console.print(piece)
      console.print()
  lines = (line.rstrip() for line in captured.get().splitlines())
  return printable(re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n"))


_ASCII = str.maketrans({"─": "-", "×": "x", "±": "+-", "≈": "~", "µ": "u"})


def printable(text: str) -> str:
  """Replaces characters that stdout can't encode: known ones with ASCII, others with escapes."""
  encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
  try:
    text.encode(encoding)
  except UnicodeEncodeError:
    text = text.translate(_ASCII).encode(encoding, "backslashreplace").decode(encoding)
  return text


def _pieces(part: Table | str, width: int) -> Iterator[RichTable | Padding | Text]:
  if isinstance(part, str):
    yield Text(part)
  elif not part.grouped:
    widths = _fitted(part.columns, part.rows, width - 3 * len(part.columns) + 1)
    yield _grid(part.columns, part.rows, widths, headed=True)
  else:
    columns, rows = part.columns[1:], [row[1:] for row in part.rows]
    widths = _fitted(columns, rows, width - 2 * len(columns))
    if widths:
      yield _indented(_grid(columns, [tuple(map(_name, columns))], widths))
    for heading, group in itertools.groupby(part.rows, key=lambda row: row[0]):
      yield Text(heading)
      yield _indented(_grid(columns, [row[1:] for row in group], widths))


def _indented(grid: RichTable) -> Padding:
  return Padding(grid, (0, 0, 0, 2))


def _name(column: str) -> str:
  return column.removeprefix("<")


def _fitted(columns: Sequence[str], rows: Rows, available: int) -> list[int] | None:
  """Chooses column widths: text and names fold, numbers do not. None if they do not fit."""
  widths, least = [], []
  for column, *cells in zip(columns, *rows, strict=True):
    name, lines = len(_name(column)), [line for cell in cells for line in cell.splitlines()]
    longest = max(map(cell_len, lines), default=0)
    widths.append(max(name, longest))
    least.append(_NARROW if column.startswith("<") else max(longest, min(name, _NARROW)))
  while sum(widths) > available:
    excess = [width if width > low else 0 for width, low in zip(widths, least, strict=True)]
    if not any(excess):
      return None
    widths[max(range(len(excess)), key=lambda index: (excess[index], index))] -= 1
  return widths


def _grid(
  columns: Sequence[str], rows: Rows, widths: Sequence[int] | None, *, headed: bool = False
) -> RichTable:
  """Lays out rows in columns. Without widths, each row becomes a list of names and values."""
  if widths is None:
    return _records(columns, rows)
  grid = RichTable(box=box.SIMPLE_HEAD if headed else None, show_header=headed, pad_edge=False)
  for column, width in zip(columns, widths, strict=True):
    justify = "left" if column.startswith("<") else "right"
    grid.add_column(Text(_name(column)), justify=justify, width=width, overflow="fold")
  for row in rows:
    grid.add_row(*map(Text, row))
  return grid


def _records(columns: Sequence[str], rows: Rows) -> RichTable:
  grid = RichTable(box=None, show_header=False, pad_edge=False)
  grid.add_column(overflow="fold", max_width=2 * _NARROW)
  grid.add_column(overflow="fold")
  for row in rows:
    for column, cell in zip(columns, row, strict=True):
      if cell:
        grid.add_row(Text(_name(column)), Text(cell))
    grid.add_row()
  return grid
