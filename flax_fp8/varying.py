"""Mesh axes along which arrays vary in a ``shard_map``."""

from __future__ import annotations

from typing import Any

import jax
from jax.custom_batching import custom_vmap


def varying_axes(x: Any) -> frozenset[str]:
  """Returns the mesh axes along which ``x`` varies, as tracked by a checked shard_map."""
  aval = jax.typeof(x)
  if hasattr(aval, "manual_axis_type"):
    return frozenset(aval.manual_axis_type.varying)
  return frozenset(aval.vma)


def vary_as(x: jax.Array, *others: jax.Array) -> jax.Array:
  """Marks ``x`` as varying along the mesh axes along which ``others`` vary.

  A checked shard_map needs this after JAX primitives that do not track varying axes themselves.
  """
  axes = frozenset[str]().union(*map(varying_axes, others)) - varying_axes(x)
  if not axes:
    return x
  lax: Any = jax.lax  # has pcast or pvary, depending on the version
  names = tuple(sorted(axes))
  return lax.pcast(x, names, to="varying") if hasattr(lax, "pcast") else lax.pvary(x, names)


def psum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """``lax.psum`` that can be mapped in a checked shard_map. Older JAX can't map its own there."""

  @custom_vmap
  def add(x: jax.Array) -> jax.Array:
    return jax.lax.psum(x, axes)

  @add.def_vmap
  def rule(axis_size: int, in_batched: Any, x: jax.Array) -> tuple[jax.Array, bool]:
    del axis_size  # the sum is elementwise, so the mapped axis does not matter
    return psum(x, axes), in_batched[0]

  return add(x)


def unchecked_manual_axes() -> tuple[str, ...]:
  """Returns the manual mesh axes of an enclosing ``shard_map(check_vma=False)``, else ``()``.

  There JAX does not track varying axes, and it sums the cotangent of every replicated input over
  these axes. ``axis_index`` always varies, so its type shows whether JAX tracks an axis.
  """
  axes = tuple(jax.sharding.get_abstract_mesh().manual_axes)
  return tuple(a for a in axes if a not in varying_axes(jax.lax.axis_index(a)))


def manual_axes(x: Any) -> frozenset[str]:
  """Returns the mesh axes of all shard_maps that enclose the creation of ``x``."""
  return frozenset(jax.typeof(x).sharding.mesh.manual_axes)
