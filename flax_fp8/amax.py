"""Computes the amax of a tensor: its largest magnitude, one value for each state.

A state belongs to one tensor. ``vmap`` with unmapped state and ``shard_map`` with replicated state
split the tensor but not the state. The amax is then reduced over the split as well. The new state
stays unmapped, and JAX has nothing to sum in the backward pass.
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

from flax_fp8 import varying


# Inlined under a trace. Outside of a trace, compiled once for each shape.
@functools.partial(jax.jit, static_argnums=1, inline=True)
def largest_magnitude(x: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
  """Returns the largest magnitude along some axes.

  ``max(|x|, axes, keepdims)``

  Args:
    x: values; any shape; float32, bfloat16 or float16.
    axes: axes to reduce; they stay with size 1. None reduces all axes to shape ``()``.

  Returns:
    float32. Zero if there are no elements.

  Numerics:
    The result is NaN if there is a NaN, and inf if there is an infinity but no NaN. On a CPU the
    maximum is taken over the bits as integers. Integers order magnitudes as floats do, with
    infinity above all numbers and NaN above infinity. A float maximum is wrong there: for large
    arrays, XLA's CPU compiler drops NaN and returns the largest other value, or -inf.

  Example:
    >>> import jax.numpy as jnp
    >>> from flax_fp8.amax import largest_magnitude
    >>> largest_magnitude(jnp.array([[1.0, -3.0], [2.0, jnp.nan]]), (1,)).ravel()
    Array([ 3., nan], dtype=float32)

  References:
    IEEE 754-2019, section 5.10, totalOrder.
  """

  def of_values(x: jax.Array) -> jax.Array:
    over = tuple(range(x.ndim)) if axes is None else axes
    # The barrier keeps what follows out of the reduction's last GPU kernel, which has few threads.
    largest = lax.optimization_barrier(lax.reduce_max(jnp.abs(x), over))
    largest = jnp.maximum(largest.astype(jnp.float32), 0.0)  # -inf if there are no elements
    return largest if axes is None else jnp.expand_dims(largest, axes)

  def of_bits(x: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) & np.int32(0x7FFFFFFF)
    largest = jnp.max(bits, axis=axes, keepdims=axes is not None, initial=0)
    return lax.bitcast_convert_type(largest, jnp.float32)

  return lax.platform_dependent(x, cpu=of_bits, default=of_values)


def amax(x: jax.Array, state: Any) -> jax.Array:
  """Returns the largest magnitude of the whole tensor that ``state`` describes.

  ``max(|x|)``, also over mapped axes and devices if ``state`` is not mapped or not sharded.

  Args:
    x: values; any shape; float32, bfloat16 or float16.
    state: pytree of arrays; may be empty. Its batching and sharding decide how far to reduce.

  Returns:
    float32 scalar in the units of ``x``. Zero for a tensor without elements.

  Numerics:
    NaN if ``x`` holds a NaN, inf if it holds an infinity but no NaN.

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
  """Makes a reduction that keeps the first ``kept`` axes, which are mapped in the state too."""

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


@custom_vmap
def joined(new: Any, old: Any) -> Any:
  """Returns the new state of a tensor, mapped only if the old state is mapped.

  ``new``, or its maximum over mapped axes that the old state does not have. A joint computation
  with the states of other tensors may have mapped it.

  Args:
    new: pytree of float32 arrays.
    old: the old state, a pytree of arrays. Its batching decides how far to reduce.
  """
  del old
  return new


@joined.def_vmap
def _joined_rule(axis_size: int, in_batched: Any, new: Any, old: Any) -> tuple[Any, Any]:
  del axis_size
  new_mapped, old_mapped = in_batched
  if any(jax.tree.leaves(old_mapped)):
    return joined(new, old), new_mapped
  whole = lambda leaf, is_mapped: jnp.max(leaf, axis=0) if is_mapped else leaf
  reduced = jax.tree.map(whole, new, new_mapped)
  return joined(reduced, old), jax.tree.map(lambda _: False, new)


def across_devices(largest: jax.Array, state: Any) -> jax.Array:
  """Reduces an amax over the devices of a shard_map that share ``state``.

  Args:
    largest: float32 scalar; the amax of each device's part.
    state: as for ``amax``.

  Returns:
    float32 scalar; the maximum over these devices.
  """
  if unchecked := varying.unchecked_manual_axes():
    return lax.pmax(largest, unchecked)
  axes = varying.varying_axes(largest).difference(
    *map(varying.varying_axes, jax.tree.leaves(state))
  )
  return lax.pmax(largest, tuple(sorted(axes))) if axes else largest
