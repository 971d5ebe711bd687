"""The history and the scale of each tensor through all runs of a check, and what became of them."""

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
# The range of float8_e4m3fnuz is no power of two from those of the others.
_RANGES = (1.0, 448 / 240)
COPY = Verdict("copy")
REPLACED = Verdict("replaced")
_FINE = {"right", "copy", "replaced"}


@dataclasses.dataclass(frozen=True)
class Row:
  """One tensor, or one of a stack of them.

  Attributes:
    leaf: its history.
    index: its place in a stack.
    old: planted histories, oldest first; shape ``[runs, length]``.
    new: what became of them.
    old_scale: planted scales; shape ``[runs, 1]``; None for a history without a scale.
    new_scale: what became of them.
    factor: of the newest amaxes of the kernels around it over what they should be, if known.
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
    """Which tensor of the collection it is, in whatever copy."""
    return self.leaf.below, self.index

  @property
  def length(self) -> int:
    """Slots of the history."""
    return self.old.shape[1]

  def rolled(self) -> int | None:
    """By how many slots the history moved, exactly; None if it did something else."""
    shifts = range(1, self.length)
    return next((k for k in shifts if close(self.new[:, :-k], self.old[:, k:])), None)

  def newest(self, outcome: Outcome) -> float:
    """Reads the largest of the amaxes that one call of the step adds."""
    history = np.roll(outcome.fp8[self.leaf.path][self.index], -1)
    return float(history[-(self.rolled() or self.length) :].max())

  def verdict(self) -> Verdict:
    """Judges the tensor by itself."""
    if self.length == 1:
      return self._by_scale()
    known, old = self.new[:, :-1], self.old[:, :-1]
    if (rolls := self.rolled()) is not None:
      return self._scale_after(rolls)
    if not close(known, old) and np.ptp(known) > 0 and _steady(known):
      return REPLACED
    return judge(self.old[:, 1:], old, known)

  def _scale_after(self, rolls: int) -> Verdict:
    """Judges the scale beside a history that moved rightly, by one or more slots."""
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
      return dataclasses.replace(KEPT, seen="the scale came back as it went in")
    if np.ptp(new) == 0:
      return Verdict("reset", f"the scale is {new[0, 0]:.4g}, whatever the history was")
    verdict = judge(self.old.max(axis=1, keepdims=True) / _MAX[self.leaf.role], old, new)
    return dataclasses.replace(verdict, seen=f"the scale: {verdict.seen}")

  def _by_scale(self) -> Verdict:
    """Judges a history of one slot, which is new after each step, by the scale that it made."""
    old, new = self.old_scale, self.new_scale
    if old is None or new is None:
      return KEPT if close(self.new, self.old) else RIGHT
    if close(self.new, self.old) and close(new, old):
      return KEPT
    if np.all(new == 1) or np.all(new == 0):
      return Verdict("reset", f"the scale is {new[0, 0]:g}, whatever the history was")
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

  def beside(self, other: Row) -> Verdict | None:
    """Judges the tensor as a copy of another's; None if it is none."""
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
  """Tells whether all scales are powers of two."""
  return bool(np.all(np.log2(scales) % 1 == 0))


def _steady(values: np.ndarray) -> bool:
  """Tells whether positive values hardly depend on the run."""
  return bool(np.all(values > 0) and np.all(values.max(axis=0) < 2 * values.min(axis=0)))


def _follows(scale: np.ndarray, source: np.ndarray) -> bool:
  """Tells whether a scale is a multiple of its source, or the power of two above one."""
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
  """Takes stacks apart.

  Args:
    leaves: the FP8 state.
    before: what was planted, by run.
    after: what became of it.
    kernels: by the path of a tensor, its parameter's largest magnitude for each of a stack.

  Returns:
    A row for each history that kept its shape.
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
  """Compares the newest amax of a kernel with the kernel's own."""
  kernel = kernels.get(row.leaf.tensor)
  if kernel is None or not kernel[row.index] > 0:
    return None
  return float(row.new[0, -1] / kernel[row.index])


def _together(found: Sequence[Row]) -> Verdict:
  """Judges the histories of several tensors by one law, which shows where one alone is short."""
  pairs = [(row.old[:, 1:], row.old[:, :-1], row.new[:, :-1]) for row in found]
  right, old, got = (np.concatenate(values, axis=1) for values in zip(*pairs, strict=True))
  return judge(right, old, got)


def judge_all(found: Sequence[Row]) -> list[tuple[Row, Verdict]]:
  """Judges every tensor, by itself and as a copy of one of the same name elsewhere."""
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
      twins = (o for o in found if o.place == row.place and o is not row and o.length == row.length)
      as_copy = (row.beside(twin) for twin in twins if alone[id(twin)].kind != "kept")
      verdict = next((v for v in as_copy if v is not None), verdict)
    if verdict.kind == "kept" and moves:
      verdict = Verdict("copy" if row.leaf.group not in moves else "unmoved")
    verdicts.append((row, verdict))
  return verdicts
