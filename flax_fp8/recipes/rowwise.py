"""Rowwise scaling: one scale for all values that one element of a GEMM's result sums over."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from flax_fp8.capability import Needs
from flax_fp8.contraction import Gemm, View
from flax_fp8.formats import Format
from flax_fp8.products import dot_per_row, scaled_matrices
from flax_fp8.quantize import QTensor, current_scale, quantize, round_in_place
from flax_fp8.recipes.base import GemmKind, Role, StatelessRecipe, split_key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float8RowwiseScaling(StatelessRecipe):
  """Scales each row of the left operand and each column of the right operand of every GEMM.

  For each GEMM, along the axes that it contracts::

      scale = max(|x|, contracted axes) / fp8_max
      q = saturating_cast(x / scale)
      out = dot_general(q_lhs, q_rhs) * outer(scale_lhs, scale_rhs)

  An outlier affects only its own row. The cost is that each tensor is quantized twice, once for
  each of its two GEMMs. ``high_precision=("wgrad",)`` computes the weight gradient without FP8.

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
    A row of zeros has scale 1. A row with a NaN or an infinity has scale NaN, and all results that
    sum over it are NaN. The sums of a large bfloat16 product are rounded to bfloat16 before and
    after they are scaled. With ``power_of_two`` the first rounding changes nothing. Under
    ``shard_map`` rows are those of one device's part. Under ``jit`` with shardings rows are those
    of the whole array. All sizes are supported.

  Example:
    >>> import flax.linen as nn
    >>> import flax_fp8 as fp8
    >>> recipe = fp8.Float8RowwiseScaling(high_precision=("wgrad",))
    >>> layer = nn.Dense(32, dot_general_cls=recipe.dot_general_cls)

  References:
    torchao, torchao.float8, recipes "rowwise" and "rowwise_with_gw_hp".
  """

  fp8_format: Format = Format.E4M3
  power_of_two: bool = False

  def quantize_by_itself(
    self, x: jax.Array, role: Role, views: tuple[View, View], key: jax.Array | None
  ) -> tuple[QTensor, QTensor]:
    """Quantizes once for each GEMM, along the axes that it contracts."""
    float8 = self.float8(role)
    x = round_in_place(x)

    def along(view: View, key: jax.Array | None) -> QTensor:
      scale, inverse = current_scale(x, float8, view.contracting, self.power_of_two)
      return quantize(x, scale, float8, inverse, key)

    first, second = split_key(key)
    return along(views[0], first), along(views[1], second)

  def in_matrices(self, q: QTensor, view: View) -> QTensor:
    """Returns matrices with one scale for each element."""
    return scaled_matrices(q, view)

  def contract(
    self, lhs: QTensor, rhs: QTensor, gemm: Gemm, kind: GemmKind, dtype: Any
  ) -> jax.Array:
    """Multiplies with one GEMM and applies the scales after it. Only fprop accumulates fast."""
    fast = kind is GemmKind.FPROP
    return dot_per_row(lhs, rhs, gemm, dtype, fast_accumulation=fast)

  @property
  def needs(self) -> Needs:
    """The formats. Products are scaled in float32."""
    return Needs(self.fp8_format)
