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
  """

  batch: int
  rows: int
  columns: int
  dtype: Any
  float8: Float8
  tiles: bool
  power_of_two: bool

  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Quantizes ``x [batch, R, C]``, with ``R'`` the next multiple of 128 after R.

    Returns:
      Data ``[batch, R, C]`` and its scales, then data ``[batch, C, R']`` and its scales. Scales
      are ``[batch, C / 128, R]`` and ``[batch, R' / 128, C]``. With ``tiles``, they are
      ``[batch, C / 128, R' / 128]`` and ``[batch, R' / 128, C / 128]``.
    """
    high, wide = pl.cdiv(self.rows, SIDE), self.columns // SIDE
    lines = (high, wide) if self.tiles else (self.rows, self.columns)
    array = lambda shape, dtype: jax.ShapeDtypeStruct((self.batch, *shape), dtype)
    out = (
      array((self.rows, self.columns), self.float8.dtype),
      array((wide, lines[0]), F32),
      array((self.columns, high * SIDE), self.float8.dtype),
      array((high, lines[1]), F32),
    )
    square = (SIDE, SIDE)
    fp8 = plgpu.SMEM(square, self.float8.dtype, transforms=swizzled(self.float8.dtype))
    block = plgpu.SMEM(square, self.dtype, transforms=swizzled(self.dtype))
    staged = [fp8, fp8] if self.tiles else [fp8, plgpu.SMEM((SIDE,), F32)] * 2
    run = kernel(
      "fp8_quantize_tiles" if self.tiles else "fp8_quantize_strips",
      self._body,
      out,
      scratch_types=[block, *staged, plgpu.Barrier()],
      grid=(self.batch, high, wide),
      grid_names=("batch", "i", "j"),
    )
    return run(x)

  @property
  def _body(self) -> Callable[..., None]:
    quantize = self._tiles if self.tiles else self._strips

    def body(x: Any, q: Any, scale: Any, q_t: Any, scale_t: Any, *scratch: Any) -> None:
      block, *staged, barrier = scratch
      item, i, j = (lax.axis_index(name) for name in ("batch", "i", "j"))
      rows, columns = pl.ds(i * SIDE, SIDE), pl.ds(j * SIDE, SIDE)
      plgpu.copy_gmem_to_smem(x.at[item, rows, columns], block, barrier)  # zeros beyond the end
      plgpu.barrier_wait(barrier)
      as_is = q.at[item, rows, columns], scale.at[item, j]
      flipped = q_t.at[item, columns, rows], scale_t.at[item, i]
      quantize(block, staged, (*as_is, i), (*flipped, j))
      plgpu.wait_smem_to_gmem(0)

    return body

  def _strips(self, block: Any, staged: Any, as_is: Any, flipped: Any) -> None:
    """Quantizes each row of the block, and each row of its transpose."""
    halves = ((_rows, *staged[:2], *as_is), (_columns, *staged[2:], *flipped))
    for read, q_staged, scale_staged, q, scale, line in halves:
      x = read(block).astype(F32)
      scales, inverse = scale_of_amax(_amax(x), self.float8, self.power_of_two)
      # The conversion to FP8 saturates.
      q_staged[...] = (x * along(inverse, x.shape, 0)).astype(self.float8.dtype)
      scale_staged[...] = scales
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(q_staged, q)
      plgpu.copy_smem_to_gmem(scale_staged, scale.at[pl.ds(line * SIDE, SIDE)])

  def _tiles(self, block: Any, staged: Any, as_is: Any, flipped: Any) -> None:
    """Quantizes the block with one scale."""
    amax = jnp.max(_amax(_rows(block).astype(F32)), axis=0)
    one, inverse = scale_of_amax(amax, self.float8, self.power_of_two)
    for read, q_staged in ((_rows, staged[0]), (_columns, staged[1])):
      q_staged[...] = (read(block).astype(F32) * inverse).astype(self.float8.dtype)
    plgpu.commit_smem()
    for q_staged, (q, scale, line) in zip(staged, (as_is, flipped), strict=True):
      plgpu.copy_smem_to_gmem(q_staged, q)
      scale[line] = one


def _rows(block: Any) -> jax.Array:
  return load(block, WGMMA)


def _columns(block: Any) -> jax.Array:
  return plgpu.layout_cast(load(transposed(block), plgpu.Layout.WGMMA_TRANSPOSED), WGMMA)


def _amax(x: jax.Array) -> jax.Array:
  return jnp.max(jnp.abs(x), axis=1)
