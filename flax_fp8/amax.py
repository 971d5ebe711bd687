"""The largest magnitude of a tensor, with one answer wherever its state has one.

A state belongs to a tensor. Where a transformation splits the tensor but not the state (``vmap``
with the state unmapped, ``shard_map`` with the state replicated) the amax is reduced over the split
too, so that the new state is not mapped and JAX has nothing to sum in the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from flax_fp8 import _compat


# Inlined where it is traced, and compiled once for each shape where it is not.
@functools.partial(jax.jit, static_argnums=1, inline=True)
def largest_magnitude(x: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
  """Returns the largest magnitude along some axes.

  ``max(|x|, axes, keepdims)``

  Args:
    x: values; any shape; float32, bfloat16 or float16.
    axes: those to reduce, which stay with size 1; None for all, which goes to shape ``()``.

  Returns:
    float32. Zero where there are no elements.

  Numerics:
    NaN where there is a NaN, inf where there is an infinity and no NaN. On a CPU the maximum is
    that of the bits: as integers, magnitudes rank as they do as numbers, infinity above all and NaN
    above that. As floats, XLA's CPU compiler makes of many values with a NaN the largest of the
    others, or -inf.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8.amax import largest_magnitude
    >>> largest_magnitude(jnp.array([[1.0, -3.0], [2.0, jnp.nan]]), (1,)).ravel()
    Array([ 3., nan], dtype=float32)

  References:
    IEEE 754-2019, section 5.10, totalOrder.
  """

  def of_values(x: jax.Array) -> jax.Array:
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=axes is not None, initial=0)
    return largest.astype(jnp.float32)

  def of_bits(x: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) & np.int32(0x7FFFFFFF)
    largest = jnp.max(bits, axis=axes, keepdims=axes is not None, initial=0)
    return lax.bitcast_convert_type(largest, jnp.float32)

  return lax.platform_dependent(x, cpu=of_bits, default=of_values)


def amax(x: jax.Array, state: Any) -> jax.Array:
  """Returns the largest magnitude of all of the tensor that ``state`` describes.

  ``max(|x|)``, over mapped axes and devices too where ``state`` is not mapped or not sharded.

  Args:
    x: values; any shape; float32, bfloat16 or float16.
    state: pytree of arrays whose batching and sharding decide how far to reduce; may be empty.

  Returns:
    float32 scalar in the units of ``x``. Zero for a tensor without elements.

  Numerics:
    NaN where ``x`` holds a NaN, inf where it holds an infinity.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from flax_fp8.amax import amax
    >>> x, state = jnp.array([[1.0, -3.0], [2.0, 0.5]]), jnp.zeros(4)
    >>> jax.vmap(amax, in_axes=(0, None))(x, state)
    Array([3., 3.], dtype=float32)
    >>> jax.vmap(amax)(x, jnp.zeros((2, 4)))
    Array([3., 2.], dtype=float32)

  References:
    JAX, jax.custom_batching.custom_vmap; JAX, shard_map and varying manual axes.
  """
  return across_devices(_reduce_all_but(0)(x, state), state)


@functools.cache
def _reduce_all_but(kept: int) -> Callable[[jax.Array, Any], jax.Array]:
  """Makes the reduction that keeps the first ``kept`` axes, over which the state is mapped."""

  @custom_vmap
  def reduce(x: jax.Array, state: Any) -> jax.Array:
    del state
    largest = largest_magnitude(x, tuple(range(kept, x.ndim)))
    return largest.reshape(x.shape[:kept])

  @reduce.def_vmap
  def rule(axis_size: int, in_batched: Any, x: jax.Array, state: Any) -> tuple[jax.Array, bool]:
    x_mapped, state_mapped = in_batched[0], any(jax.tree.leaves(in_batched[1]))
    if not state_mapped:
      return reduce(jnp.moveaxis(x, 0, kept), state), False
    if not x_mapped:
      x = jnp.broadcast_to(x, (axis_size, *x.shape))
    return _reduce_all_but(kept + 1)(x, state), True

  return reduce


def across_devices(largest: jax.Array, state: Any) -> jax.Array:
  """Reduces an amax over the devices of a shard_map among which ``state`` does not differ.

  Args:
    largest: float32 scalar, of each device's part.
    state: as for ``amax``.

  Returns:
    float32 scalar, the largest of them.
  """
  if unchecked := _compat.unchecked_manual_axes():
    return lax.pmax(largest, unchecked)
  axes = _compat.varying_axes(largest).difference(
    *map(_compat.varying_axes, jax.tree.leaves(state))
  )
  return lax.pmax(largest, tuple(sorted(axes))) if axes else largest
