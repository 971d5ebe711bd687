"""What a training step made of FP8 state, from numbers: the law that fits what came back.

Known histories went in. Of each slot but the newest, the right value after a step is known, and so
is the old one: ``new = a * right + b * old + c``. Where one law holds in every slot of every run,
``a``, ``b`` and ``c`` tell what was done to the state.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[np.floating[Any]]]

# Arithmetic on state in float32 is exact to some 1e-7; nothing that is done to it is as small.
_EXACT = 2e-6
_FITS = 5e-6


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What became of a history or of a scale.

  Attributes:
    kind: "right", "kept", or what was done to it.
    seen: the same with its figure, in words; empty where all is right.
  """

  kind: str
  seen: str = ""


RIGHT, KEPT = Verdict("right"), Verdict("kept", "came back as it went in")


def close(a: Any, b: Any, tolerance: float = _EXACT) -> bool:
  """Tells whether values are equal but for the rounding of float32."""
  return bool(np.all(np.abs(np.subtract(a, b)) <= tolerance * np.maximum(np.abs(a), np.abs(b))))


def judge(right: Array, old: Array, got: Array) -> Verdict:
  """Finds the law that fits.

  Args:
    right: what the values should have become; shape ``[runs, values]``, positive. Each run was
      given other values, the last run by far the largest.
    old: what they were before.
    got: what they became.

  Returns:
    The verdict.
  """
  if not np.all(np.isfinite(got)):
    return Verdict("not finite", f"{np.mean(~np.isfinite(got)):.0%} of it is NaN or infinite")
  for verdict, expected in ((RIGHT, right), (KEPT, old)):
    if close(got, expected):
      return verdict
  if np.all(got == 0):
    return Verdict("reset", "is 0, whatever it was before")
  return _linear(right, old, got) or _clipped(right, got) or _affine(right, old, got)


def _linear(right: Array, old: Array, got: Array) -> Verdict | None:
  """Tries ``a * right``, ``b * old`` and ``a * right + b * old``."""
  if (fit := _fit([right], got, right)) is not None:
    return multiple(float(fit[0]))
  if (fit := _fit([old], got, right)) is not None:
    b = float(fit[0])
    return Verdict("decayed" if 0 < b < 1 else "added", f"{b:.6g} times the old value")
  if (fit := _fit([right, old], got, right)) is None:
    return None
  a, b = map(float, fit)
  law = f"{a:.4g} times the right value and {b:.4g} times the old one"
  if min(a, b) > 0 and abs(a + b - 1) < 0.05 * min(a, b):
    return Verdict("averaged", f"{law}: a moving average")
  if abs(a - 1) < 0.02:
    return Verdict("decayed", law)
  return Verdict("added" if abs(b - 1) < 0.02 else "unexplained", law)


def multiple(a: float) -> Verdict:
  """Names a multiple of the right value."""
  count = round(a)
  if count >= 2 and abs(a - count) < 1e-4 * count:
    return Verdict("summed", f"{count} times the right value")
  kind = "decayed" if 0.9 < a < 1 else "scaled"
  return Verdict(kind, f"{a:.6g} times the right value")


def _clipped(right: Array, got: Array) -> Verdict | None:
  """Tries a factor of each run's own, and a bound on each value."""
  if np.all(got <= right * (1 + _EXACT)):
    bound = np.max(got)
    if np.all((np.abs(got - right) <= _EXACT * right) | (np.abs(got - bound) <= _EXACT * bound)):
      return Verdict("clipped", f"never above {bound:.4g}")
  ratio = got / right
  factors = ratio.mean(axis=1)
  same = np.all(np.abs(ratio - factors[:, None]) <= _FITS * np.abs(factors[:, None]))
  shrinks = np.all(factors > 0) and factors[-1] < 0.9 * factors.max()
  shrinks &= right.shape[1] > 1 or factors.max() < 1 + _EXACT
  if same and shrinks:
    seen = f"{factors.max():.3g} to {factors[-1]:.3g} times the right value, less the larger it is"
    return Verdict("clipped", seen)
  return None


def _affine(right: Array, old: Array, got: Array) -> Verdict:
  """Tries laws with a constant, such as the sign of a gradient, rounding, and what is left."""
  one = np.ones_like(old)
  for terms in ([old, one], [right, old, one]):
    fit = _fit(terms, got, right)
    if fit is not None and abs(fit[-2] - 1) < 0.02:
      return Verdict("added", f"the old value and {fit[-1]:+.3g}")
  ratio = got / right
  for dtype in (ml_dtypes.bfloat16, np.float16):
    if close(got, right, 2.0**-7) and np.all(got.astype(dtype).astype(got.dtype) == got):
      return Verdict("rounded", f"is rounded to {np.dtype(dtype).name}")
  if np.all(np.abs(got - old) < 0.1 * old):
    return Verdict("added", f"the old value to within {np.max(np.abs(got / old - 1)):.1g} of it")
  return Verdict("unexplained", f"{ratio.min():.3g} to {ratio.max():.3g} times the right value")


def _fit(terms: list[Array], got: Array, right: Array) -> Array | None:
  """Solves for the terms' factors by least squares of relative errors; None if it does not fit."""
  weight = 1 / (np.abs(got) + 1e-3 * np.abs(right)).ravel()
  columns = np.stack([term.ravel() * weight for term in terms], axis=1)
  wanted = got.ravel() * weight
  if wanted.size <= len(terms):
    return None
  factors = np.linalg.lstsq(columns, wanted, rcond=None)[0]
  return factors if np.max(np.abs(columns @ factors - wanted)) < _FITS else None
