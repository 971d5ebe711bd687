"""Delayed scaling: the scale of a step comes from the amaxes of earlier steps.

Quantization then needs no extra pass over the tensor before the cast. The cost is state for each
tensor: a scale and an amax history.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_fp8 import fields
from flax_fp8.amax import amax
from flax_fp8.capability import Needs
from flax_fp8.contraction import Gemm, View
from flax_fp8.formats import E5M2
from flax_fp8.products import dot_per_tensor, scaled_matrices
from flax_fp8.quantize import QTensor, cast_apart, quantize, scale_from_amax
from flax_fp8.recipes.base import GemmKind, Role, StatefulRecipe, TensorState
from flax_fp8.together import together

AmaxComputeAlgo = Literal["max", "most_recent"]
FirstStep = Literal["stored", "current"]
Overflow = Literal["saturate", "current"]


def roll_history(history: jax.Array, newest: jax.Array) -> jax.Array:
  """Writes an amax into slot 0 and drops the oldest one, which was in slot 1.

  ``roll(history, -1).at[0].set(newest)``. A non-finite ``newest`` is recorded as zero, which means
  that no amax was observed.

  Args:
    history: float32; shape ``(length,)``; units of the tensor.
    newest: float32 scalar; units of the tensor.

  Returns:
    The history for the next step; shape of ``history``.
  """
  seen = jnp.where(jnp.isfinite(newest), newest, 0.0).reshape(1)
  return jnp.concatenate([seen, history[2:], history[:1]])[: history.shape[0]]


def next_scale(
  scale: jax.Array,
  history: jax.Array,
  float8_max: float | jax.Array,
  *,
  algo: AmaxComputeAlgo = "max",
  margin: float = 0,
  power_of_two: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Computes the scale of this step from the history of the steps before it.

  ``scale_from_amax(max(history), fallback=scale)``

  Args:
    scale: scale of the previous step; float32; shape ``()`` or ``(1,)``.
    history: float32; shape ``(length,)``.
    float8_max: largest finite value of the format.
    algo: "max" uses the maximum of the history, "most_recent" its newest amax.
    margin: headroom in powers of two.
    power_of_two: rounds the scale up to a power of two.

  Returns:
    The scale and its inverse; float32; shape of ``scale``. If the history is empty, this is the old
    scale.
  """
  largest = jnp.max(history, axis=0) if algo == "max" else history[0]
  largest = jnp.broadcast_to(largest, scale.shape)
  return scale_from_amax(largest, scale, float8_max, margin, power_of_two)


def resize_history(history: jax.Array, length: int, axis: int = -1) -> jax.Array:
  """Resizes an amax history, keeping the newest entries.

  A shorter history drops the oldest entries. A longer history gets zeros as its oldest entries.

  Args:
    history: float32; units of the tensor. Along ``axis``, slot 0 is the newest and slot 1 the
      oldest.
    length: new length; at least 1.
    axis: axis of the slots. Other axes belong to mapped or scanned modules.

  Returns:
    float32; ``length`` slots along ``axis``. Zero means that no amax was observed.
  """
  oldest_first = jnp.roll(history, -1, axis)
  kept = min(length, history.shape[axis])
  newest = lax.slice_in_dim(oldest_first, history.shape[axis] - kept, None, axis=axis)
  padding = [(0, 0)] * history.ndim
  padding[axis] = (length - kept, 0)
  return jnp.roll(jnp.pad(newest, padding), 1, axis)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DelayedScaling(StatefulRecipe):
  """Per-tensor scaling by the amaxes of earlier steps.

  At step t, with ``h`` as the history of the steps before t (slot 0 newest, slot 1 oldest)::

      scale = max(h) / fp8_max * 2**margin          # unchanged while h is empty
      q = saturating_cast(x / scale)
      h = roll(h, -1); h[0] = max(|x|)

  Attributes:
    amax_history_len: number of amaxes stored for each tensor.
    amax_compute_algo: "max" uses the maximum of the history, "most_recent" its newest amax.
    margin: headroom in powers of two. The amax maps to ``fp8_max / 2**margin``.
    interval: number of steps between new scales. Amaxes are recorded at each step.
    first_step: the scale of a tensor while its history is empty. "stored" uses the stored scale,
      see State. "current" computes it from the tensor's own amax. With "current", the cast waits
      for the amax in every step, as in current scaling. Once histories are not empty, "stored"
      gives the same results faster.
    overflow: what to do if a tensor's amax exceeds the range of its scale. "saturate" clamps the
      largest values. "current" computes this step's scale from the tensor's own amax, with the
      margin, so no value saturates. With "current", the cast waits for the amax, as in current
      scaling.
    power_of_two: rounds scales up to powers of two, which makes scaling exact.
    fp8_format: formats of values and of gradients.
    high_precision: which of "fprop", "dgrad" and "wgrad" compute in the dtype of their operands.
    grad_rounding: "nearest" or "stochastic", for output gradients.

  State:
    For each of input, kernel and output_grad: ``scale``, float32 ``(1,)``, and ``amax_history``,
    float32 ``(amax_history_len,)``. Slot 0 is the newest amax, and slot 1 the oldest. If
    ``interval`` is above 1, also ``steps_to_update``, float32 ``(1,)``. Histories are initially
    empty, and scales are 1. For output gradients in E4M3 the scale is initially ``2**-7``, which
    represents gradients down to ``2**-16``, as E5M2 does at scale 1.

  Raises:
    ValueError: ``amax_history_len`` or ``interval`` is below 1; ``amax_compute_algo``,
      ``first_step``, ``overflow``, ``high_precision`` or ``grad_rounding`` is unknown; or
      ``margin`` is not within ±64.
    TypeError: ``fp8_format`` is not a ``Format``, or another field has the wrong type. NumPy
      scalars are accepted, arrays are not.

  Numerics:
    Finite values beyond the scale's range saturate. NaN and infinities give NaN in the output. They
    are never recorded, so the state stays finite. The scale is never zero, infinite or NaN. The
    amax of a tensor is not recorded if both of its GEMMs are in high precision. XLA's CPU code
    flushes subnormal numbers to zero: a product is zero if the product of both scales is below
    2**-126.

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
  interval: int = 1
  first_step: FirstStep = "stored"
  overflow: Overflow = "saturate"
  power_of_two: bool = False

  def __post_init__(self) -> None:
    super().__post_init__()
    advice = {
      "amax_history_len": "For scales without a history, use Float8CurrentScaling.",
      "interval": "With interval=1, each step computes a new scale.",
    }
    for field, text in advice.items():
      value = fields.integer("DelayedScaling", field, getattr(self, field), text)
      object.__setattr__(self, field, value)
    choices_of = {
      "amax_compute_algo": AmaxComputeAlgo,
      "first_step": FirstStep,
      "overflow": Overflow,
    }
    for field, choices in choices_of.items():
      fields.choice("DelayedScaling", field, getattr(self, field), get_args(choices))
    rule = "a number of powers of two within ±64"
    within = lambda margin: -64 <= margin <= 64
    usual = "Typical margins are 0, 1 and 2."
    margin = fields.number("DelayedScaling", "margin", self.margin, rule, within, usual)
    object.__setattr__(self, "margin", margin)

  def init_state(self, role: Role) -> dict[str, np.ndarray]:
    """Returns an empty history, and the scale of the first step."""
    first = 1.0
    if role is Role.OUTPUT_GRAD:
      first = min(1.0, E5M2.smallest_subnormal / self.float8(role).smallest_subnormal)
    state = {
      "scale": np.full((1,), first, np.float32),
      "amax_history": np.zeros((self.amax_history_len,), np.float32),
    }
    if self.interval > 1:
      state["steps_to_update"] = np.zeros((1,), np.float32)
    return state

  def prepare(self, state: Mapping[str, TensorState]) -> dict[str, TensorState]:
    """Computes the scales of all tensors from their histories."""
    limits = [jnp.full((1,), self.float8(Role(role)).max, jnp.float32) for role in state]
    prepared = together(self._prepare, [*state.values()], limits)
    for each in prepared:
      # Without the barrier, XLA computes the inverses in another kernel than the scales.
      each["inverse"] = lax.optimization_barrier(each["inverse"])
    return dict(zip(state, prepared, strict=True))

  def quantize_prepared(
    self,
    x: jax.Array,
    state: TensorState,
    prepared: TensorState,
    role: Role,
    key: jax.Array | None,
    *,
    observed: bool,
  ) -> tuple[QTensor, TensorState]:
    """Quantizes with the scale, and observes the scale and the amax."""
    waits = self.first_step == "current" or self.overflow == "current"
    seen = amax(x, state) if waits or observed else None
    scale, inverse = self._scale(prepared, seen if waits else None, role)
    q = quantize(x, scale.reshape(()), self.float8(role), inverse.reshape(()), key, stale=True)
    observations = {} if seen is None else {"scale": scale, "newest": seen.reshape(1)}
    return cast_apart(q), observations

  def record(
    self, state: Mapping[str, TensorState], seen: Mapping[str, TensorState]
  ) -> dict[str, TensorState]:
    """Stores the scales and adds the amaxes to the histories."""
    new = together(self._record, [state[role] for role in seen], [*seen.values()])
    return dict(zip(seen, new, strict=True))

  def _prepare(self, state: TensorState, float8_max: jax.Array) -> TensorState:
    """Returns the scale and its inverse, and the largest amax if it matters."""
    scale, inverse = self._scale_of_history(state, float8_max)
    if self.interval > 1:
      due, stored = self._is_due(state), state["scale"]
      scale, inverse = jnp.where(due, scale, stored), jnp.where(due, inverse, 1.0 / stored)
    prepared = {"scale": scale, "inverse": inverse}
    if self.first_step == "current":
      prepared["largest"] = jnp.max(state["amax_history"], axis=0).reshape(1)
    return prepared

  def _record(self, state: TensorState, seen: TensorState) -> TensorState:
    """Returns the state after a step with the observed scale and amax."""
    history = roll_history(state["amax_history"], seen["newest"])
    new = {"scale": seen["scale"], "amax_history": history}
    if self.interval > 1:
      due, empty = self._is_due(state), self._is_empty(state)
      waited = jnp.where(due & ~empty, self.interval, state["steps_to_update"]) - 1.0
      new["steps_to_update"] = jnp.maximum(waited, 0.0)
    return new

  @property
  def frozen(self) -> DelayedScaling:
    """The recipe for inference: one amax, a new scale at each step, saturation on overflow."""
    return dataclasses.replace(self, amax_history_len=1, interval=1, overflow="saturate")

  def freeze(self, state: TensorState) -> TensorState:
    """Keeps only the amax that the next scale comes from.

    The amax is -1, which is not a valid amax, if the next scale is the stored one although the
    history is not empty. It marks that the first step is over.
    """
    history = state["amax_history"]
    largest = jnp.max(history, axis=0) if self.amax_compute_algo == "max" else history[0]
    if self.interval > 1:
      largest = jnp.where(self._is_due(state), largest, 0.0)
    if self.first_step == "current":
      largest = jnp.where((largest == 0.0) & ~self._is_empty(state), -1.0, largest)
    return {"scale": state["scale"], "amax_history": largest.reshape(1)}

  def finalize_scale(self, state: TensorState, role: Role) -> TensorState:
    """Computes the scale from the history now, regardless of the interval."""
    scale, _ = self._scale_of_history(state, self.float8(role).max)
    due = {"steps_to_update": jnp.zeros((1,), jnp.float32)} if self.interval > 1 else {}
    return {**state, "scale": scale, **due}

  def in_matrices(self, q: QTensor, view: View) -> QTensor:
    """Returns matrices with one scale for each element."""
    return scaled_matrices(q, view)

  def contract(
    self, lhs: QTensor, rhs: QTensor, gemm: Gemm, kind: GemmKind, dtype: Any
  ) -> jax.Array:
    """Multiplies with one GEMM: fast accumulation in fprop, full accumulation in the others."""
    return dot_per_tensor(
      lhs,
      rhs,
      gemm,
      dtype,
      fast_accumulation=kind is GemmKind.FPROP,
      shared=gemm.shared,
      scales_at_once=True,
    )

  @property
  def needs(self) -> Needs:
    """The formats. Products are scaled in float32."""
    return Needs(self.fp8_format)

  def _scale(
    self, prepared: TensorState, seen: jax.Array | None, role: Role
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the scale of this step and its inverse. They may depend on the amax, if given."""
    scale, inverse = prepared["scale"], prepared["inverse"]
    if seen is None:
      return scale, inverse
    if self.first_step == "current":
      scale, inverse = self._scale_of(seen, prepared["largest"] == 0.0, scale, inverse, role)
    if self.overflow == "current":
      beyond = seen > jnp.float32(self.float8(role).max) * scale
      scale, inverse = self._scale_of(seen, beyond, scale, inverse, role)
    return scale, inverse

  def _scale_of(
    self, seen: jax.Array, where: jax.Array, scale: jax.Array, inverse: jax.Array, role: Role
  ) -> tuple[jax.Array, jax.Array]:
    """Replaces the scale and its inverse by those of an amax, where ``where`` is true."""
    seen = jnp.broadcast_to(seen, scale.shape)
    now, now_inverse = scale_from_amax(
      seen, scale, self.float8(role).max, self.margin, self.power_of_two
    )
    return jnp.where(where, now, scale), jnp.where(where, now_inverse, inverse)

  def _scale_of_history(
    self, state: TensorState, float8_max: float | jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the scale that follows from the history, and its inverse."""
    return next_scale(
      state["scale"],
      state["amax_history"],
      float8_max,
      algo=self.amax_compute_algo,
      margin=self.margin,
      power_of_two=self.power_of_two,
    )

  def _is_due(self, state: TensorState) -> jax.Array:
    return state["steps_to_update"] == 0.0

  def _is_empty(self, state: TensorState) -> jax.Array:
    return jnp.max(state["amax_history"], axis=0) == 0.0
