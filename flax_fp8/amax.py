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
from jax import lax
from jax.custom_batching import custom_vmap

from flax_fp8 import _compat


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
  largest = _reduce_all_but(0)(x, state)
  return _across_devices(largest, state)


@functools.cache
def _reduce_all_but(kept: int) -> Callable[[jax.Array, Any], jax.Array]:
  """Makes the reduction that keeps the first ``kept`` axes, over which the state is mapped."""

  @custom_vmap
  def reduce(x: jax.Array, state: Any) -> jax.Array:
    del state
    axes = tuple(range(kept, x.ndim))
    return jnp.max(jnp.abs(x), axis=axes, initial=0).astype(jnp.float32)

  @reduce.def_vmap
  def rule(axis_size: int, in_batched: Any, x: jax.Array, state: Any) -> tuple[jax.Array, bool]:
    x_mapped, state_mapped = in_batched[0], any(jax.tree.leaves(in_batched[1]))
    if not state_mapped:
      return reduce(jnp.moveaxis(x, 0, kept), state), False
    if not x_mapped:
      x = jnp.broadcast_to(x, (axis_size, *x.shape))
    return _reduce_all_but(kept + 1)(x, state), True

  return reduce


def _across_devices(largest: jax.Array, state: Any) -> jax.Array:
  if unchecked := _compat.unchecked_manual_axes():
    return lax.pmax(largest, unchecked)
  axes = _compat.varying_axes(largest).difference(
    *map(_compat.varying_axes, jax.tree.leaves(state))
  )
  return lax.pmax(largest, tuple(sorted(axes))) if axes else largest


def emit_once(new_state: jax.Array) -> jax.Array:
  """Prepares a new state for leaving the backward pass as a cotangent.

  ``shard_map(check_vma=False)`` sums the cotangents of a replicated input over the devices, so
  there all but the first emit zero, and the sum is exact. Anywhere else this is the identity.

  Args:
    new_state: one leaf; float32; equal on all devices of an unchecked shard_map.

  Returns:
    The cotangent; shape and dtype of ``new_state``.
  """
  axes = _compat.unchecked_manual_axes()
  if not axes:
    return new_state
  first = jnp.array(True)
  for axis in axes:
    first &= lax.axis_index(axis) == 0
  return jnp.where(first, new_state, jnp.zeros_like(new_state))
