"""Computes small arrays of several tensors together, so that a GPU starts fewer kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from flax_fp8.sharding import explicit_sharding


def together(fun: Callable[..., Any], *columns: Sequence[Any]) -> list[Any]:
  """Applies a function to several items in one computation on stacked arrays.

  ``[fun(*item) for item in zip(*columns)]``

  Args:
    fun: function of pytrees of arrays that returns a pytree of arrays.
    *columns: for each argument of ``fun``, its values.

  Returns:
    The results, bit for bit those of separate calls.

  Numerics:
    Items are computed separately if they differ in structure, shapes, dtypes, varying mesh axes, or
    in what a ``vmap`` maps; and on a mesh with explicit axes. So no item depends on another.
  """
  items = list(zip(*columns, strict=True))
  types = [jax.tree.flatten(jax.tree.map(jax.typeof, item)) for item in items]
  explicit = any(explicit_sharding(leaf) for leaf in jax.tree.leaves(items))
  if len(items) < 2 or explicit or any(each != types[0] for each in types):
    return [fun(*item) for item in items]

  @custom_vmap
  def stacked(items: list[Any]) -> list[Any]:
    out = jax.vmap(fun)(*jax.tree.map(lambda *leaves: jnp.stack(leaves), *items))
    return [jax.tree.map(_take(index), out) for index in range(len(items))]

  @stacked.def_vmap
  def rule(axis_size: int, in_batched: Any, items: list[Any]) -> tuple[list[Any], list[Any]]:
    (mapped,) = in_batched
    axes = [jax.tree.map(lambda is_mapped: 0 if is_mapped else None, each) for each in mapped]
    over = [_map(fun, axis, axis_size) for axis in axes]
    if all(axis == axes[0] for axis in axes):
      out = together(over[0], *zip(*items, strict=True))
    else:
      out = [each(*item) for each, item in zip(over, items, strict=True)]
    any_mapped = [any(jax.tree.leaves(each)) for each in mapped]
    flags = [
      jax.tree.map(lambda _, flag=flag: flag, each)
      for each, flag in zip(out, any_mapped, strict=True)
    ]
    return out, flags

  return stacked(items)


def _map(fun: Callable[..., Any], axes: Any, axis_size: int) -> Callable[..., Any]:
  """Maps a function over its mapped arguments; returns it unchanged if there are none."""
  if all(axis is None for axis in jax.tree.leaves(axes, is_leaf=lambda axis: axis is None)):
    return fun
  return jax.vmap(fun, tuple(axes), axis_size=axis_size)


def _take(index: int) -> Callable[[jax.Array], jax.Array]:
  return lambda leaf: lax.index_in_dim(leaf, index, keepdims=False)
