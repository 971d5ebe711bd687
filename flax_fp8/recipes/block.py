"""Block scaling as in DeepSeek-V3: 1×128 blocks of values, 128×128 blocks of weights."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from flax_fp8.capability import Needs
from flax_fp8.contraction import Gemm, View
from flax_fp8.formats import Format
from flax_fp8.kernels.block_gemm import BlockScaledGemm, by_rows
from flax_fp8.kernels.block_quantize import BlockQuantize, quantize_strips
from flax_fp8.kernels.call import call
from flax_fp8.kernels.tiles import SIDE
from flax_fp8.quantize import QTensor
from flax_fp8.recipes.base import GemmKind, Role, StatelessRecipe, split_key
from flax_fp8.sharding import evenly, explicit_sharding, in_auto


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float8BlockScaling(StatelessRecipe):
  """Scales each 1×128 block of inputs and gradients, and each 128×128 block of kernels.

  Every GEMM sees its operands as stacks of matrices, ``[batch, M, K]`` and ``[batch, N, K]``, and
  cuts K into blocks. Kernels are cut along both axes, once for both of their GEMMs::

      scale = max(|x|, block) / fp8_max                  # rounded up to a power of two
      q = saturating_cast(x / scale)
      out = sum(dot(q_lhs[b], q_rhs[b]) * outer(scale_lhs[b], scale_rhs[b]) for b in blocks of K)

  An outlier affects only its own block. Each sum of 128 terms is promoted to float32 before it is
  added, which Hopper's tensor cores do not do by themselves.

  On NVIDIA GPUs of compute capability 9.0 (H100, H200) two kernels compute this: one reads a tensor
  once and writes it for both GEMMs, and one multiplies. A layer takes three of each, forward and
  backward. The quantizer takes bfloat16 and float16; float32 is quantized in plain JAX. E5M2
  gradients need JAX 0.11. Elsewhere plain JAX computes the same with one GEMM for each block of K,
  which is many times slower on a GPU. ``explain`` then prints the reason.

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
    If the scales of two blocks have a product beyond float32's range, kernels may give NaN for 0.

  Example:
    >>> import flax.linen as nn
    >>> import flax_fp8 as fp8
    >>> layer = nn.Dense(32, dot_general_cls=fp8.Float8BlockScaling().dot_general_cls)

  References:
    DeepSeek-AI, DeepSeek-V3 Technical Report, https://arxiv.org/abs/2412.19437, section 3.3.2;
    Transformer Engine, transformer_engine.common.recipe.Float8BlockScaling.
  """

  in_gemm_layout: ClassVar[bool] = True

  fp8_format: Format = Format.E4M3
  power_of_two: bool = True

  def quantize_by_itself(
    self, x: jax.Array, role: Role, views: tuple[View, View], key: jax.Array | None
  ) -> tuple[QTensor, QTensor]:
    """Quantizes a tensor for both of its GEMMs; kernels with the same values for both.

    Returns:
      For each GEMM, data ``[batch, rows, K]``, with K padded to whole blocks. Scales are
      ``[batch, blocks of K, rows]``; those of kernels ``[batch, blocks of K, blocks of rows]``.
    """
    rows_of_scale = SIDE if role is Role.KERNEL else 1
    shardings = tuple(_sharding(x, view, rows_of_scale) for view in views)
    float8 = self.float8(role)
    one_pass = BlockQuantize(
      format=float8.name, tiles=role is Role.KERNEL, power_of_two=self.power_of_two
    )

    def at_once(x: jax.Array) -> tuple[QTensor, QTensor]:
      flips = _is_natural(views[1])  # then no array is transposed
      data, scale, *of_transpose = call(one_pass, views[flips].matrices(x))
      q, transpose = QTensor(data, scale), QTensor(*of_transpose)
      return (transpose, q) if flips else (q, transpose)

    def one_by_one(x: jax.Array, keys: Any) -> tuple[QTensor, QTensor]:
      first, second = (
        quantize_strips(view.matrices(x), float8, self.power_of_two, key)
        for view, key in zip(views, keys, strict=True)
      )
      return first, second

    if key is None and _are_transposes(*views):
      return in_auto(at_once, shardings, x)
    return in_auto(one_by_one, shardings, x, split_key(key))

  def in_matrices(self, q: QTensor, view: View) -> QTensor:
    """Removes the padding, and gives each element its scale."""
    columns = view.sizes[2]
    scale = jnp.repeat(lax.transpose(by_rows(q), (0, 2, 1)), SIDE, axis=2)
    return QTensor(q.data[:, :, :columns], scale[:, :, :columns])

  def contract(
    self, lhs: QTensor, rhs: QTensor, gemm: Gemm, kind: GemmKind, dtype: Any
  ) -> jax.Array:
    """Multiplies. Sums of each block of K are scaled in float32 before they are added."""
    del kind
    kernel_is_left = lhs.scale.shape[2] < lhs.data.shape[1]  # the GEMM takes it on the right
    kernel_is_right = rhs.scale.shape[2] < rhs.data.shape[1]
    swaps = kernel_is_left or (gemm.is_exchanged and not kernel_is_right)

    def multiply(lhs: QTensor, rhs: QTensor) -> jax.Array:
      a, b = (rhs, lhs) if swaps else (lhs, rhs)
      (out,) = call(
        BlockScaledGemm(out_dtype=jnp.dtype(dtype).name), a.data, b.data, a.scale, b.scale
      )
      if swaps and gemm.is_exchanged:
        return out.reshape([gemm.shape[axis] for axis in gemm.permutation])
      out = lax.transpose(out, (0, 2, 1)) if swaps else out
      return lax.transpose(out.reshape(gemm.shape), gemm.permutation)

    return in_auto(multiply, gemm.sharding, lhs, rhs)

  @property
  def needs(self) -> Needs:
    """The formats. Products are scaled in float32."""
    return Needs(self.fp8_format)


def _is_natural(view: View) -> bool:
  """Tells whether a GEMM sees a tensor's matrices as they are in memory."""
  return view.batch + view.kept + view.contracting == tuple(range(len(view.shape)))


def _are_transposes(first: View, second: View) -> bool:
  """Tells whether two GEMMs see the same matrices, one of them transposed.

  With several contracted axes, their order may differ.
  """
  same_batch = first.batch == second.batch
  return same_batch and (first.kept, first.contracting) == (second.contracting, second.kept)


def _sharding(x: jax.Array, view: View, rows_of_scale: int) -> QTensor | None:
  """Returns shardings of data and scales: as the tensor, if the blocks divide evenly."""
  if (sharding := explicit_sharding(x)) is None:
    return None
  (batch, kept, columns), (by_batch, by_kept, by_columns) = view.sizes, view.mesh_axes(sharding)
  blocks, groups = -(-columns // SIDE), -(-kept // rows_of_scale)
  by_blocks = evenly(sharding, (blocks,), (by_columns,)).spec
  named = by_blocks[0] or () if by_blocks else ()
  names = (named,) if isinstance(named, str) else named
  shardings: tuple[NamedSharding, NamedSharding] = (
    evenly(sharding, (batch, kept, blocks * SIDE), (by_batch, by_kept, names)),
    evenly(sharding, (batch, blocks, groups), (by_batch, names, by_kept)),
  )
  return QTensor(*shardings)  # type: ignore[arg-type]
