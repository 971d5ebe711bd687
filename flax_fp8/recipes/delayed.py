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
from jax import lax

from flax_fp8 import fields
from flax_fp8.amax import amax
from flax_fp8.capability import Needs
from flax_fp8.contraction import Gemm, View
from flax_fp8.products import dot_per_tensor, scaled_matrices
from flax_fp8.quantize import QTensor, quantize, scale_from_amax
from flax_fp8.recipes.base import GemmKind, Role, StatefulRecipe, TensorState

AmaxComputeAlgo = Literal["max", "most_recent"]
FirstStep = Literal["stored", "current"]
Overflow = Literal["saturate", "current"]


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
  # Without the barrier, XLA has one thread of the kernel below reduce what is left of the tensor.
  newest = lax.optimization_barrier(newest)
  seen = jnp.where(jnp.isfinite(newest), newest, 0.0).reshape(1)
  return jnp.concatenate([seen, history[2:], history[:1]])[: history.shape[0]]


def next_scale(
  scale: jax.Array,
  history: jax.Array,
  float8_max: float,
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
    float8_max: largest value of the format that the scale is for.
    algo: "max" over the history, or its "most_recent" amax.
    margin: headroom in powers of two.
    power_of_two: rounds the scale up to a power of two.

  Returns:
    The scale and its inverse; float32; shape of ``scale``. The old scale where the history is
    empty.
  """
  largest = jnp.max(history, axis=0) if algo == "max" else history[0]
  largest = jnp.broadcast_to(largest, scale.shape)
  return scale_from_amax(largest, scale, float8_max, margin, power_of_two)


def resize_history(history: jax.Array, length: int, axis: int = -1) -> jax.Array:
  """Gives a history another length, as if it had always had that, so far as it remembers.

  Oldest first, ``roll(history, -1)``, it loses its first entries, or zeros come before them.

  Args:
    history: float32; units of the tensor; along ``axis``, slot 0 newest, slot 1 oldest.
    length: at least 1.
    axis: of the slots; other axes are those of mapped or scanned modules.

  Returns:
    float32; ``length`` slots along ``axis``. Amaxes that a longer history would still remember are
    zero, that is, not seen.
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

  At step t, with ``h`` the amaxes of steps before t::

      scale = max(h) / fp8_max * 2**margin          # unchanged while h is empty
      q = saturating_cast(x / scale)
      h = [max(|x|), *h without its oldest]

  Attributes:
    amax_history_len: number of amaxes kept a tensor.
    amax_compute_algo: "max" over the history or "most_recent".
    margin: headroom in powers of two: the amax is mapped to ``fp8_max / 2**margin``.
    interval: steps from one new scale to the next; amaxes are recorded at each step.
    first_step: what scales a tensor while its history is empty: the "stored" scale, which is 1 in
      fresh state, or the tensor's "current" amax. Then the cast waits for the amax in every step,
      as in current scaling; once histories are filled, "stored" gives the same, faster.
    overflow: what becomes of a tensor whose amax is beyond the range of its scale: its largest
      values "saturate", or its "current" amax scales it in this step, with the margin, and no value
      saturates. Then the cast waits for the amax, as in current scaling.
    power_of_two: rounds scales up to powers of two, so that scaling itself is exact.
    fp8_format: formats of values and of gradients.
    high_precision: which of "fprop", "dgrad" and "wgrad" are left in the dtype of their operands.
    grad_rounding: "nearest" or "stochastic", for output gradients.

  State:
    For each of input, kernel and output_grad: ``scale``, float32 ``(1,)``, and ``amax_history``,
    float32 ``(amax_history_len,)``, slot 0 newest, slot 1 oldest. With an ``interval`` above 1 also
    ``steps_to_update``, float32 ``(1,)``.

  Raises:
    ValueError: ``amax_history_len`` or ``interval`` is below 1, ``amax_compute_algo``,
      ``first_step`` or ``overflow`` is unknown, ``margin`` is not within ±64, or ``high_precision``
      or ``grad_rounding`` is unknown.
    TypeError: ``fp8_format`` is no ``Format``, or another field is not of its type; NumPy's scalars
      count as Python's, arrays do not.

  Numerics:
    A finite value beyond the scale's range saturates. NaN or an infinity reaches the output as NaN
    and is never recorded, so the state stays finite. The scale is never zero, infinite or NaN. A
    tensor whose GEMMs are all in high precision is not observed. On a CPU, which has no subnormal
    numbers, a product is zero where the product of both scales is below 2**-126.

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
      "amax_history_len": "For scales without a memory, take Float8CurrentScaling.",
      "interval": "1 makes a new scale at each step.",
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
    usual = "A usual margin is 0, 1 or 2."
    margin = fields.number("DelayedScaling", "margin", self.margin, rule, within, usual)
    object.__setattr__(self, "margin", margin)

  def init_state(self, role: Role) -> dict[str, np.ndarray]:
    """Scale 1 and an empty history."""
    del role
    state = {
      "scale": np.ones((1,), np.float32),
      "amax_history": np.zeros((self.amax_history_len,), np.float32),
    }
    if self.interval > 1:
      state["steps_to_update"] = np.zeros((1,), np.float32)
    return state

  def quantize(
    self,
    x: jax.Array,
    state: TensorState,
    role: Role,
    views: tuple[View, View],
    key: jax.Array | None = None,
    *,
    observed: bool = True,
  ) -> tuple[tuple[QTensor, QTensor], TensorState]:
    """Quantizes once for both GEMMs; keeps the scale, and records the amax."""
    del views
    waits = self.first_step == "current" or self.overflow == "current"
    seen = amax(x, state) if waits or observed else None
    scale, inverse = self._scale(state, seen if waits else None, role)
    q = quantize(x, scale.reshape(()), self.float8(role), inverse.reshape(()), key, stale=True)
    if seen is None:
      return (q, q), state
    if not waits:
      # One kernel casts and finds the amax. Without the barrier XLA makes it a kernel that casts
      # and transposes, and reads the tensor again for the amax.
      q = QTensor(lax.optimization_barrier(q.data), q.scale)
    return (q, q), self._record(state, scale, seen)

  def _record(self, state: TensorState, scale: jax.Array, seen: jax.Array) -> TensorState:
    """Returns the state after a step that used a scale and saw an amax."""
    new = {"scale": scale, "amax_history": roll_history(state["amax_history"], seen)}
    if self.interval > 1:
      due, empty = self._is_due(state), self._is_empty(state)
      waited = jnp.where(due & ~empty, self.interval, state["steps_to_update"]) - 1.0
      new["steps_to_update"] = jnp.maximum(waited, 0.0)
    return new

  @property
  def frozen(self) -> DelayedScaling:
    """A history of one amax; of tensors that were seen, no reason to look at them."""
    return dataclasses.replace(self, amax_history_len=1, interval=1, overflow="saturate")

  def freeze(self, state: TensorState) -> TensorState:
    """Keeps of the history the one amax that the scale comes from.

    It is negative, which is no amax, where the scale comes from the one before, but the history is
    not empty: the first step is over.
    """
    history = state["amax_history"]
    largest = jnp.max(history, axis=0) if self.amax_compute_algo == "max" else history[0]
    if self.interval > 1:
      largest = jnp.where(self._is_due(state), largest, 0.0)
    if self.first_step == "current":
      largest = jnp.where((largest == 0.0) & ~self._is_empty(state), -1.0, largest)
    return {"scale": state["scale"], "amax_history": largest.reshape(1)}

  def finalize_scale(self, state: TensorState, role: Role) -> TensorState:
    """Makes the scale of the history now, whatever the interval."""
    scale, _ = self._scale_of_history(state, role)
    due = {"steps_to_update": jnp.zeros((1,), jnp.float32)} if self.interval > 1 else {}
    return {**state, "scale": scale, **due}

  def in_matrices(self, q: QTensor, view: View) -> QTensor:
    """The scale for each element."""
    return scaled_matrices(q, view)

  def contract(
    self, lhs: QTensor, rhs: QTensor, gemm: Gemm, kind: GemmKind, dtype: Any
  ) -> jax.Array:
    """One GEMM; fast accumulation going forward, full going backward."""
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
    """The formats; products are scaled in float32."""
    return Needs(self.fp8_format)

  def _scale(
    self, state: TensorState, seen: jax.Array | None, role: Role
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the scale of this step and its inverse; they may depend on the amax, if given."""
    stored, float8 = state["scale"], self.float8(role)
    scale, inverse = self._scale_of_history(state, role)
    if self.interval > 1:
      due = self._is_due(state)
      scale, inverse = jnp.where(due, scale, stored), jnp.where(due, inverse, 1.0 / stored)
    if seen is None:
      return scale, inverse
    if self.first_step == "current":
      scale, inverse = self._scale_of(seen, self._is_empty(state), scale, inverse, role)
    if self.overflow == "current":
      beyond = seen > jnp.float32(float8.max) * scale
      scale, inverse = self._scale_of(seen, beyond, scale, inverse, role)
    return scale, inverse

  def _scale_of(
    self, seen: jax.Array, where: jax.Array, scale: jax.Array, inverse: jax.Array, role: Role
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the scale that an amax implies, and its inverse, where that is to be used."""
    seen = jnp.broadcast_to(seen, scale.shape)
    now, now_inverse = scale_from_amax(
      seen, scale, self.float8(role).max, self.margin, self.power_of_two
    )
    return jnp.where(where, now, scale), jnp.where(where, now_inverse, inverse)

  def _scale_of_history(self, state: TensorState, role: Role) -> tuple[jax.Array, jax.Array]:
    """Returns the scale that the history implies, and its inverse."""
    return next_scale(
      state["scale"],
      state["amax_history"],
      self.float8(role).max,
      algo=self.amax_compute_algo,
      margin=self.margin,
      power_of_two=self.power_of_two,
    )

  def _is_due(self, state: TensorState) -> jax.Array:
    return state["steps_to_update"] == 0.0

  def _is_empty(self, state: TensorState) -> jax.Array:
    return jnp.max(state["amax_history"], axis=0) == 0.0
