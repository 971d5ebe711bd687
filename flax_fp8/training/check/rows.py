"""The history and scale of each tensor before and after each run of the step."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from flax_fp8.training.check.fit import (
  KEPT,
  RIGHT,
  Verdict,
  close,
  judge,
  multiple,
)
from flax_fp8.training.check.step import HISTORY, SCALE, Leaf, Outcome

_MAX = {"input": 448.0, "kernel": 448.0, "output_grad": 57344.0}
# The ratio of the ranges of float8_e4m3fn and float8_e4m3fnuz is not a power of two.
_RANGES = (1.0, 448 / 240)
COPY = Verdict("copy")
REPLACED = Verdict("replaced")
_FINE = {"right", "copy", "replaced"}


@dataclasses.dataclass(frozen=True)
class Row:
  """One tensor, or one element of a stack of tensors.

  Attributes:
    leaf: the history of the tensor.
    index: index in the stack.
    old: planted histories, oldest first; shape ``[runs, length]``.
    new: histories after the step.
    old_scale: planted scales; shape ``[runs, 1]``; None for a history without a scale.
    new_scale: scales after the step.
    factor: recorded amax of a kernel in the same collection, divided by the correct amax; None if
      unknown.
  """

  leaf: Leaf
  index: tuple[int, ...]
  old: np.ndarray
  new: np.ndarray
  old_scale: np.ndarray | None
  new_scale: np.ndarray | None
  factor: float | None = None

  @property
  def name(self) -> str:
    """Path of the tensor in the training state."""
    return f"{self.leaf.tensor}{list(self.index) or ''}"

  @property
  def place(self) -> tuple[str, tuple[int, ...]]:
    """Identifies the tensor within any copy of the collection."""
    return self.leaf.below, self.index

  @property
  def length(self) -> int:
    """Number of slots of the history."""
    return self.old.shape[1]

  def rolled(self) -> int | None:
    """Returns the number of slots by which the history shifted; None if it did not just shift."""
    shifts = range(1, self.length)
    return next((k for k in shifts if close(self.new[:, :-k], self.old[:, k:])), None)

  def newest(self, outcome: Outcome) -> float:
    """Returns the largest amax that one call of the step added."""
    history = np.roll(outcome.fp8[self.leaf.path][self.index], -1)
    return float(history[-(self.rolled() or self.length) :].max())

  def verdict(self) -> Verdict:
    """Judges this tensor without comparing it to others."""
    if self.length == 1:
      return self._by_scale()
    known, old = self.new[:, :-1], self.old[:, :-1]
    if (rolls := self.rolled()) is not None:
      return self._scale_after(rolls)
    if not close(known, old) and np.ptp(known) > 0 and _steady(known):
      return REPLACED
    return judge(self.old[:, 1:], old, known)

  def _scale_after(self, rolls: int) -> Verdict:
    """Judges the scale of a history that shifted correctly, by one or more slots."""
    old, new = self.old_scale, self.new_scale
    if old is None or new is None:
      return RIGHT
    seen = self.new[:, self.length - rolls :]
    sources: Iterator[np.ndarray] = itertools.chain.from_iterable(
      (np.max(window, axis=1), window[:, -1])
      for k in range(rolls)
      for window in [np.concatenate([self.old[:, k:], seen[:, :k]], axis=1)]
    )
    if any(_follows(new[:, 0], source) for source in sources):
      return RIGHT
    if close(new, old):
      return dataclasses.replace(KEPT, seen="the scale is unchanged")
    if np.ptp(new) == 0:
      return Verdict("reset", f"the scale is {new[0, 0]:.4g}, independent of the history")
    verdict = judge(self.old.max(axis=1, keepdims=True) / _MAX[self.leaf.role], old, new)
    return dataclasses.replace(verdict, seen=f"the scale: {verdict.seen}")

  def _by_scale(self) -> Verdict:
    """Judges a history of one slot, which each step replaces, by its scale."""
    old, new = self.old_scale, self.new_scale
    if old is None or new is None:
      return KEPT if close(self.new, self.old) else RIGHT
    if close(self.new, self.old) and close(new, old):
      return KEPT
    if np.all(new == 1) or np.all(new == 0):
      return Verdict("reset", f"the scale is {new[0, 0]:g}, independent of the history")
    if _steady(new):
      return REPLACED
    right = self.old / _MAX[self.leaf.role]
    if not _follows(new[:, 0], right[:, 0]):
      if close(new, old):
        return KEPT
      margins = (judge(right * 2.0**margin, old, new) for margin in range(-8, 9))
      return next((v for v in margins if v.kind == "averaged"), judge(right, old, new))
    if self.factor is not None:
      return RIGHT if close(self.factor, 1.0, 2.0**-7) else multiple(self.factor)
    ratio = float(new[0, 0] / right[0, 0])
    is_margin = any(abs(math.remainder(math.log2(ratio / unit), 1)) < 1e-5 for unit in _RANGES)
    return RIGHT if is_margin or _are_powers(new) else multiple(ratio)

  def as_copy_of(self, other: Row) -> Verdict | None:
    """Judges this tensor as a copy or a moving average of another; None if it is neither."""
    if close(self.new, other.new) or close(self.new, other.old):
      return COPY
    known = slice(None) if self.length == 1 else slice(None, -1)
    for source in (other.new, other.old):
      right = source[:, known]
      if np.all(right > 0):
        verdict = judge(right, self.old[:, known], self.new[:, known])
        if verdict.kind == "averaged":
          return verdict
    return None


def _are_powers(scales: np.ndarray) -> bool:
  """Returns whether all scales are powers of two."""
  return bool(np.all(np.log2(scales) % 1 == 0))


def _steady(values: np.ndarray) -> bool:
  """Returns whether all values are positive and nearly equal in all runs, within a factor of 2."""
  return bool(np.all(values > 0) and np.all(values.max(axis=0) < 2 * values.min(axis=0)))


def _follows(scale: np.ndarray, source: np.ndarray) -> bool:
  """Returns whether a scale is a constant multiple of its source, or one rounded up to 2**n."""
  if not (np.all(np.isfinite(scale)) and np.all(scale > 0) and np.all(source > 0)):
    return False
  ratio = scale / source
  return close(ratio, ratio[0]) or (_are_powers(scale) and ratio.max() < 2.0001 * ratio.min())


def rows(
  leaves: Sequence[Leaf],
  before: Sequence[Outcome],
  after: Sequence[Outcome],
  kernels: Mapping[str, np.ndarray],
) -> list[Row]:
  """Unstacks the histories and scales of all runs.

  Args:
    leaves: the FP8 state.
    before: planted states, by run.
    after: states after the step, by run.
    kernels: largest magnitudes of kernel parameters, for each element of a stack, by tensor path.

  Returns:
    A row for each history, and for each element of a stack.
  """
  paths = {leaf.path for leaf in leaves}
  found: list[Row] = []
  for leaf in leaves:
    if leaf.key != HISTORY or not leaf.role:
      continue
    scale = leaf.path.replace(f"{leaf.role}_{HISTORY}", f"{leaf.role}_{SCALE}")
    old, new = (np.stack([run.fp8[leaf.path] for run in runs]) for runs in (before, after))
    scales: list[np.ndarray] = []
    if scale in paths:
      scales = [np.stack([run.fp8[scale] for run in runs]) for runs in (before, after)]
    for index in np.ndindex(old.shape[1:-1]):
      at = (slice(None), *index)
      found.append(
        Row(
          leaf=leaf,
          index=index,
          old=np.roll(old[at], -1, axis=1),
          new=np.roll(new[at], -1, axis=1),
          old_scale=scales[0][at].reshape(-1, 1) if scales else None,
          new_scale=scales[1][at].reshape(-1, 1) if scales else None,
        )
      )
  factors = {row.leaf.group: f for row in found if (f := _factor(row, kernels)) is not None}
  return [dataclasses.replace(row, factor=factors.get(row.leaf.group)) for row in found]


def _factor(row: Row, kernels: Mapping[str, np.ndarray]) -> float | None:
  """Returns the recorded amax of a kernel divided by the amax of its parameter; None if unknown."""
  kernel = kernels.get(row.leaf.tensor)
  if kernel is None or not kernel[row.index] > 0:
    return None
  return float(row.new[0, -1] / kernel[row.index])


def _together(found: Sequence[Row]) -> Verdict:
  """Judges the histories of several tensors together; one alone may be too short for a fit."""
  pairs = [(row.old[:, 1:], row.old[:, :-1], row.new[:, :-1]) for row in found]
  right, old, got = (np.concatenate(values, axis=1) for values in zip(*pairs, strict=True))
  return judge(right, old, got)


def judge_all(found: Sequence[Row]) -> list[tuple[Row, Verdict]]:
  """Judges every tensor by itself, and as a copy of the same tensor in another collection."""
  alone = {id(row): row.verdict() for row in found}
  for group in {row.leaf.group for row in found}:
    wrong = [row for row in found if row.leaf.group == group and row.length > 1]
    wrong = [row for row in wrong if alone[id(row)].kind not in {*_FINE, "kept", "not finite"}]
    wrong = [row for row in wrong if row.rolled() is None]
    if wrong and (together := _together(wrong)).kind != "unexplained":
      alone |= {id(row): together for row in wrong}
  groups = {row.leaf.group for row in found}
  moves = {row.leaf.group for row in found if alone[id(row)].kind != "kept"}
  replaced = {row.leaf.group for row in found if alone[id(row)] == REPLACED}
  verdicts: list[tuple[Row, Verdict]] = []
  for row in found:
    verdict = alone[id(row)]
    if row.leaf.group in replaced and _steady(row.new):
      verdict = REPLACED
    if verdict.kind not in _FINE and len(groups) > 1:
      others = (o for o in found if o.place == row.place and o is not row)
      others = (o for o in others if o.length == row.length and alone[id(o)].kind != "kept")
      as_copy = (row.as_copy_of(other) for other in others)
      verdict = next((v for v in as_copy if v is not None), verdict)
    if verdict.kind == "kept" and moves:
      verdict = Verdict("copy" if row.leaf.group not in moves else "unmoved")
    verdicts.append((row, verdict))
  return verdicts
