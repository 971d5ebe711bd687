"""Meshes with explicit axes, under which the type of an array says how it is sharded.

There JAX asks how the result of a product that sums over a sharded axis is sharded, and of many a
reshape. On other meshes nothing here does anything: there the compiler finds out by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import NamedSharding, PartitionSpec

MeshAxes: TypeAlias = tuple[str, ...]


def explicit_sharding(x: Any) -> NamedSharding | None:
  """Returns the sharding that the type of an array names; None where no mesh axis is explicit."""
  sharding = jax.typeof(x).sharding
  return sharding if sharding.mesh.explicit_axes else None


def replicated_as(sharding: NamedSharding | None) -> NamedSharding | None:
  """Returns the sharding of what is the same on every device of a mesh."""
  return sharding and NamedSharding(sharding.mesh, PartitionSpec())


def transposed(sharding: NamedSharding | None, permutation: Sequence[int]) -> NamedSharding | None:
  """Returns the sharding of ``lax.transpose(x, permutation)``."""
  if sharding is None:
    return None
  axes = mesh_axes(sharding, len(permutation))
  return NamedSharding(sharding.mesh, PartitionSpec(*(axes[i] or None for i in permutation)))


def mesh_axes(sharding: NamedSharding, ndim: int) -> list[MeshAxes]:
  """Returns the mesh axes over which each axis of an array is sharded."""
  entries: list[Any] = [*sharding.spec, *(None,) * (ndim - len(sharding.spec))]
  named = lambda entry: entry if isinstance(entry, tuple) else (entry,) if entry else ()
  return [named(entry) for entry in entries]


def evenly(
  sharding: NamedSharding, sizes: Sequence[int], axes: Sequence[MeshAxes]
) -> NamedSharding:
  """Shards each axis of a shape over those of its mesh axes, in order, that divide its size."""
  entries = []
  for size, names in zip(sizes, axes, strict=True):
    fitting: MeshAxes = ()
    for name in names:
      size, rest = divmod(size, sharding.mesh.shape[name])
      if rest:
        break
      fitting += (name,)
    entries.append(fitting or None)
  return NamedSharding(sharding.mesh, PartitionSpec(*entries))


def in_auto(fun: Callable[..., Any], out_shardings: Any, *args: Any) -> Any:
  """Calls a function in whose body the compiler decides how arrays are sharded.

  ``fun(*args)``

  Args:
    fun: takes pytrees of arrays.
    out_shardings: pytree of what it returns, or a prefix of it; None on a mesh without explicit
      axes, where it is merely called.
    *args: its arguments.

  Returns:
    What ``fun`` returns, of these shardings.
  """
  leaves = jax.tree.leaves(out_shardings)
  if not leaves:
    return fun(*args)
  axes = tuple(leaves[0].mesh.explicit_axes)
  return jax.sharding.auto_axes(fun, axes=axes, out_sharding=out_shardings)(*args)
