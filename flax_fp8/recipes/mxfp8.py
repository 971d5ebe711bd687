"""MXFP8: one power-of-two scale for each 32 values, which the matrix units apply."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from flax_fp8 import fields
from flax_fp8.amax import largest_magnitude
from flax_fp8.capability import Needs
from flax_fp8.contraction import Gemm, View, in_blocks
from flax_fp8.formats import Float8, Format
from flax_fp8.products import dot_microscaled
from flax_fp8.quantize import QTensor, quantize
from flax_fp8.recipes.base import GemmKind, Role, StatelessRecipe, split_key
from flax_fp8.sharding import evenly, explicit_sharding, in_auto

BLOCK = 32
ScaleRounding = Literal["up", "down"]

# Codes of float8_e8m0fnu, biased exponents. Code 0, 2**-127, is not a normal float32, so unused.
_SMALLEST_CODE, _ONE, _LARGEST_CODE, _NAN = 1, 127, 254, 255


def microscale(amax: jax.Array, float8: Float8, rounding: ScaleRounding = "up") -> jax.Array:
  """Computes block scales as codes of float8_e8m0fnu.

  ``"up"`` gives the smallest power of two that keeps ``amax`` in range,
  ``2**ceil(log2(amax / fp8_max))``. ``"down"`` gives the scale of the OCP specification,
  ``2**(floor(log2(amax)) - floor(log2(fp8_max)))``, with which the amax may saturate.

  Args:
    amax: largest magnitudes of the blocks; float32; any shape.
    float8: the format of the values.
    rounding: "up" or "down".

  Returns:
    Codes in uint8; shape of ``amax``. The dequantization multiplier is ``2**(code - 127)``.

  Numerics:
    Exact, since exponents and mantissas are compared as integers. The scale is 1 if the amax is
    zero, and NaN if it is NaN or infinite. It is at least ``2**-126``.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8 import formats
    >>> from flax_fp8.recipes.mxfp8 import microscale
    >>> amax = jnp.array([448.0, 449.0, 0.0])
    >>> microscale(amax, formats.E4M3), microscale(amax, formats.E4M3, "down")
    (Array([127, 128, 127], dtype=uint8), Array([127, 127, 127], dtype=uint8))

  References:
    OCP Microscaling Formats (MX) Specification, version 1.0, section 6.3; Mishra et al., Recipes
    for Pre-training LLMs with MXFP8, https://arxiv.org/abs/2506.08027, section 3.
  """
  bits = lax.bitcast_convert_type(amax, jnp.int32)
  largest = int(np.float32(float8.max).view(np.int32))
  code = (bits >> 23) - (largest >> 23) + _ONE
  if rounding == "up":
    mantissa = 0x7FFFFF
    code = code + ((bits & mantissa) > (largest & mantissa)).astype(jnp.int32)
  code = jnp.clip(code, _SMALLEST_CODE, _LARGEST_CODE)
  code = jnp.where(amax == 0.0, _ONE, jnp.where(jnp.isfinite(amax), code, _NAN))
  return code.astype(jnp.uint8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MXFP8BlockScaling(StatelessRecipe):
  """Scales each block of 32 values along a GEMM's contracted axis by a power of two.

  For each GEMM, with its operands as matrices ``[batch, M, K]`` and ``[batch, N, K]``::

      scale = 2**ceil(log2(max(|x|, block of 32) / fp8_max))      # float8_e8m0fnu
      q = saturating_cast(x / scale)
      out = einsum("bmk,bnk->bmn", q_lhs * scale_lhs, q_rhs * scale_rhs)

  Matrix units apply the scales (``jax.nn.scaled_matmul``) on NVIDIA GPUs from Blackwell and on AMD
  gfx95x. On other GPUs this recipe is not faster than BF16, so the modules raise an error there
  unless ``emulate=True``.

  Attributes:
    scale_rounding: "up" keeps each amax in range, as Transformer Engine and JAX do. "down" is the
      conversion of the OCP specification, with which an amax may saturate.
    fp8_format: formats of values and of gradients.
    high_precision: which of "fprop", "dgrad" and "wgrad" compute in the dtype of their operands.
    grad_rounding: "nearest" or "stochastic", for output gradients.

  State:
    None. The model has the same variables as without FP8.

  Raises:
    TypeError: ``fp8_format`` is not a ``Format``.
    ValueError: ``scale_rounding``, ``high_precision`` or ``grad_rounding`` is unknown.

  Numerics:
    Scaling is exact. If dequantized values are multiplied, a value that rounds up to ``2**128`` is
    clamped to the largest bfloat16 value. Sizes that are not multiples of 32 are padded with zeros,
    which changes neither scales nor sums. A block of zeros has scale 1. A block with a NaN or an
    infinity has scale NaN, and all results that sum over it are NaN. Several contracted axes are
    merged into one, in their order.

  Example:
    >>> import flax.linen as nn
    >>> import flax_fp8 as fp8
    >>> layer = nn.Dense(32, dot_general_cls=fp8.MXFP8BlockScaling().dot_general_cls)

  References:
    OCP Microscaling Formats (MX) Specification, version 1.0; Mishra et al., Recipes for
    Pre-training LLMs with MXFP8, https://arxiv.org/abs/2506.08027; jax.nn.scaled_matmul.
  """

  in_gemm_layout: ClassVar[bool] = True

  fp8_format: Format = Format.E4M3
  scale_rounding: ScaleRounding = "up"

  def __post_init__(self) -> None:
    super().__post_init__()
    choices = get_args(ScaleRounding)
    fields.choice("MXFP8BlockScaling", "scale_rounding", self.scale_rounding, choices)

  def quantize_by_itself(
    self, x: jax.Array, role: Role, views: tuple[View, View], key: jax.Array | None
  ) -> tuple[QTensor, QTensor]:
    """Quantizes once for each GEMM, along the axes that it contracts.

    Returns:
      Data ``[batch, rows, K]`` and scales ``[batch, rows, K / 32]``.
    """
    shardings = tuple(_sharding(x, view) for view in views)
    blocks = lambda x, keys: (
      self._blocks(x, role, views[0], keys[0]),
      self._blocks(x, role, views[1], keys[1]),
    )
    return in_auto(blocks, shardings, x, split_key(key))

  def _blocks(self, x: jax.Array, role: Role, view: View, key: jax.Array | None) -> QTensor:
    float8 = self.float8(role)
    blocks = in_blocks(view.matrices(x), 1, BLOCK)
    codes = microscale(largest_magnitude(blocks, (4,)), float8, self.scale_rounding)
    e8m0 = lax.bitcast_convert_type(codes, jnp.float8_e8m0fnu)
    scale = e8m0.astype(jnp.float32)
    data = quantize(blocks, scale, float8, 1.0 / scale, key).data
    batch, rows, _, chunks, _ = blocks.shape
    return QTensor(data.reshape(batch, rows, chunks * BLOCK), e8m0.reshape(batch, rows, chunks))

  def in_matrices(self, q: QTensor, view: View) -> QTensor:
    """Returns matrices with one scale for each element."""
    columns = view.sizes[2]
    scale = jnp.repeat(q.scale.astype(jnp.float32), BLOCK, axis=2)
    return QTensor(q.data[:, :, :columns], scale[:, :, :columns])

  def contract(
    self, lhs: QTensor, rhs: QTensor, gemm: Gemm, kind: GemmKind, dtype: Any
  ) -> jax.Array:
    """Multiplies with one GEMM that applies the block scales, with full accumulation."""
    del kind

    def multiply(lhs: QTensor, rhs: QTensor) -> jax.Array:
      out = dot_microscaled(lhs, rhs, dtype).reshape(gemm.shape)
      return lax.transpose(out, gemm.permutation)

    return in_auto(multiply, gemm.sharding, lhs, rhs)

  @property
  def needs(self) -> Needs:
    """The formats, and matrix units that apply E8M0 block scales."""
    return Needs(self.fp8_format, block_scales=jnp.float8_e8m0fnu)


def _sharding(x: jax.Array, view: View) -> NamedSharding | None:
  """Returns the sharding of blocks and scales: as the tensor, if the blocks divide evenly."""
  if (sharding := explicit_sharding(x)) is None:
    return None
  batch, kept, columns = view.sizes
  return evenly(sharding, (batch, kept, -(-columns // BLOCK)), view.mesh_axes(sharding))
