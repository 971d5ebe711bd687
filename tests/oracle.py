"""A slow reference for FP8 and delayed scaling in scalar Python and float64 NumPy.

It shares no code with the package. Each format is enumerated code by code from its bit layout, and
rounding searches this list.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
  """Bit layout of an FP8 format."""

  exponent_bits: int
  mantissa_bits: int
  bias: int
  kind: (
    str  # "ieee": infinities and NaNs; "fn": one NaN a sign, no infinity; "fnuz": one NaN, no -0
  )


LAYOUTS = {
  "float8_e4m3fn": Layout(4, 3, 7, "fn"),
  "float8_e5m2": Layout(5, 2, 15, "ieee"),
  "float8_e4m3fnuz": Layout(4, 3, 8, "fnuz"),
  "float8_e5m2fnuz": Layout(5, 2, 16, "fnuz"),
}


def decode(code: int, layout: Layout) -> float:
  """Returns the value of one of the 256 codes."""
  sign = -1.0 if code & 0x80 else 1.0
  exponent = (code & 0x7F) >> layout.mantissa_bits
  mantissa = code & ((1 << layout.mantissa_bits) - 1)
  top = (1 << layout.exponent_bits) - 1
  if layout.kind == "fnuz" and code == 0x80:
    return math.nan
  if layout.kind == "fn" and code & 0x7F == 0x7F:
    return math.nan
  if layout.kind == "ieee" and exponent == top:
    return math.nan if mantissa else sign * math.inf
  if exponent == 0:
    return sign * mantissa * 2.0 ** (1 - layout.bias - layout.mantissa_bits)
  return sign * (1 + mantissa / (1 << layout.mantissa_bits)) * 2.0 ** (exponent - layout.bias)


@functools.cache
def magnitudes(name: str) -> tuple[float, ...]:
  """Returns the finite non-negative values in ascending order. The index is the code."""
  values = [decode(code, LAYOUTS[name]) for code in range(128)]
  return tuple(v for v in values if math.isfinite(v))


def round_scalar(x: float, name: str) -> float:
  """Rounds to nearest, ties to the even code. Saturates, and keeps NaN."""
  if math.isnan(x):
    return math.nan
  values = magnitudes(name)
  magnitude = min(abs(x), values[-1])
  above = bisect.bisect_left(values, magnitude)
  below = max(above - 1, 0)
  up, down = values[above] - magnitude, magnitude - values[below]
  code = above if up < down or (up == down and above % 2 == 0) else below
  return math.copysign(values[code], x)


def quantize(x: np.ndarray, scale: float, name: str) -> np.ndarray:
  """Computes ``round(x / scale)`` elementwise. The quotient is float32, as in hardware."""
  with np.errstate(all="ignore"):
    quotient = np.float32(x) / np.float32(scale)
  return np.vectorize(round_scalar, otypes=[np.float64])(quotient.astype(np.float64), name)


def qdq(x: np.ndarray, scale: float, name: str) -> np.ndarray:
  """Quantizes and dequantizes ``x``; the result is float64."""
  return quantize(x, scale, name) * float(scale)


def scale(history: np.ndarray, old: float, name: str, margin: float = 0) -> float:
  """Computes the scale of a step from the amaxes before it, in float64."""
  amax = max(float(h) for h in history)
  if amax == 0 or not math.isfinite(amax):
    return float(old)
  return amax / magnitudes(name)[-1] * 2.0**margin


def roll(history: np.ndarray, amax: float) -> np.ndarray:
  """Returns the history after a step, with the newest in slot 0 and the oldest in slot 1."""
  length = len(history)
  new = [float(history[(i + 1) % length]) for i in range(length)]
  new[0] = amax if math.isfinite(amax) else 0.0
  return np.array(new)


def amax(*tensors: np.ndarray) -> float:
  """Returns the largest magnitude of all tensors of one state; NaN if one value is NaN."""
  values = [abs(float(v)) for t in tensors for v in np.asarray(t, np.float64).ravel()]
  return math.nan if any(map(math.isnan, values)) else max(values, default=0.0)


def inverse_of_amax(amax: float, name: str) -> np.float32:
  """Returns the quantization multiplier ``max / amax``, rounded once to float32.

  It is 1 if the amax is zero, and NaN if the amax is not finite. It is clamped to ``2**±126``.
  """
  if amax == 0:
    return np.float32(1)
  if not math.isfinite(amax):
    return np.float32(np.nan)
  with np.errstate(all="ignore"):
    inverse = np.float32(magnitudes(name)[-1]) / np.float32(amax)
  return min(max(inverse, np.float32(2.0**-126)), np.float32(2.0**126))


def next_power_of_two(x: float) -> float:
  """Returns the smallest power of two that is not below ``x``."""
  mantissa, exponent = math.frexp(x)
  return math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)


def quantize_by_amax(
  x: np.ndarray, name: str, power_of_two: bool = False
) -> tuple[np.ndarray, np.float32]:
  """Quantizes values by their own amax. Returns them and their common scale.

  The scale is the reciprocal of ``max / amax``, both float32. A power of two is the smallest that
  is at least ``amax / max``.
  """
  inverse = inverse_of_amax(amax(x), name)
  scale = np.float32(1) / inverse
  if power_of_two and math.isfinite(scale) and amax(x) > 0:
    exact = next_power_of_two(float(amax(x)) / magnitudes(name)[-1])
    scale = np.float32(min(max(exact, 2.0**-126), 2.0**126))
    inverse = np.float32(1) / scale
  return _round_all(np.float32(x) * inverse, name), scale


def _round_all(x: np.ndarray, name: str) -> np.ndarray:
  return np.vectorize(round_scalar, otypes=[np.float64])(np.float64(x), name)


def microscale_exponent(amax: float, name: str, rounding: str) -> int | None:
  """Returns the exponent of the shared scale of an MX block; None for NaN.

  "up" is the smallest exponent that keeps ``amax`` in range. "down" is ``floor(log2(amax)) - emax``
  from the OCP specification, section 6.3. Here emax is the exponent of the format's largest value.
  """
  if not math.isfinite(amax):
    return None
  if amax == 0:
    return 0
  largest = magnitudes(name)[-1]
  floor_log2 = lambda v: math.frexp(v)[1] - 1
  exponent = floor_log2(amax) - floor_log2(largest)
  if rounding == "up" and amax > math.ldexp(largest, exponent):
    exponent += 1
  return min(max(exponent, -126), 127)


def quantize_mx(x: np.ndarray, name: str, rounding: str = "up") -> tuple[np.ndarray, int]:
  """Quantizes one block to MXFP8. Returns its values and the code of its E8M0 scale."""
  exponent = microscale_exponent(amax(x), name, rounding)
  if exponent is None:
    return np.full(x.shape, np.nan), 255
  return _round_all(np.float64(x) * 2.0**-exponent, name), exponent + 127
