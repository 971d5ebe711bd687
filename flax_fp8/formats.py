"""Describes the 8-bit formats, and the pairs of formats that recipes train with, as data."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from flax_fp8 import fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float8:
  """One 8-bit floating-point format.

  Attributes:
    dtype: the NumPy dtype that JAX computes with.
    max: largest finite value.
    smallest_normal: smallest positive value with full precision.
    smallest_subnormal: smallest positive value, which is the spacing of the format around zero.
    mantissa_bits: explicit bits of the significand.
    has_inf: whether the format encodes infinities. JAX's plain cast to the other formats overflows
      to NaN. The saturating cast of this package never overflows.

  Numerics:
    The spacing of normal values in ``[2**e, 2**(e+1))`` is ``2**(e - mantissa_bits)``, so rounding
    to nearest has a relative error of at most ``2**-(mantissa_bits + 1)``.

  Example:
    >>> from flax_fp8 import formats
    >>> formats.E4M3.max, formats.E5M2.max, formats.E4M3.epsilon
    (448.0, 57344.0, 0.125)

  References:
    Micikevicius et al., FP8 Formats for Deep Learning, https://arxiv.org/abs/2209.05433;
    OCP 8-bit Floating Point Specification (OFP8), revision 1.0.
  """

  dtype: np.dtype
  max: float
  smallest_normal: float
  smallest_subnormal: float
  mantissa_bits: int
  has_inf: bool

  @property
  def epsilon(self) -> float:
    """Spacing of the format at 1."""
    return 2.0**-self.mantissa_bits

  @property
  def name(self) -> str:
    """The dtype's name, as JAX prints it."""
    return self.dtype.name

  def __repr__(self) -> str:
    return f"formats.float8({self.name!r})"


def _describe(dtype: Any) -> Float8:
  info = ml_dtypes.finfo(dtype)
  return Float8(
    dtype=np.dtype(dtype),
    max=float(info.max),
    smallest_normal=float(info.smallest_normal),
    smallest_subnormal=float(info.smallest_subnormal),
    mantissa_bits=int(info.nmant),
    has_inf=bool(np.isinf(np.asarray(np.inf).astype(dtype).astype(np.float32))),
  )


E4M3 = _describe(jnp.float8_e4m3fn)
E5M2 = _describe(jnp.float8_e5m2)
E4M3_FNUZ = _describe(jnp.float8_e4m3fnuz)
E5M2_FNUZ = _describe(jnp.float8_e5m2fnuz)

_BY_DTYPE = {f.dtype: f for f in (E4M3, E5M2, E4M3_FNUZ, E5M2_FNUZ)}


def float8(dtype: Any, owner: str = "formats.float8: the dtype") -> Float8:
  """Looks up the format of an FP8 dtype.

  Args:
    dtype: anything that ``jnp.dtype`` takes.
    owner: name of the dtype in the error.

  Returns:
    The ``Float8`` that describes it.

  Raises:
    ValueError: ``dtype`` is not float8_e4m3fn, float8_e5m2, float8_e4m3fnuz or float8_e5m2fnuz.

  Example:
    >>> from flax_fp8 import formats
    >>> formats.float8("float8_e5m2").max
    57344.0
  """
  try:
    found = _BY_DTYPE.get(jnp.dtype(dtype))
  except TypeError:
    found = None
  if found is None:
    raise ValueError(
      f"{owner} must be one of {[d.name for d in _BY_DTYPE]}; got dtype={fields.show(dtype)}. Pass "
      "one of these."
    )
  return found


@dataclasses.dataclass(frozen=True)
class Format:
  """The pair of formats of a training step: one for inputs and kernels, one for gradients.

  ``Format.HYBRID`` uses E4M3 for inputs and kernels and E5M2 for gradients. ``Format.E4M3`` uses
  E4M3 for all tensors. ``HYBRID_FNUZ`` and ``E4M3_FNUZ`` are the same pairs in the FNUZ formats of
  AMD's CDNA3 GPUs. For any other pair, use ``Format(forward, backward)``.

  Attributes:
    forward: format of inputs and kernels.
    backward: format of output gradients.

  Raises:
    TypeError: a field is not a ``Float8``.

  Example:
    >>> import flax_fp8 as fp8
    >>> fp8.Format.HYBRID.forward.name, fp8.Format.HYBRID.backward.name
    ('float8_e4m3fn', 'float8_e5m2')

  References:
    Micikevicius et al., FP8 Formats for Deep Learning, https://arxiv.org/abs/2209.05433, section 3.
  """

  forward: Float8
  backward: Float8

  HYBRID: ClassVar[Format]
  E4M3: ClassVar[Format]
  HYBRID_FNUZ: ClassVar[Format]
  E4M3_FNUZ: ClassVar[Format]

  def __post_init__(self) -> None:
    for name in ("forward", "backward"):
      if not isinstance(value := getattr(self, name), Float8):
        raise TypeError(
          f"Format: {name} must be a formats.Float8; got {fields.show(value)}. Pass "
          "formats.E4M3, or formats.float8(dtype)."
        )


Format.HYBRID = Format(E4M3, E5M2)
Format.E4M3 = Format(E4M3, E4M3)
Format.HYBRID_FNUZ = Format(E4M3_FNUZ, E5M2_FNUZ)
Format.E4M3_FNUZ = Format(E4M3_FNUZ, E4M3_FNUZ)
