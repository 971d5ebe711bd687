"""The GEMM of block scaling, for matrices as ``block_quantize`` makes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from flax_fp8 import scopes, varying
from flax_fp8.fp8_dot import fp8_dot
from flax_fp8.kernels.base import Kernel
from flax_fp8.kernels.call import call
from flax_fp8.kernels.folding import fold, pad, unfold
from flax_fp8.kernels.tiles import SIDE, tile_for
from flax_fp8.quantize import QTensor, dequantize_product

_FIRST_JAX_OF_MIXED = (0, 11)  # that multiplies E5M2 by E4M3


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockScaledGemm(Kernel):
  """Multiplies stacks of matrices that have scales for blocks of K.

  Attributes:
    out_dtype: name of the dtype of the result.
  """

  name: ClassVar[str] = scopes.GEMM
  rule: ClassVar[str] = "bmk bnk bkm bkn -> bmn"

  out_dtype: str

  def plain(self, *args: jax.Array) -> tuple[jax.Array, ...]:
    """Multiplies with one GEMM for each block of K.

    Args:
      *args: ``a [batch, M, K]`` and ``b [batch, N, K]``, FP8, with K a multiple of 128; scales
        ``[batch, K / 128, M]``, and ``[batch, K / 128, N]`` or ``[batch, K / 128, ceil(N / 128)]``.

    Returns:
      ``[batch, M, N]``.
    """
    a, b, a_scale, b_scale = args
    out = dot_blocks(QTensor(a, a_scale), QTensor(b, b_scale))
    return (out.astype(self.out_dtype),)

  def run(self, *args: jax.Array) -> tuple[jax.Array, ...]:
    """Multiplies with one kernel. Pads odd sizes, which TMA can't address."""
    from flax_fp8.kernels.mosaic_gemm import BlockGemm  # noqa: PLC0415 - imports Pallas

    a, b, a_scale, b_scale = args
    batch, m, k = a.shape
    n, by_rows = b.shape[1], b_scale.shape[2] == b.shape[1]
    width = 128 // jnp.dtype(self.out_dtype).itemsize
    missing_m, missing_n = -m % 8, -n % width
    b_scale = pad(b_scale, 0, missing_n) if by_rows else b_scale
    operands = pad(a, missing_m, 0), pad(b, missing_n, 0), pad(a_scale, 0, missing_m), b_scale
    gemm = BlockGemm(
      batch=batch,
      m=m + missing_m,
      n=n + missing_n,
      k=k,
      by_rows=by_rows,
      out_dtype=jnp.dtype(self.out_dtype),
      tile=tile_for(m, n, k, "rows" if by_rows else "blocks"),
    )
    return (gemm(*operands)[:, :m, :n],)

  def refusal(self, *args: Any) -> str:
    """Returns why the kernel can't multiply matrices."""
    a, b, *_ = args
    formats = {jnp.dtype(a.dtype), jnp.dtype(b.dtype)}
    if unknown := formats - {jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)}:
      return f"NVIDIA GPUs have no {unknown.pop().name}"
    if len(formats) == 2 and jax.__version_info__ < _FIRST_JAX_OF_MIXED:
      return f"JAX {jax.__version__} multiplies no E5M2 by E4M3 in a kernel"
    return "" if a.size and b.size else "empty"

  def batch(
    self, size: int, args: Sequence[jax.Array], is_mapped: Sequence[bool]
  ) -> tuple[jax.Array, ...]:
    """Merges the mapped axis with the batch, or with the rows of ``a`` if only ``a`` has it."""
    a, b, a_scale, b_scale = args
    if not (is_mapped[1] or is_mapped[3]) and a.shape[1] == 1 and all(is_mapped[::2]):
      rows, (_, _, blocks, m) = fold(a[:, 0])[None], a_scale.shape
      a_scale = lax.transpose(a_scale, (1, 2, 0, 3)).reshape(1, blocks, size * m)
      (out,) = call(self, rows, b, a_scale, b_scale)
      return (out.reshape(size, 1, m, out.shape[2]),)
    widen = lambda x: jnp.broadcast_to(x, (size, *x.shape))
    alike = (x if own else widen(x) for x, own in zip(args, is_mapped, strict=True))
    (out,) = call(self, *map(fold, alike))
    return (unfold(out, size),)


def dot_blocks(lhs: QTensor, rhs: QTensor) -> jax.Array:
  """Multiplies two stacks of matrices that have scales for blocks of K.

  Each block of K is one FP8 GEMM. Its sums are promoted to float32, scaled, and added::

      sum(lhs[:, :, c] @ rhs[:, :, c].T * outer(lhs.scale[:, c], rhs.scale[:, c]) for c in blocks)

  Returns:
    float32 ``[batch, M, N]``.
  """
  dims = (((2,), (2,)), ((0,), (0,)))

  def scaled(block: tuple[QTensor, QTensor]) -> jax.Array:
    x, y = block
    out = fp8_dot(x.data, y.data, dims, jnp.float32, fast_accumulation=True)
    lhs_scale = jnp.broadcast_to(x.scale[:, :, None], out.shape)
    rhs_scale = jnp.broadcast_to(y.scale[:, None, :], out.shape)
    return dequantize_product(out, lhs_scale, rhs_scale, jnp.float32)

  def add(total: jax.Array, block: tuple[QTensor, QTensor]) -> tuple[jax.Array, None]:
    return total + scaled(block), None

  zeros = jnp.zeros((lhs.data.shape[0], lhs.data.shape[1], rhs.data.shape[1]), jnp.float32)
  if lhs.data.shape[2] == 0:
    return zeros
  blocks = _blocks_first(lhs), _blocks_first(rhs)
  return lax.scan(add, varying.vary_as(zeros, *jax.tree.leaves(blocks)), blocks)[0]


def _blocks_first(q: QTensor) -> QTensor:
  """Returns data ``[K / 128, batch, rows, 128]`` and scales ``[K / 128, batch, rows]``."""
  batch, rows, columns = q.data.shape
  data = q.data.reshape(batch, rows, columns // SIDE, SIDE)
  scale = lax.transpose(by_rows(q), (1, 0, 2))
  return QTensor(lax.transpose(data, (2, 0, 1, 3)), scale)


def by_rows(q: QTensor) -> jax.Array:
  """Returns scales ``[batch, K / 128, rows]``, also if blocks of 128 rows share them."""
  rows = q.data.shape[1]
  if q.scale.shape[2] == rows:
    return q.scale
  return jnp.repeat(q.scale, SIDE, axis=2)[:, :, :rows]
