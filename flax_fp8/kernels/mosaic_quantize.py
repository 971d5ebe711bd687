"""The quantizer of block scaling, for Hopper: reads a tensor once and writes both FP8 layouts.

A warpgroup loads one block of 128×128 elements by TMA, and reads it twice from shared memory: as
it is, and transposed. The values of one scale are then a row of registers in both cases, so both
layouts have the same code. Reading 2 bytes and writing 2 bytes for each element is the least
possible.
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

from flax_fp8.formats import Float8
from flax_fp8.kernels.mosaic import F32, WGMMA, along, kernel, load, swizzled, transposed
from flax_fp8.kernels.tiles import SIDE
from flax_fp8.quantize import scale_of_amax


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockQuantizer:
  """The kernel for given sizes.

  Attributes:
    batch: number of matrices.
    rows: rows of a matrix; a multiple of 8.
    columns: columns of a matrix; a multiple of 128.
    dtype: dtype of the matrices; bfloat16 or float16.
    float8: the format.
    tiles: whether 128×128 elements share a scale, and not 1×128.
    power_of_two: rounds scales up to powers of two.
    layouts: whether to write the matrices as they are, and whether to write their transposes.
  """

  batch: int
  rows: int
  columns: int
  dtype: Any
  float8: Float8
  tiles: bool
  power_of_two: bool
  layouts: tuple[bool, bool] = (True, True)

  def __call__(self, x: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Quantizes ``x [batch, R, C]``, with ``R'`` the next multiple of 128 after R.

    Returns:
      For each layout, data and scales. As they are: ``[batch, R, C]`` and ``[batch, C / 128, R]``,
      or ``[batch, C / 128, R' / 128]`` with ``tiles``. Transposed: ``[batch, C, R']`` and
      ``[batch, R' / 128, C]``, or ``[batch, R' / 128, C / 128]``.
    """
    high, wide = pl.cdiv(self.rows, SIDE), self.columns // SIDE
    fp8 = self.float8.dtype
    shapes = (
      ((self.rows, self.columns), (wide, high if self.tiles else self.rows)),
      ((self.columns, high * SIDE), (high, wide if self.tiles else self.columns)),
    )
    array = lambda shape, dtype: jax.ShapeDtypeStruct((self.batch, *shape), dtype)
    out = [(array(data, fp8), array(scale, F32)) for data, scale in self._chosen(*shapes)]
    square = (SIDE, SIDE)
    staged = plgpu.SMEM(square, fp8, transforms=swizzled(fp8)), plgpu.SMEM((SIDE,), F32)
    run = kernel(
      "fp8_quantize_tiles" if self.tiles else "fp8_quantize_strips",
      self._body,
      [leaf for pair in out for leaf in pair],
      scratch_types=[
        plgpu.SMEM(square, self.dtype, transforms=swizzled(self.dtype)),
        *(leaf for _ in out for leaf in staged),
        plgpu.Barrier(),
      ],
      grid=(self.batch, high, wide),
      grid_names=("batch", "i", "j"),
    )
    leaves = run(x)
    return list(zip(leaves[::2], leaves[1::2], strict=True))

  def _chosen(self, as_is: Any, flipped: Any) -> list[Any]:
    pairs = zip((as_is, flipped), self.layouts, strict=True)
    return [layout for layout, is_chosen in pairs if is_chosen]

  @property
  def _body(self) -> Callable[..., None]:
    count = 2 * sum(self.layouts)

    def body(x: Any, *refs: Any) -> None:
      out, (block, *staged, barrier) = refs[:count], refs[count:]
      item, i, j = (lax.axis_index(name) for name in ("batch", "i", "j"))
      rows, columns = pl.ds(i * SIDE, SIDE), pl.ds(j * SIDE, SIDE)
      plgpu.copy_gmem_to_smem(x.at[item, rows, columns], block, barrier)  # zeros beyond the end
      plgpu.barrier_wait(barrier)
      places = self._chosen((_rows, (rows, columns), j, i), (_columns, (columns, rows), i, j))
      inverse = self._scale_of_tile(block) if self.tiles else None
      for number, (read, square, chunk, line) in enumerate(places):
        data, scale = (ref.at[item] for ref in out[2 * number : 2 * number + 2])
        half = read(block).astype(F32), staged[2 * number : 2 * number + 2]
        to = data.at[square], scale.at[chunk], line
        if inverse is None:
          self._store_strips(*half, *to)
        else:
          self._store_tile(*half, *to, *inverse)
      plgpu.wait_smem_to_gmem(0)

    return body

  def _store_strips(self, x: Any, staged: Any, data: Any, scale: Any, line: Any) -> None:
    """Quantizes each row of a block."""
    amax = jnp.max(jnp.abs(x), axis=1)
    scales, inverse = scale_of_amax(amax, self.float8, self.power_of_two)
    staged[0][...] = self._cast(x * along(inverse, x.shape, 0))
    staged[1][...] = scales
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged[0], data)
    plgpu.copy_smem_to_gmem(staged[1], scale.at[pl.ds(line * SIDE, SIDE)])

  def _store_tile(
    self, x: Any, staged: Any, data: Any, scale: Any, line: Any, one: Any, inverse: Any
  ) -> None:
    """Quantizes a block with its scale."""
    staged[0][...] = self._cast(x * inverse)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged[0], data)
    scale[line] = one

  def _scale_of_tile(self, block: Any) -> tuple[Any, Any]:
    amax = jnp.max(jnp.max(jnp.abs(_rows(block).astype(F32)), axis=1), axis=0)
    return scale_of_amax(amax, self.float8, self.power_of_two)

  def _cast(self, x: jax.Array) -> jax.Array:
    return x.astype(self.float8.dtype)  # GPUs saturate here


def _rows(block: Any) -> jax.Array:
  return load(block, WGMMA)


def _columns(block: Any) -> jax.Array:
  return plgpu.layout_cast(load(transposed(block), plgpu.Layout.WGMMA_TRANSPOSED), WGMMA)
