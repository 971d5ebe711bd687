"""Supports meshes with explicit axes, where the type of an array includes its sharding.

On such meshes JAX requires the sharding of a product that sums over a sharded axis, and of some
reshapes. On other meshes these functions do nothing, since the compiler infers shardings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import NamedSharding, PartitionSpec

MeshAxes: TypeAlias = tuple[str, ...]


def explicit_sharding(x: Any) -> NamedSharding | None:
  """Returns the sharding in the type of an array; None if no mesh axis is explicit."""
  sharding = jax.typeof(x).sharding
  return sharding if sharding.mesh.explicit_axes else None


def replicated_as(sharding: NamedSharding | None) -> NamedSharding | None:
  """Returns the replicated sharding on the same mesh; None for None."""
  return sharding and NamedSharding(sharding.mesh, PartitionSpec())


def transposed(sharding: NamedSharding | None, permutation: Sequence[int]) -> NamedSharding | None:
  """Returns the sharding of ``lax.transpose(x, permutation)``."""
  if sharding is None:
    return None
  axes = mesh_axes(sharding, len(permutation))
  return NamedSharding(sharding.mesh, PartitionSpec(*(axes[i] or None for i in permutation)))


def mesh_axes(sharding: NamedSharding, ndim: int) -> list[MeshAxes]:
  """Returns the mesh axes that shard each axis of an array."""
  entries: list[Any] = [*sharding.spec, *(None,) * (ndim - len(sharding.spec))]
  named = lambda entry: entry if isinstance(entry, tuple) else (entry,) if entry else ()
  return [named(entry) for entry in entries]


def evenly(
  sharding: NamedSharding, sizes: Sequence[int], axes: Sequence[MeshAxes]
) -> NamedSharding:
  """Shards each axis of a shape over its leading mesh axes that divide its size evenly."""
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
  """Calls a function with automatic sharding: the compiler shards the arrays in its body.

  ``fun(*args)``

  Args:
    fun: function of pytrees of arrays.
    out_shardings: shardings of the results, as a pytree or a prefix of it. None on a mesh without
      explicit axes, where ``fun`` is called directly.
    *args: arguments of ``fun``.

  Returns:
    The results of ``fun``, with these shardings.
  """
  leaves = jax.tree.leaves(out_shardings)
  if not leaves:
    return fun(*args)
  axes = tuple(leaves[0].mesh.explicit_axes)
  return jax.sharding.auto_axes(fun, axes=axes, out_sharding=out_shardings)(*args)
