"""How the block-scaled GEMM cuts its work, as data.

``benchmarks/tune_tiles.py`` measures candidates on a GPU and rewrites ``tiles.json``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

SIDE = 128  # of a block of scales, and elements of K in one stage: 128 bytes, one swizzled row
_FILE = Path(__file__).with_name("tiles.json")


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
  """

  consumers: int = 2
  waves: int = 2
  columns: int = 128
  cell: int = 64
  in_flight: int = 2
  stages: int = 4
  raster: int = 8

  @property
  def rows_each(self) -> int:
    """Rows of the product for each consumer."""
    return 64 * self.waves

  @property
  def rows(self) -> int:
    """Rows of the product."""
    return self.consumers * self.rows_each


DEFAULT = Tile()


def tile_for(m: int, n: int, k: int, scales: str) -> Tile:
  """Returns the tile for a product of ``[m, k]`` and ``[n, k]``.

  Args:
    m: rows of the product.
    n: columns of the product.
    k: length of the sums.
    scales: "blocks" or "rows", the granularity of the second operand's scales.
  """
  return _table().get((scales, m, n, k), DEFAULT)


@functools.cache
def _table() -> dict[tuple[str, int, int, int], Tile]:
  entries: list[dict[str, Any]] = json.loads(_FILE.read_text(encoding="utf-8"))
  return {(each["scales"], *each["mnk"]): Tile(**each["tile"]) for each in entries}
