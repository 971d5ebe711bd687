"""The quantizer of block scaling.

Quantized matrices have K last and padded to whole blocks of 128. Scales have the blocks of K first:
``[batch, K / 128, rows]``, or ``[batch, K / 128, ceil(rows / 128)]`` for blocks of 128×128.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from flax_fp8 import scopes
from flax_fp8.contraction import in_blocks
from flax_fp8.formats import E4M3, E5M2, Float8, float8
from flax_fp8.kernels.base import Kernel
from flax_fp8.kernels.call import call
from flax_fp8.kernels.folding import fold, pad, unfold
from flax_fp8.kernels.tiles import SIDE
from flax_fp8.quantize import QTensor, current_scale, quantize


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockQuantize(Kernel):
  """Quantizes a stack of matrices for both GEMMs: as it is, and transposed.

  Attributes:
    format: name of the format.
    tiles: whether each block of 128×128 shares a scale, and not each strip of 128 along the axis
      that a GEMM sums over.
    power_of_two: rounds scales up to powers of two.
    layouts: whether the matrices as they are, and their transposes, are used.
  """

  name: ClassVar[str] = scopes.QUANTIZE
  rule: ClassVar[str] = "brc -> brc bcr bcr brc"

  format: str
  tiles: bool
  power_of_two: bool
  layouts: tuple[bool, bool] = (True, True)

  @property
  def float8(self) -> Float8:
    """The format."""
    return float8(self.format)

  def plain(self, *args: jax.Array) -> tuple[jax.Array, ...]:
    """Quantizes ``[batch, R, C]``.

    Returns:
      Data ``[batch, R, C']`` and its scales, then data ``[batch, C, R']`` and its scales.
    """
    (x,) = args
    if self.tiles:
      q, flipped = quantize_tiles(x, self.float8, self.power_of_two)
    else:
      both = x, lax.transpose(x, (0, 2, 1))
      q, flipped = (quantize_strips(x, self.float8, self.power_of_two) for x in both)
    return q.data, q.scale, flipped.data, flipped.scale

  def run(self, *args: jax.Array) -> tuple[jax.Array, ...]:
    """Quantizes with one kernel. Pads odd sizes, which TMA can't address."""
    from flax_fp8.kernels.mosaic_quantize import BlockQuantizer  # noqa: PLC0415 - imports Pallas

    (x,) = args
    batch, *sizes = x.shape
    padded = pad(x, -sizes[0] % 8, -sizes[1] % SIDE)
    quantizer = BlockQuantizer(
      batch=batch,
      rows=padded.shape[1],
      columns=padded.shape[2],
      dtype=x.dtype,
      float8=self.float8,
      tiles=self.tiles,
      power_of_two=self.power_of_two,
      layouts=self.layouts,
    )
    cut = lambda x, axis, size: lax.slice_in_dim(x, 0, size, axis=axis)
    pairs = iter(quantizer(padded))
    results = [jnp.zeros(of.shape, of.dtype) for of in jax.eval_shape(self.plain, x)]
    for index, (is_used, size) in enumerate(zip(self.layouts, sizes, strict=True)):
      if is_used:
        data, scale = next(pairs)
        scale = scale if self.tiles else cut(scale, 2, size)
        results[2 * index : 2 * index + 2] = cut(data, 1, size), scale
    return tuple(results)

  def using(self, used: Sequence[bool]) -> BlockQuantize:
    """Returns the quantizer that writes only the layouts that are used."""
    return dataclasses.replace(self, layouts=(any(used[:2]), any(used[2:])))

  def refusal(self, *args: Any) -> str:
    """Returns why the kernel can't quantize a stack of matrices."""
    (x,) = args
    if jnp.dtype(x.dtype).itemsize != 2:
      return f"the quantizer takes bfloat16 and float16, not {x.dtype}"
    if self.float8 not in (E4M3, E5M2):
      return f"NVIDIA GPUs have no {self.float8.name}"
    return "" if x.size else "empty"

  def batch(
    self, size: int, args: Sequence[jax.Array], is_mapped: Sequence[bool]
  ) -> tuple[jax.Array, ...]:
    """Merges the mapped axis with the batch."""
    del is_mapped
    return tuple(unfold(x, size) for x in call(self, fold(args[0])))


def quantize_strips(
  x: jax.Array, float8: Float8, power_of_two: bool, key: jax.Array | None = None
) -> QTensor:
  """Quantizes ``[batch, R, C]`` with one scale for each strip of 128 along C.

  Returns:
    Data ``[batch, R, C']`` and scales ``[batch, C' / 128, R]``.
  """
  blocks = in_blocks(x, 1, SIDE)
  batch, rows, _, wide, _ = blocks.shape
  scale, inverse = current_scale(blocks, float8, (2, 4), power_of_two)
  data = quantize(blocks, scale, float8, inverse, key).data
  scale = lax.transpose(scale.reshape(batch, rows, wide), (0, 2, 1))
  return QTensor(data.reshape(batch, rows, wide * SIDE), scale)


def quantize_tiles(x: jax.Array, float8: Float8, power_of_two: bool) -> tuple[QTensor, QTensor]:
  """Quantizes ``[batch, R, C]`` with one scale for each block of 128×128.

  Returns:
    Data ``[batch, R, C']`` and scales ``[batch, C' / 128, R' / 128]``; and the same values
    transposed, ``[batch, C, R']`` and ``[batch, R' / 128, C' / 128]``.
  """
  batch, rows, columns = x.shape
  blocks = in_blocks(x, SIDE, SIDE)
  _, high, _, wide, _ = blocks.shape
  scale, inverse = current_scale(blocks, float8, (2, 4), power_of_two)
  data = quantize(blocks, scale, float8, inverse).data
  data = data.reshape(batch, high * SIDE, wide * SIDE)
  scale = scale.reshape(batch, high, wide)
  flipped = lax.transpose(data, (0, 2, 1))
  return (
    QTensor(data[:, :rows], lax.transpose(scale, (0, 2, 1))),
    QTensor(flipped[:, :columns], scale),
  )
