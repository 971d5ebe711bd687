"""Block scaling as in DeepSeek-V3: values in strips of 128, weights in tiles of 128 by 128."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_fp8.capability import Needs
from flax_fp8.contraction import Gemm, View, pad_to_multiple
from flax_fp8.formats import Format
from flax_fp8.products import dot_chunks
from flax_fp8.quantize import QTensor, current_scale, quantize
from flax_fp8.recipes.base import GemmKind, Recipe, Role, TensorState, split_key

BLOCK = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float8BlockScaling(Recipe):
  """A scale for each 1×128 block of inputs and gradients, and each 128×128 block of kernels.

  Every GEMM sees its operands as stacks of matrices, ``[batch, M, K]`` and ``[batch, N, K]``, and
  cuts K into blocks; kernels are cut along both axes, once for both of their GEMMs::

      scale = max(|x|, block) / fp8_max                  # rounded up to a power of two
      q = saturating_cast(x / scale)
      out = sum(dot(q_lhs[b], q_rhs[b]) * outer(scale_lhs[b], scale_rhs[b]) for b in blocks of K)

  An outlier spoils 128 values at most, and no sum is longer than 128 before it is float32, which
  Hopper's tensor cores do not do by themselves. The price is a GEMM for each block of K: this is
  the plain path, right everywhere; it is not fast on a GPU.

  Attributes:
    fp8_format: formats of values and of gradients.
    power_of_two: rounds scales up to powers of two, so that scaling itself is exact.
    high_precision: which of "fprop", "dgrad" and "wgrad" are left in the dtype of their operands.
    grad_rounding: "nearest" or "stochastic", for output gradients.

  State:
    None; the model's variables are those of the model without FP8.

  Raises:
    TypeError: ``fp8_format`` is no ``Format``.
    ValueError: ``high_precision`` or ``grad_rounding`` is unknown.

  Numerics:
    Sizes that are no multiples of 128 are padded with zeros, which changes neither scales nor sums.
    A block of zeros has scale 1. One that holds a NaN or an infinity has scale NaN, and so have the
    elements of the product that sum over it. Several contracted axes count as one, in their order.

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

  def init_state(self, role: Role) -> dict[str, np.ndarray]:
    """No state."""
    del role
    return {}

  def quantize(
    self,
    x: jax.Array,
    state: TensorState,
    role: Role,
    views: tuple[View, View],
    key: jax.Array | None,
  ) -> tuple[tuple[QTensor, QTensor], None]:
    """Quantises kernels once for both GEMMs; other tensors once for each, along what it contracts.

    Returns:
      Data ``[chunks, batch, rows, 128]`` and scales ``[chunks, batch, rows]``; and no observation.
    """
    del state
    if role is Role.KERNEL:
      return self._tiles(x, views, key), None
    first, second = split_key(key)
    return (self._strips(x, role, views[0], first), self._strips(x, role, views[1], second)), None

  def _strips(self, x: jax.Array, role: Role, view: View, key: jax.Array | None) -> QTensor:
    """Quantises in blocks of 1×128."""
    padded = pad_to_multiple(view.matrices(x), (1, 1, BLOCK))
    chunks = jnp.moveaxis(padded.reshape(*padded.shape[:2], -1, BLOCK), 2, 0)
    float8 = self.float8(role)
    scale, inverse = current_scale(chunks, float8, (3,), self.power_of_two)
    return QTensor(quantize(chunks, scale, float8, inverse, key).data, scale[..., 0])

  def _tiles(
    self, x: jax.Array, views: tuple[View, View], key: jax.Array | None
  ) -> tuple[QTensor, QTensor]:
    """Quantises in blocks of 128×128, the same values and scales for both GEMMs."""
    matrices = views[0].matrices(x)
    batch, rows, columns = matrices.shape
    padded = pad_to_multiple(matrices, (1, BLOCK, BLOCK))
    tiles = padded.reshape(batch, padded.shape[1] // BLOCK, BLOCK, -1, BLOCK)
    float8 = self.float8(Role.KERNEL)
    scale, inverse = current_scale(tiles, float8, (2, 4), self.power_of_two)
    q = quantize(tiles, scale, float8, inverse, key)
    transposed = jax.tree.map(lambda x: lax.transpose(x, (0, 3, 4, 1, 2)), q)
    return _as_strips(q, rows), _as_strips(transposed, columns)

  def update(self, state: TensorState, observation: Any, role: Role) -> TensorState:
    """No state."""
    del observation, role
    return state

  def contract(
    self, lhs: QTensor, rhs: QTensor, gemm: Gemm, kind: GemmKind, dtype: Any
  ) -> jax.Array:
    """A GEMM for each block of the contracted axis, added in float32."""
    del kind
    out = dot_chunks(lhs, rhs).reshape(gemm.shape)
    return lax.transpose(out, gemm.permutation).astype(dtype)

  @property
  def needs(self) -> Needs:
    """The formats; products are scaled in float32."""
    return Needs(self.fp8_format)


def _as_strips(tiles: QTensor, rows: int) -> QTensor:
  """Cuts tiles ``[batch, row blocks, 128, chunks, 128]`` into chunks, with a scale for each row."""
  data, scale = (lax.transpose(x, (3, 0, 1, 2, 4)) for x in (tiles.data, tiles.scale))
  chunks, batch = data.shape[:2]
  scale = jnp.broadcast_to(scale, (*data.shape[:-1], 1))
  return QTensor(
    data.reshape(chunks, batch, -1, BLOCK)[:, :, :rows],
    scale.reshape(chunks, batch, -1)[:, :, :rows],
  )
