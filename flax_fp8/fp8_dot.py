"""Multiplies FP8 arrays so that every platform with FP8 matrix units uses them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_fp8 import _compat
from flax_fp8.capability import lacks_fp8_units
from flax_fp8.contraction import DimensionNumbers
from flax_fp8.platforms import by_platform, in_rows

_E4M3, _E5M2 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)
_LEAST_ROWS = 16


def fp8_dot(
  lhs: jax.Array,
  rhs: jax.Array,
  dims: DimensionNumbers,
  dtype: Any,
  fast_accumulation: bool,
  sharding: Any = None,
) -> jax.Array:
  """Multiplies FP8 operands. On an NVIDIA GPU this is an FP8 GEMM regardless of XLA's flags.

  The FP8 algorithm is explicit there if JAX supports it. Otherwise XLA tries Triton fusions first.
  They multiply in a wider type unless ``--xla_gpu_enable_triton_gemm=false``.
  """

  def with_precision(precision: Any) -> Callable[..., jax.Array]:
    return lambda lhs, rhs: lax.dot_general(lhs, rhs, dims, precision, dtype, out_sharding=sharding)

  plain = with_precision(lax.Precision.DEFAULT if fast_accumulation else lax.Precision.HIGHEST)
  if not is_fp8_gemm(lhs, rhs, dims):
    return plain(lhs, rhs)
  # XLA requires the contracted axes to be last in memory. Without this constraint it transposes the
  # array that an operand is computed from, such as the float32 stacked parameters of a scan.
  lhs, rhs = in_rows(lhs), in_rows(rhs)
  if not _compat.NAMES_FP8_ALGORITHM:
    return plain(lhs, rhs)
  named = lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32
  named_fast = lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32_FAST_ACCUM
  cuda = with_precision(named_fast if fast_accumulation else named)
  return by_platform(lhs, rhs, cuda=cuda, default=plain)


def is_fp8_gemm(lhs: jax.Array, rhs: jax.Array, dims: DimensionNumbers) -> bool:
  """Tells whether NVIDIA GPUs with FP8 matrix units have an FP8 GEMM for a product.

  XLA rejects an explicit FP8 algorithm without such a GEMM: for E5M2 by E5M2, for a vector, and on
  an older GPU. FP8 has no benefit for matrices of less than ``_LEAST_ROWS`` rows.
  """
  contracting, batch = dims
  rows = (
    math.prod(size for axis, size in enumerate(x.shape) if axis not in (*summed, *kept))
    for x, summed, kept in zip((lhs, rhs), contracting, batch, strict=True)
  )
  formats = {lhs.dtype, rhs.dtype}
  exists = _E4M3 in formats and formats <= {_E4M3, _E5M2}
  wide = all(at_least(size, _LEAST_ROWS) for size in rows)
  return exists and wide and not lacks_fp8_units()


def at_least(size: Any, bound: int) -> bool:
  """Tells whether a size is at least a bound. False for a symbolic size if unknown."""
  try:
    return bool(size >= bound)
  except _compat.InconclusiveDimensionOperation:
    return False
