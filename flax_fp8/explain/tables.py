"""Tables, for a terminal and for Markdown."""

from __future__ import annotations

import dataclasses
import io
import shutil
from collections.abc import Sequence

from rich import box
from rich.console import Console, Group
from rich.table import Table as RichTable
from rich.text import Text


@dataclasses.dataclass(frozen=True)
class Table:
  """A table; columns whose name starts with ``<`` are aligned to the left."""

  columns: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]


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
  console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
  shown = [_rich(part) if isinstance(part, Table) else Text(part) for part in parts]
  with console.capture() as captured:
    console.print(Group(*shown))
  return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _rich(table: Table) -> RichTable:
  grid = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
  for name in table.columns:
    left = name.startswith("<")
    grid.add_column(
      name.removeprefix("<"), justify="left" if left else "right", overflow="fold", no_wrap=not left
    )
  for row in table.rows:
    grid.add_row(*(Text(cell) for cell in row))
  return grid
