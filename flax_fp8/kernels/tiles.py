"""How the block-scaled GEMM cuts its work, as data.

``benchmarks/tune_tiles.py`` measures candidates on a GPU and rewrites ``tiles.json``::

    {"measured": {"card": ..., "jax": ..., "date": ...},
     "tiles": [{"scales": "blocks", "m": 16384, "n": 4096, "k": 4096, "tile": {"stages": 3}, ...}]}

``measured`` and all other fields are for readers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from flax_fp8 import fields

SIDE = 128  # of a block of scales, and elements of K in one stage: 128 bytes, one swizzled row
SHARED_MEMORY = 227 * 1024  # bytes that a block of threads may have, of Hopper
FILE = Path(__file__).with_name("tiles.json")

Scales: TypeAlias = Literal["blocks", "rows"]  # granularity of the second operand's scales
Key: TypeAlias = tuple[str, int, int, int]

_WGMMA = 64  # rows of one wgmma
_STORED = 64  # columns that one store writes, of bfloat16
_TMA = 256  # most rows that one TMA copy loads
_ALIGNMENT = 1024  # bytes, of an array in shared memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
  """The part of a product that one block of threads computes, and how.

  Attributes:
    consumers: warpgroups that multiply. One more warpgroup loads the operands.
    waves: times 64 rows of the product for each consumer.
    columns: columns of the product.
    cell: columns that one wgmma multiplies, with float32 sums in registers.
    in_flight: cells whose wgmmas run at the same time.
    stages: parts of K that are loaded ahead.
    raster: tiles along N that run together, for the L2 cache.

  Raises:
    TypeError: a field is not an integer.
    ValueError: the kernel can't compute with such a tile. Whether its sums fit in the registers is
      not checked: ``benchmarks/tune_tiles.py --compile`` tells.
  """

  consumers: int = 2
  waves: int = 2
  columns: int = 128
  cell: int = 64
  in_flight: int = 2
  stages: int = 4
  raster: int = 8

  def __post_init__(self) -> None:
    """Checks the fields."""
    for each in dataclasses.fields(self):
      fields.integer("Tile", each.name, getattr(self, each.name), "Pass a positive integer.")
    cells = self.waves * self.columns // self.cell
    self._require("waves", self.rows <= _TMA, f"consumers * waves * {_WGMMA} at most {_TMA}")
    self._require("cell", self.cell % _STORED == 0, f"a multiple of {_STORED}")
    self._require("columns", self.columns % self.cell == 0, f"a multiple of cell={self.cell}")
    self._require("columns", self.columns <= _TMA, f"at most {_TMA}")
    self._require("in_flight", self.in_flight <= cells, f"at most the {cells} cells of a consumer")
    used = self.shared_memory()
    rule = f"so few that shared memory suffices ({used:,} of {SHARED_MEMORY:,} bytes)"
    self._require("stages", used <= SHARED_MEMORY, rule)

  def _require(self, field: str, holds: bool, rule: str) -> None:
    if not holds:
      value = getattr(self, field)
      raise ValueError(f"Tile: {field} must be {rule}; got {field}={value}. Pass another tile.")

  @property
  def rows_each(self) -> int:
    """Rows of the product for each consumer."""
    return _WGMMA * self.waves

  @property
  def rows(self) -> int:
    """Rows of the product."""
    return self.consumers * self.rows_each

  def shared_memory(self, scales: Scales = "rows") -> int:
    """Returns the bytes of shared memory that the kernel asks for."""
    lines = (SIDE * self.rows, SIDE * self.columns, 4 * self.rows)  # of one stage
    lines += (4 * self.columns,) if scales == "rows" else ()
    operands = sum(-(-self.stages * line // _ALIGNMENT) * _ALIGNMENT for line in lines)
    barriers = 2 * 8 * self.stages
    return operands + self.consumers * _WGMMA * 2 * _STORED + barriers

  def check_scales(self, scales: Scales) -> None:
    """Raises ValueError unless one scale in each block of K suffices for all columns.

    Args:
      scales: granularity of the second operand's scales. The kernel loads one scale for all columns
        of a tile if ``scales`` is "blocks".
    """
    if scales == "blocks" and SIDE % self.columns:
      raise ValueError(
        f"Tile: columns must divide {SIDE} if blocks of {SIDE} rows share a scale; got "
        f"columns={self.columns}. Pass 64 or 128."
      )


DEFAULT = Tile()


def key_of(m: int, n: int, k: int, scales: Scales) -> Key:
  """Returns the key of a product in the table.

  The widths of a layer must be equal. Its number of tokens is rounded up to a power of two: ``m``,
  or ``k`` in the product for the kernel's gradient, the only one with scales by rows.
  """
  rounded = lambda tokens: 1 << (tokens - 1).bit_length()
  return (scales, rounded(m), n, k) if scales == "blocks" else (scales, m, n, rounded(k))


def tile_for(m: int, n: int, k: int, scales: Scales) -> Tile:
  """Returns the tile for a product of ``[m, k]`` and ``[n, k]``.

  Args:
    m: rows of the product.
    n: columns of the product.
    k: length of the sums.
    scales: granularity of the second operand's scales.
  """
  return _table().get(key_of(m, n, k, scales), DEFAULT)


@functools.cache
def _table() -> dict[Key, Tile]:
  return read_table(json.loads(FILE.read_text(encoding="utf-8")))


def read_table(content: Mapping[str, Any]) -> dict[Key, Tile]:
  """Returns the tiles of a JSON file by their keys; fields that a tile lacks have their default."""
  table: dict[Key, Tile] = {}
  for each in content["tiles"]:
    table[each["scales"], each["m"], each["n"], each["k"]] = tile = Tile(**each["tile"])
    tile.check_scales(each["scales"])
  return table
