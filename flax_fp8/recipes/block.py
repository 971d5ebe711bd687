"""Block scaling as in DeepSeek-V3: 1×128 blocks of values, 128×128 blocks of weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from flax_fp8.capability import Needs
from flax_fp8.contraction import Gemm, View, in_blocks
from flax_fp8.formats import Format
from flax_fp8.products import dot_chunks
from flax_fp8.quantize import QTensor, current_scale, quantize
from flax_fp8.recipes.base import GemmKind, Role, StatelessRecipe, split_key
from flax_fp8.sharding import evenly, explicit_sharding, in_auto

BLOCK = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float8BlockScaling(StatelessRecipe):
  """Scales each 1×128 block of inputs and gradients, and each 128×128 block of kernels.

  Every GEMM sees its operands as stacks of matrices, ``[batch, M, K]`` and ``[batch, N, K]``, and
  cuts K into blocks. Kernels are cut along both axes, once for both of their GEMMs::

      scale = max(|x|, block) / fp8_max                  # rounded up to a power of two
      q = saturating_cast(x / scale)
      out = sum(dot(q_lhs[b], q_rhs[b]) * outer(scale_lhs[b], scale_rhs[b]) for b in blocks of K)

  An outlier affects only its own block. Each sum of 128 terms is promoted to float32 before it is
  added, which Hopper's tensor cores do not do by themselves. The cost is one GEMM for each block of
  K. This plain JAX path is correct on every platform, but it is not fast on a GPU.

  Attributes:
    fp8_format: formats of values and of gradients.
    power_of_two: rounds scales up to powers of two, which makes scaling exact.
    high_precision: which of "fprop", "dgrad" and "wgrad" compute in the dtype of their operands.
    grad_rounding: "nearest" or "stochastic", for output gradients.

  State:
    None. The model has the same variables as without FP8.

  Raises:
    TypeError: ``fp8_format`` is not a ``Format``.
    ValueError: ``high_precision`` or ``grad_rounding`` is unknown.

  Numerics:
    Sizes that are not multiples of 128 are padded with zeros, which changes neither scales nor
    sums. A block of zeros has scale 1. A block with a NaN or an infinity has scale NaN, and all
    results that sum over it are NaN. Several contracted axes are merged into one, in their order.

  Example:
    >>> import flax.linen as nn
    >>> import flax_fp8 as fp8
    >>> layer = nn.Dense(32, dot_general_cls=fp8.Float8BlockScaling().dot_general_cls)

  References:
    DeepSeek-AI, DeepSeek-V3 Technical Report, https://arxiv.org/abs/2412.19437, section 3.3.2;
    Transformer Engine, transformer_engine.common.recipe.Float8BlockScaling.
  """

  fp8_format: Format = Format.E4M3
  power_of_two: bool = True

  def quantize_by_itself(
    self, x: jax.Array, role: Role, views: tuple[View, View], key: jax.Array | None
  ) -> tuple[QTensor, QTensor]:
    """Quantizes kernels once for both GEMMs, and other tensors once for each GEMM.

    Returns:
      Data ``[chunks, batch, rows, 128]`` and scales ``[chunks, batch, rows]``.
    """
    first, second = (_sharding(x, view) for view in views)
    if role is Role.KERNEL:
      return in_auto(lambda x: self._tiles(x, views), (first, second), x)
    strips = lambda x, keys: (
      self._strips(x, role, views[0], keys[0]),
      self._strips(x, role, views[1], keys[1]),
    )
    return in_auto(strips, (first, second), x, split_key(key))

  def _strips(self, x: jax.Array, role: Role, view: View, key: jax.Array | None) -> QTensor:
    """Quantizes in blocks of 1×128."""
    matrices = view.matrices(x)
    blocks = in_blocks(matrices, 1, BLOCK)
    return _chunks(self._quantize_blocks(blocks, role, key), matrices.shape[1])

  def _tiles(self, x: jax.Array, views: tuple[View, View]) -> tuple[QTensor, QTensor]:
    """Quantizes in blocks of 128×128. Both GEMMs take the same values and scales."""
    matrices = views[0].matrices(x)
    _, rows, columns = matrices.shape
    q = self._quantize_blocks(in_blocks(matrices, BLOCK, BLOCK), Role.KERNEL, None)
    transposed = jax.tree.map(lambda x: lax.transpose(x, (0, 3, 4, 1, 2)), q)
    return _chunks(q, rows), _chunks(transposed, columns)

  def _quantize_blocks(self, blocks: jax.Array, role: Role, key: jax.Array | None) -> QTensor:
    float8 = self.float8(role)
    scale, inverse = current_scale(blocks, float8, (2, 4), self.power_of_two)
    return quantize(blocks, scale, float8, inverse, key)

  def in_matrices(self, q: QTensor, view: View) -> QTensor:
    """Joins the blocks of each row."""
    columns = view.sizes[2]

    def join(x: jax.Array) -> jax.Array:
      chunks, batch, rows, width = x.shape
      return lax.transpose(x, (1, 2, 0, 3)).reshape(batch, rows, chunks * width)[:, :, :columns]

    return QTensor(join(q.data), join(jnp.broadcast_to(q.scale[..., None], q.data.shape)))

  def contract(
    self, lhs: QTensor, rhs: QTensor, gemm: Gemm, kind: GemmKind, dtype: Any
  ) -> jax.Array:
    """Multiplies with one GEMM per block of the contracted axis, and adds in float32."""
    del kind

    def multiply(lhs: QTensor, rhs: QTensor) -> jax.Array:
      out = dot_chunks(lhs, rhs).reshape(gemm.shape)
      return lax.transpose(out, gemm.permutation).astype(dtype)

    return in_auto(multiply, gemm.sharding, lhs, rhs)

  @property
  def needs(self) -> Needs:
    """The formats. Products are scaled in float32."""
    return Needs(self.fp8_format)


def _sharding(x: jax.Array, view: View) -> NamedSharding | None:
  """Returns the sharding of chunks and scales: as the tensor, if the chunks divide evenly."""
  if (sharding := explicit_sharding(x)) is None:
    return None
  batch, kept, columns = view.sizes
  by_batch, by_kept, by_columns = view.mesh_axes(sharding)
  return evenly(sharding, (-(-columns // BLOCK), batch, kept), (by_columns, by_batch, by_kept))


def _chunks(blocks: QTensor, rows: int) -> QTensor:
  """Moves the contracted chunks first, and gives each of the first ``rows`` rows its own scale.

  Args:
    blocks: data ``[batch, blocks of rows, rows of a block, chunks, 128]``. The scale has size 1
      along the axes of a block.
    rows: number of rows before padding.

  Returns:
    Data ``[chunks, batch, rows, 128]`` and scales ``[chunks, batch, rows]``.
  """
  data, scale = (lax.transpose(x, (3, 0, 1, 2, 4)) for x in (blocks.data, blocks.scale))
  chunks, batch, height, width = data.shape[:4]
  scale = jnp.broadcast_to(scale, (chunks, batch, height, width, 1))
  return QTensor(
    data.reshape(chunks, batch, height * width, BLOCK)[:, :, :rows],
    scale.reshape(chunks, batch, height * width)[:, :, :rows],
  )
