"""Classifies the change of FP8 state in a training step by fitting a formula to its values.

The histories before the step are known. For each slot except the newest, so are the correct value
and the old value. The fit is ``new = a * right + b * old + c``. If one formula holds for every
slot of every run, ``a``, ``b`` and ``c`` show how the step changed the state.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[np.floating[Any]]]

# Arithmetic on state in float32 has relative errors near 1e-7. Every error to detect is larger.
_EXACT = 2e-6
_FITS = 5e-6


@dataclasses.dataclass(frozen=True)
class Verdict:
  """How a step changed a history or a scale.

  Attributes:
    kind: "right", "kept", or the kind of error.
    seen: description with a number; empty if the value is correct.
  """

  kind: str
  seen: str = ""


RIGHT, KEPT = Verdict("right"), Verdict("kept", "is unchanged")


def close(a: Any, b: Any, tolerance: float = _EXACT) -> bool:
  """Returns whether values are equal up to rounding in float32."""
  return bool(np.all(np.abs(np.subtract(a, b)) <= tolerance * np.maximum(np.abs(a), np.abs(b))))


def judge(right: Array, old: Array, got: Array) -> Verdict:
  """Finds the formula that fits.

  Args:
    right: correct values after the step; shape ``[runs, values]``, positive. Values differ between
      runs, and those of the last run are by far the largest.
    old: values before the step.
    got: values after the step.

  Returns:
    The verdict.
  """
  if not np.all(np.isfinite(got)):
    return Verdict("not finite", f"{np.mean(~np.isfinite(got)):.0%} of it is NaN or infinite")
  for verdict, expected in ((RIGHT, right), (KEPT, old)):
    if close(got, expected):
      return verdict
  if np.all(got == 0):
    return Verdict("reset", "is 0, independent of the old value")
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
  law = f"{a:.4g} times the correct value plus {b:.4g} times the old value"
  if min(a, b) > 0 and abs(a + b - 1) < 0.05 * min(a, b):
    return Verdict("averaged", f"{law}: a moving average")
  if abs(a - 1) < 0.02:
    return Verdict("decayed", law)
  return Verdict("added" if abs(b - 1) < 0.02 else "unexplained", law)


def multiple(a: float) -> Verdict:
  """Classifies a multiple of the correct value."""
  count = round(a)
  if count >= 2 and abs(a - count) < 1e-4 * count:
    return Verdict("summed", f"{count} times the correct value")
  kind = "decayed" if 0.9 < a < 1 else "scaled"
  return Verdict(kind, f"{a:.6g} times the correct value")


def _clipped(right: Array, got: Array) -> Verdict | None:
  """Tries a bound on each value, and one factor for each run."""
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
    seen = f"{factors.max():.3g} to {factors[-1]:.3g} times the correct value, less if it is larger"
    return Verdict("clipped", seen)
  return None


def _affine(right: Array, old: Array, got: Array) -> Verdict:
  """Tries formulas with a constant, such as the sign of a gradient, and then rounding."""
  one = np.ones_like(old)
  for terms in ([old, one], [right, old, one]):
    fit = _fit(terms, got, right)
    if fit is not None and abs(fit[-2] - 1) < 0.02:
      return Verdict("added", f"the old value plus {fit[-1]:.3g}")
  ratio = got / right
  for dtype in (ml_dtypes.bfloat16, np.float16):
    if close(got, right, 2.0**-7) and np.all(got.astype(dtype).astype(got.dtype) == got):
      return Verdict("rounded", f"is rounded to {np.dtype(dtype).name}")
  if np.all(np.abs(got - old) < 0.1 * old):
    return Verdict("added", f"within {np.max(np.abs(got / old - 1)):.1g} of the old value")
  return Verdict("unexplained", f"{ratio.min():.3g} to {ratio.max():.3g} times the correct value")


def _fit(terms: list[Array], got: Array, right: Array) -> Array | None:
  """Fits the factors of the terms by least squares of relative errors; None if the fit is poor."""
  weight = 1 / (np.abs(got) + 1e-3 * np.abs(right)).ravel()
  columns = np.stack([term.ravel() * weight for term in terms], axis=1)
  wanted = got.ravel() * weight
  if wanted.size <= len(terms):
    return None
  factors = np.linalg.lstsq(columns, wanted, rcond=None)[0]
  return factors if np.max(np.abs(columns @ factors - wanted)) < _FITS else None
