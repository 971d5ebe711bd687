"""Delayed scaling: the scale of a step comes from the amaxes of earlier steps.

Quantisation then needs no pass over the tensor before the cast. The price is a state per tensor: a
scale and a history of amaxes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from flax_fp8.amax import amax
from flax_fp8.capability import Needs
from flax_fp8.contraction import Axes, Gemm, dot_per_tensor
from flax_fp8.formats import Float8, Format
from flax_fp8.quantize import QTensor, quantize, scale_from_amax
from flax_fp8.recipes.base import GemmKind, Recipe, Role, TensorState

AmaxComputeAlgo = Literal["max", "most_recent"]


def roll_history(history: jax.Array, newest: jax.Array) -> jax.Array:
  """Writes an amax into slot 0 and ages the rest; slot 1 is the oldest.

  ``roll(history, -1).at[0].set(newest)``; a non-finite ``newest`` is recorded as zero, that is, as
  not seen.

  Args:
    history: float32; shape ``(length,)``; units of the tensor.
    newest: float32 scalar.

  Returns:
    The history for the next step; shape of ``history``.
  """
  seen = jnp.where(jnp.isfinite(newest), newest, 0.0).reshape(1)
  return jnp.concatenate([seen, history[2:], history[:1]])[: history.shape[0]]


def next_scale(
  scale: jax.Array,
  history: jax.Array,
  float8: Float8,
  *,
  algo: AmaxComputeAlgo = "max",
  margin: float = 0,
  power_of_two: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Computes the scale of this step from the history of the steps before it.

  ``scale_from_amax(max(history), fallback=scale)``

  Args:
    scale: of the step before; float32; shape ``()`` or ``(1,)``.
    history: float32; shape ``(length,)``.
    float8: the format that the scale is for.
    algo: "max" over the history, or its "most_recent" amax.
    margin: headroom in powers of two.
    power_of_two: rounds scales up to powers of two.

  Returns:
    The scale and its inverse; float32; shape of ``scale``. The old scale where the history is
    empty.
  """
  largest = jnp.max(history, axis=0) if algo == "max" else history[0]
  largest = jnp.broadcast_to(largest, scale.shape)
  return scale_from_amax(largest, scale, float8.max, margin, power_of_two)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DelayedScaling(Recipe):
  """Per-tensor scaling by the amaxes of earlier steps.

  At step t, with ``h`` the amaxes of steps before t::

      scale = max(h) / fp8_max * 2**margin          # unchanged while h is empty
      q = saturating_cast(x / scale)
      h = [max(|x|), *h without its oldest]

  Attributes:
    amax_history_len: number of amaxes kept a tensor.
    amax_compute_algo: "max" over the history or "most_recent".
    margin: headroom in powers of two: the amax is mapped to ``fp8_max / 2**margin``.
    fp8_format: formats of values and of gradients.
    power_of_two: rounds scales up to powers of two, so that scaling itself is exact.

  State:
    For each of input, kernel and output_grad: ``scale``, float32 ``(1,)``, and ``amax_history``,
    float32 ``(amax_history_len,)``, slot 0 newest, slot 1 oldest.

  Raises:
    ValueError: ``amax_history_len`` is below 1, ``amax_compute_algo`` is unknown, or ``margin`` is
      not within ±64.
    TypeError: ``fp8_format`` is no ``Format``.

  Numerics:
    An amax beyond the scale's range saturates. A NaN or infinity reaches the output as NaN or ±max
    and is never recorded, so the state stays finite. The scale is never zero, infinite or NaN.

  Example:
    >>> import flax.linen as nn
    >>> import flax_fp8 as fp8
    >>> recipe = fp8.DelayedScaling(amax_history_len=16)
    >>> layer = nn.Dense(32, dot_general_cls=recipe.dot_general_cls)

  References:
    Transformer Engine, transformer_engine.common.recipe.DelayedScaling; Micikevicius et al., FP8
    Formats for Deep Learning, https://arxiv.org/abs/2209.05433.
  """

  amax_history_len: int = 1024
  amax_compute_algo: AmaxComputeAlgo = "max"
  margin: float = 0
  fp8_format: Format = Format.HYBRID
  power_of_two: bool = False

  def __post_init__(self) -> None:
    if not isinstance(self.amax_history_len, int) or self.amax_history_len < 1:
      raise ValueError(
        "DelayedScaling: amax_history_len must be an integer of at least 1; got "
        f"amax_history_len={self.amax_history_len!r}. For scales without a memory, keep one amax."
      )
    if self.amax_compute_algo not in get_args(AmaxComputeAlgo):
      raise ValueError(
        f"DelayedScaling: amax_compute_algo must be one of {get_args(AmaxComputeAlgo)}; got "
        f"amax_compute_algo={self.amax_compute_algo!r}. Pass one of these strings."
      )
    if not -64 <= self.margin <= 64:
      raise ValueError(
        "DelayedScaling: margin is a number of powers of two within ±64; got "
        f"margin={self.margin!r}. A usual margin is 0, 1 or 2."
      )
    if not isinstance(self.fp8_format, Format):
      raise TypeError(
        f"DelayedScaling: fp8_format must be a Format; got fp8_format={self.fp8_format!r}. Pass "
        "Format.HYBRID, Format.E4M3, or Format(forward, backward)."
      )

  def init_state(self, role: Role) -> dict[str, np.ndarray]:
    """Scale 1 and an empty history."""
    del role
    return {
      "scale": np.ones((1,), np.float32),
      "amax_history": np.zeros((self.amax_history_len,), np.float32),
    }

  def quantize(
    self, x: jax.Array, state: TensorState, role: Role, contracting: tuple[Axes, Axes]
  ) -> tuple[tuple[QTensor, QTensor], jax.Array]:
    """Quantises once for both GEMMs; observes the amax."""
    del contracting
    scale, inverse = (value.reshape(()) for value in self._scale(state, role))
    q = quantize(x, scale, self._float8(role), inverse)
    return (q, q), amax(x, state)

  def update(self, state: TensorState, observation: Any, role: Role) -> TensorState:
    """Keeps the scale that this step used, and records its amax."""
    return {
      "scale": self._scale(state, role)[0],
      "amax_history": roll_history(state["amax_history"], observation),
    }

  def contract(
    self, lhs: QTensor, rhs: QTensor, gemm: Gemm, kind: GemmKind, dtype: Any
  ) -> jax.Array:
    """One GEMM; fast accumulation going forward, full going backward."""
    fast = kind is GemmKind.FPROP
    return dot_per_tensor(lhs, rhs, gemm, dtype, fast_accumulation=fast)

  @property
  def needs(self) -> Needs:
    """The formats; products are scaled in float32."""
    return Needs(self.fp8_format)

  def _float8(self, role: Role) -> Float8:
    backward = role is Role.OUTPUT_GRAD
    return self.fp8_format.backward if backward else self.fp8_format.forward

  def _scale(self, state: TensorState, role: Role) -> tuple[jax.Array, jax.Array]:
    return next_scale(
      state["scale"],
      state["amax_history"],
      self._float8(role),
      algo=self.amax_compute_algo,
      margin=self.margin,
      power_of_two=self.power_of_two,
    )
