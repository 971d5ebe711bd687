"""The FP8 GEMM with block scales, for Hopper.

Tensor cores of Hopper add FP8 products with about 14 bits. The sum of each block of 128 terms is
therefore scaled and added to a float32 total in registers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flax_fp8.kernels.mosaic import F32, WGMMA, along, kernel, load, swizzled, transposed
from flax_fp8.kernels.tiles import SIDE, Tile

_PRODUCER_REGISTERS = 24  # per thread of the warpgroup that loads; the consumers share the others


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockGemm:
  """The kernel for given sizes.

  ::

      out[m, n] = sum over blocks c of K: sum(a[m, c] * b[n, c]) * a_scale[c, m] * b_scale[c, n]

  The last warpgroup only loads: it fills a ring of stages with 128 of K of both operands, by TMA.
  Each other warpgroup, a consumer, owns some rows of the tile and all of its columns, cut into
  cells of 64 rows. A cell's product of one stage has its own accumulator. While the tensor cores
  multiply one cell, the threads scale the cell before it and add it to its total.

  Attributes:
    batch: number of products.
    m: rows of a product.
    n: columns of a product; a multiple of 64, or of 32 for float32 results.
    k: length of the sums; a multiple of 128.
    by_rows: whether ``b`` has a scale for each row, and not for each 128 rows.
    out_dtype: dtype of the result.
    tile: how the work is cut.

  Raises:
    ValueError: the tile has too many columns for scales of blocks.
  """

  batch: int
  m: int
  n: int
  k: int
  by_rows: bool
  out_dtype: Any
  tile: Tile

  def __post_init__(self) -> None:
    """Checks the tile."""
    self.tile.check_scales("rows" if self.by_rows else "blocks")

  @property
  def stages_of_k(self) -> int:
    """Number of blocks of K."""
    return self.k // SIDE

  @property
  def tiles(self) -> tuple[int, int]:
    """Number of tiles along both axes of a product."""
    return pl.cdiv(self.m, self.tile.rows), pl.cdiv(self.n, self.tile.columns)

  @property
  def cells(self) -> list[tuple[int, int]]:
    """First row and column of each cell of a consumer."""
    rows, columns = 64 * self.tile.waves, self.tile.columns
    return [(r, c) for r in range(0, rows, 64) for c in range(0, columns, self.tile.cell)]

  @property
  def out_columns(self) -> int:
    """Columns of the result that one swizzled row of shared memory holds."""
    return 128 // jnp.dtype(self.out_dtype).itemsize

  def __call__(self, *operands: jax.Array) -> jax.Array:
    """Multiplies ``a [batch, M, K]`` and ``b [batch, N, K]``.

    Args:
      *operands: ``a``, ``b``, ``a_scale [batch, K / 128, M]`` and ``b_scale [batch, K / 128, N]``,
        or ``[batch, K / 128, ceil(N / 128)]`` if not ``by_rows``.

    Returns:
      ``[batch, M, N]``.
    """
    tall, wide = self.tiles
    run = kernel(
      "fp8_gemm_by_rows" if self.by_rows else "fp8_gemm_by_blocks",
      self._body,
      jax.ShapeDtypeStruct((self.batch, self.m, self.n), self.out_dtype),
      grid=(self.batch, tall * wide),
      grid_names=("batch", "tile"),
      num_threads=self.tile.consumers + 1,
      thread_name="warpgroup",
    )
    return run(*operands)

  @property
  def _body(self) -> Callable[..., None]:
    def body(a: Any, b: Any, a_scale: Any, b_scale: Any, out: Any) -> None:
      item = lax.axis_index("batch")
      operands = tuple(ref.at[item] for ref in (a, b, a_scale, b_scale))
      where = plgpu.planar_snake(lax.axis_index("tile"), self.tiles, 1, self.tile.raster)
      self._one_tile(where, operands, out.at[item])

    return body

  def _one_tile(self, where: tuple[Any, Any], operands: tuple[Any, ...], out: Any) -> None:
    *_, b_scale = operands
    block = lax.div(where[1] * self.tile.columns, SIDE)  # of b's scales, if they are not by rows
    inputs = operands if self.by_rows else operands[:3]

    def scale_of(chunk: Any) -> Any:
      return F32(1) if self.by_rows else b_scale[chunk, block]

    def pipeline(step: Any, consume: Any) -> Any:
      return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(self.stages_of_k,),
        in_specs=self._stages(*where),
        max_concurrent_steps=self.tile.stages,
        wg_axis="warpgroup",
        num_compute_wgs=self.tile.consumers,
        memory_registers=_PRODUCER_REGISTERS,
        compute_context=consume,
      )

    def step(index: Any, *stage: Any) -> Any:
      *tiles, (totals, scale) = stage
      later = scale_of(jnp.minimum(index[0] + 1, self.stages_of_k - 1))  # loads one step ahead
      new = self._multiply_and_promote(tiles, totals, scale)
      # Threads read the scales, and TMA will overwrite them. The fence orders the two.
      plgpu.commit_smem()
      return new, later

    def scoped(allocations: Any, staged: Any) -> None:
      def consume(run: Callable[[Any], Any]) -> None:
        zero = plgpu.layout_cast(jnp.zeros((64, self.tile.cell), F32), WGMMA)
        totals, _ = run((tuple(zero for _ in self.cells), scale_of(0)))
        self._store(where, totals, staged, out)

      pipeline(step, consume)(*inputs, allocations=allocations)

    # All warpgroups must allocate shared memory together.
    nothing = lambda *_, **__: None
    warpgroup = (self.tile.consumers, 64, self.out_columns)
    pl.run_scoped(
      scoped,
      allocations=pipeline(nothing, nothing).get_allocations(*inputs),
      staged=plgpu.SMEM(warpgroup, self.out_dtype, transforms=swizzled(self.out_dtype)),
      collective_axes="warpgroup",
    )

  def _stages(self, i: Any, j: Any) -> list[Any]:
    """Returns what one stage loads of each operand. TMA reads zeros beyond the end."""
    tile, fp8 = self.tile, swizzled(jnp.float8_e4m3fn)
    specs = [
      plgpu.BlockSpec((tile.rows, SIDE), lambda c: (i, c), transforms=fp8),
      plgpu.BlockSpec((tile.columns, SIDE), lambda c: (j, c), transforms=fp8),
      plgpu.BlockSpec((1, tile.rows), lambda c: (c, i)),
    ]
    if self.by_rows:
      specs.append(plgpu.BlockSpec((1, tile.columns), lambda c: (c, j)))
    return specs

  def _multiply_and_promote(self, stage: Any, totals: Any, scale: Any) -> tuple[Any, ...]:
    """Multiplies all cells of a consumer for one stage, and adds them to their totals.

    The accumulators are nested scopes. As siblings, they would not share registers.
    """
    first_row = lax.axis_index("warpgroup") * self.tile.rows_each
    accumulator = plgpu.WGMMAAccumulatorRef((64, self.tile.cell), F32)
    cells = self.cells

    def issue(number: int, sums: Any) -> None:
      row, column = cells[number]
      lhs = stage[0].at[pl.ds(first_row + row, 64)]
      plgpu.wgmma(sums, lhs, transposed(stage[1].at[pl.ds(column, self.tile.cell)]))

    def promote(number: int, sums: Any, younger: int) -> Any:
      part = plgpu.wgmma_accumulator_load(sums, wait_n=younger)
      return totals[number] + part * self._scales(stage, cells[number], first_row, scale)

    def run(number: int, running: list[tuple[int, Any]]) -> tuple[Any, ...]:
      if number == len(cells):
        left = len(running)
        return tuple(promote(*each, left - 1 - age) for age, each in enumerate(running))

      def scoped(sums: Any) -> tuple[Any, ...]:
        issue(number, sums)
        now, done = [*running, (number, sums)], ()
        if len(now) == self.tile.in_flight:
          done = (promote(*now.pop(0), self.tile.in_flight - 1),)
        return (*done, *run(number + 1, now))

      return pl.run_scoped(scoped, accumulator)

    return run(0, [])

  def _scales(self, stage: Any, cell: tuple[int, int], first_row: Any, scale: Any) -> Any:
    """Returns the scale of each element of a cell's sums."""
    shape = (64, self.tile.cell)
    down = load(stage[2].at[0, pl.ds(first_row + cell[0], 64)], WGMMA.reduce(1))
    if not self.by_rows:
      return along(down * scale, shape, 0)
    across = load(stage[3].at[0, pl.ds(cell[1], self.tile.cell)], WGMMA.reduce(0))
    return along(down, shape, 0) * along(across, shape, 1)

  def _store(self, where: tuple[Any, Any], totals: Any, staged: Any, out: Any) -> None:
    """Writes the totals through shared memory. TMA writes nothing beyond the end."""
    me, width = lax.axis_index("warpgroup"), self.out_columns
    first_row = where[0] * self.tile.rows + me * self.tile.rows_each
    first_column = where[1] * self.tile.columns
    for (row, column), total in zip(self.cells, totals, strict=True):
      for offset in range(0, self.tile.cell, width):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the copy before has read its source
        staged[me] = total[:, offset : offset + width].astype(self.out_dtype)
        plgpu.commit_smem()
        columns = pl.ds(first_column + column + offset, width)
        plgpu.copy_smem_to_gmem(staged.at[me], out.at[pl.ds(first_row + row, 64), columns])
    plgpu.wait_smem_to_gmem(0)
