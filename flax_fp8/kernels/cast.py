"""Quantising in one kernel: a tensor is read once, and written in FP8 in two layouts.

FP8 GEMMs of NVIDIA's GPUs before Blackwell read operands along the axes that they contract. Each
tensor meets two GEMMs, which contract different axes of it.
"""

from __future__ import annotations

import functools
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from flax_fp8 import _compat
from flax_fp8.amax import across_devices, amax
from flax_fp8.contraction import View
from flax_fp8.formats import E4M3, E5M2, Float8
from flax_fp8.kernels import choice
from flax_fp8.kernels.dispatch import kernel_unless_mapped
from flax_fp8.quantize import quantize
from flax_fp8.sharding import explicit_sharding

# Data for each of the two GEMMs, of the tensor's shape, and the amax.
Cast: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]

_TILE = 64  # rows and columns that one program casts; fewer where they do not divide the tensor
_SMALLEST_TILE = 16


def cast_for_both(
  x: jax.Array,
  scale: jax.Array,
  inverse: jax.Array,
  state: Any,
  float8: Float8,
  views: tuple[View, View],
  key: jax.Array | None,
  *,
  opaque: bool,
) -> Cast:
  """Quantises a tensor with a given scale for two GEMMs, and finds its amax.

  ``saturating_cast(x / scale)``, twice; ``max(|x|)``

  Args:
    x: values; any shape; float32, bfloat16 or float16.
    scale: dequantisation multiplier; float32 ``()``; of other values than ``x``.
    inverse: ``1 / scale``, by which values are multiplied.
    state: as for ``flax_fp8.amax.amax``.
    float8: the format.
    views: how each GEMM sees ``x``.
    key: PRNG key to round by, or None to round to nearest.
    opaque: whether XLA has nothing to fuse the cast into: see ``kernels.choice``.

  Returns:
    FP8 data for each GEMM, both of the shape of ``x``; where a kernel runs, each in the memory
    layout that its GEMM reads. The amax, float32 scalar.
  """
  plain = functools.partial(_plain, float8=float8, key=key)
  split = _split(x, views)
  known = float8 in (E4M3, E5M2) and key is None
  if split is None or not known or not choice.takes(opaque=opaque):
    return plain(x, scale, inverse, state)
  kernel = functools.partial(_by_kernel, float8=float8, split=split, views=views)
  return kernel_unless_mapped(kernel, plain, _is_mapped)(x, scale, inverse, state)


def _plain(
  x: jax.Array,
  scale: jax.Array,
  inverse: jax.Array,
  state: Any,
  *,
  float8: Float8,
  key: jax.Array | None = None,
) -> Cast:
  """Plain JAX: one cast, which XLA turns for the GEMM that needs it.

  One kernel then casts and finds the amax. Without the barrier, XLA makes it a kernel that casts
  and transposes, and reads the tensor again for the amax.
  """
  data = lax.optimization_barrier(quantize(x, scale, float8, inverse, key, stale=True).data)
  return data, data, amax(x, state)


def _is_mapped(x: bool, scale: bool, inverse: bool, state: Any) -> tuple[bool, bool, bool]:
  """Tells which results vmap maps: the amax is that of all, unless the state is mapped."""
  del x, scale, inverse
  return True, True, any(jax.tree.leaves(state))


def _split(x: jax.Array, views: tuple[View, View]) -> int | None:
  """Finds the axis before which a tensor's rows end and its columns begin.

  One GEMM contracts its rows, the other its columns. None where that is not so, where it has no
  tiles, or where its type names a sharding.
  """
  if not x.size or explicit_sharding(x) is not None:
    return None
  axes, contracted = tuple(range(x.ndim)), {tuple(sorted(view.contracting)) for view in views}
  for split in range(1, x.ndim):
    if contracted == {axes[:split], axes[split:]}:
      sizes = math.prod(x.shape[:split]), math.prod(x.shape[split:])
      return split if all(_tile(size) >= _SMALLEST_TILE for size in sizes) else None
  return None


def _tile(size: int) -> int:
  """The largest power of two, up to that of a tile, that divides a size."""
  return math.gcd(size, _TILE)


def _by_kernel(
  x: jax.Array,
  scale: jax.Array,
  inverse: jax.Array,
  state: Any,
  *,
  float8: Float8,
  split: int,
  views: tuple[View, View],
  interpret: bool = False,
) -> Cast:
  """The kernel; both results look like ``x``, one of them lies transposed."""
  del scale
  matrix = x.reshape(math.prod(x.shape[:split]), -1)
  factor = _compat.vary_as(inverse, x).reshape(1)
  straight, turned, bits = _cast(matrix, factor, float8=float8, interpret=interpret)
  last_axes = tuple(range(split, x.ndim))
  data = [
    (straight if tuple(sorted(view.contracting)) == last_axes else turned.T).reshape(x.shape)
    for view in views
  ]
  seen = lax.bitcast_convert_type(jnp.max(bits), jnp.float32)
  return data[0], data[1], across_devices(seen, state)


# Traced once for each shape, so that XLA sees that two calls with the same operands are the same:
# the kernel's text names the lines it was traced from.
@functools.partial(jax.jit, static_argnames=("float8", "interpret"), inline=True)
def _cast(
  x: jax.Array, inverse: jax.Array, *, float8: Float8, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Casts a matrix; returns it, it transposed, and the bits of each tile's amax."""
  rows, columns = x.shape
  tile = _tile(rows), _tile(columns)
  grid = rows // tile[0], columns // tile[1]
  struct = functools.partial(_compat.shape_like, x)
  return pl.pallas_call(
    functools.partial(_kernel, float8=float8),
    out_shape=(
      struct((rows, columns), float8.dtype),
      struct((columns, rows), float8.dtype),
      struct(grid, np.int32),
    ),
    grid=grid,
    in_specs=[pl.BlockSpec(tile, lambda i, j: (i, j)), pl.BlockSpec((1,), lambda i, j: (0,))],
    out_specs=(
      pl.BlockSpec(tile, lambda i, j: (i, j)),
      pl.BlockSpec(tile[::-1], lambda i, j: (j, i)),
      pl.BlockSpec((1, 1), lambda i, j: (i, j)),
    ),
    interpret=interpret,
    name="flax_fp8_cast",
    compiler_params=_compat.triton_parameters(num_warps=4, num_stages=1),
  )(x, inverse)


def _kernel(
  x_ref: Any, inverse_ref: Any, straight_ref: Any, turned_ref: Any, bits_ref: Any, *, float8: Float8
) -> None:
  """Casts a tile. No minimum or maximum of numbers: Triton's forget a NaN."""
  x = x_ref[...].astype(jnp.float32)
  quotient = x * inverse_ref[0] + x * 0.0  # infinity becomes NaN
  clipped = jnp.where(quotient > float8.max, float8.max, quotient)
  clipped = jnp.where(clipped < -float8.max, -float8.max, clipped)
  data = clipped.astype(float8.dtype)
  straight_ref[...] = data
  turned_ref[...] = data.T
  bits = lax.bitcast_convert_type(x, jnp.int32) & np.int32(0x7FFFFFFF)
  bits_ref[0, 0] = jnp.max(bits)  # of the bits, since NaN's are the largest
