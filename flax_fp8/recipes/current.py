"""Current scaling: one scale per tensor, computed from the tensor itself, without state."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from flax_fp8.capability import Needs
from flax_fp8.contraction import Gemm, View
from flax_fp8.products import dot_per_tensor, scaled_matrices
from flax_fp8.quantize import QTensor, cast_apart, current_scale, quantize
from flax_fp8.recipes.base import GemmKind, Role, StatelessRecipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float8CurrentScaling(StatelessRecipe):
  """Per-tensor scaling by the tensor's own amax.

  ::

      scale = max(|x|) / fp8_max
      q = saturating_cast(x / scale)

  The scale always fits the tensor: nothing saturates, and there is no state. The cost is that the
  tensor is read twice, once for its amax and once for the cast.

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
    A tensor of zeros has scale 1. A tensor with a NaN or an infinity has scale NaN, and the product
    is NaN. Under ``vmap`` each slice has its own scale, and under ``shard_map`` each device's part.
    Under ``jit`` with shardings the amax is taken over the whole tensor.

  Example:
    >>> import flax.linen as nn
    >>> import flax_fp8 as fp8
    >>> layer = nn.Dense(32, dot_general_cls=fp8.Float8CurrentScaling().dot_general_cls)

  References:
    Transformer Engine, transformer_engine.common.recipe.Float8CurrentScaling.
  """

  power_of_two: bool = False

  def quantize_by_itself(
    self, x: jax.Array, role: Role, views: tuple[View, View], key: jax.Array | None
  ) -> tuple[QTensor, QTensor]:
    """Quantizes once for both GEMMs."""
    del views
    float8 = self.float8(role)
    scale, inverse = current_scale(x, float8, power_of_two=self.power_of_two)
    q = cast_apart(quantize(x, scale, float8, inverse, key))
    return q, q

  def in_matrices(self, q: QTensor, view: View) -> QTensor:
    """Returns matrices with one scale for each element."""
    return scaled_matrices(q, view)

  def contract(
    self, lhs: QTensor, rhs: QTensor, gemm: Gemm, kind: GemmKind, dtype: Any
  ) -> jax.Array:
    """Multiplies with one GEMM: fast accumulation in fprop, full accumulation in the others."""
    fast = kind is GemmKind.FPROP
    return dot_per_tensor(lhs, rhs, gemm, dtype, fast_accumulation=fast, shared=gemm.shared)

  @property
  def needs(self) -> Needs:
    """The formats. Products are scaled in float32."""
    return Needs(self.fp8_format)
