"""Converts XLA's shardings to mesh axes and back.

The axes are those of the mesh that the program was lowered for, each split into axes of prime size.
So a dimension can be sharded along a part of a mesh axis, which Shardy does too, and the names of
the axes do not matter. An axis is written as its index.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from flax_fp8._compat import hlo_sharding, replicated_subgroup

Axes = tuple[int, ...]
Dims = tuple[Axes, ...]  # for each dimension of an array, the axes that shard it, major to minor


def primes(size: int) -> tuple[int, ...]:
  """Returns the prime factors of ``size``, in ascending order."""
  prime = next((factor for factor in range(2, size + 1) if size % factor == 0), None)
  return () if prime is None else (prime, *primes(size // prime))


@dataclasses.dataclass(frozen=True)
class DeviceAxes:
  """Mesh axes over the devices 0 to n - 1 in row-major order.

  Attributes:
    sizes: size of each axis; a prime number.
  """

  sizes: tuple[int, ...]

  def count(self, axes: Iterable[int]) -> int:
    """Returns the number of shards along some axes."""
    return math.prod(self.sizes[axis] for axis in axes)

  def decode(self, sharding: Any, rank: int) -> Dims:
    """Returns the axes that shard each dimension; replicated if no axes give this sharding."""
    if sharding is None or not sharding.is_tiled():
      return ((),) * rank
    shape = sharding.tile_assignment_dimensions()
    devices = np.array(sharding.tile_assignment_devices()).reshape(*shape[:rank], -1)
    dims = tuple(self._along(devices, dim) for dim in range(rank))
    used = sum(dims, ())
    is_ours = len(set(used)) == len(used) and np.array_equal(np.sort(devices), self._tiles(dims))
    return dims if is_ours else ((),) * rank

  def encode(self, dims: Dims) -> Any:
    """Returns XLA's sharding."""
    if not any(dims):
      return hlo_sharding().replicate()
    return hlo_sharding().subgroup_with_device_ordering(
      self._tiles(dims), subgroup_types=[replicated_subgroup()]
    )

  def _along(self, devices: np.ndarray, dim: int) -> Axes:
    """Returns the axes along one dimension of tiles, from the steps between their devices."""
    line = np.moveaxis(devices, dim, 0).reshape(devices.shape[dim], -1)[:, 0].tolist()
    axis_of = {math.prod(self.sizes[axis + 1 :]): axis for axis in range(len(self.sizes))}
    axes: Axes = ()
    while (step := self.count(axes)) < len(line):
      axis = axis_of.get(line[step] - line[0])
      if axis is None:
        return ()
      axes = (axis, *axes)
    return axes

  def _tiles(self, dims: Dims) -> np.ndarray:
    """Returns the devices of each tile. The last dimension has the devices with the same tile."""
    used = sum(dims, ())
    unused = tuple(axis for axis in range(len(self.sizes)) if axis not in used)
    devices = np.arange(math.prod(self.sizes)).reshape(self.sizes).transpose(used + unused)
    return devices.reshape(*map(self.count, dims), -1)


@functools.cache
def possible_axes(sizes: tuple[int, ...]) -> list[DeviceAxes]:
  """Returns all ways to split mesh axes of any size.

  An axis of size 6 is split into 2 and 3, or 3 and 2. This also finds the axes of a mesh of which
  only the number of devices is known.
  """
  orders = [sorted(set(itertools.permutations(primes(size)))) for size in sizes]
  return [DeviceAxes(sum(split, ())) for split in itertools.product(*orders)]
