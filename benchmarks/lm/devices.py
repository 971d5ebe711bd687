"""Where a run's arrays are: each batch cut over all devices of all processes, the state on each.

Nothing else in the benchmark knows how many devices or processes there are. A process draws only
the rows of its own devices; JAX puts the rows of all together into one array, of which the compiled
step reduces losses, gradients and amaxes over the devices by itself.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from lm.errors import UsageError

AXIS = "data"


@dataclasses.dataclass(frozen=True)
class Devices:
  """The devices that share every batch, in the order of its rows.

  Attributes:
    devices: JAX's, of all processes, the same in each of them.
  """

  devices: tuple[Any, ...]

  @classmethod
  def every(cls) -> "Devices":
    """All devices of all processes, process by process."""
    return cls(tuple(jax.devices()))

  @classmethod
  def first(cls) -> "Devices":
    """The first device of this process alone."""
    return cls(tuple(jax.local_devices()[:1]))

  def _sharding(self, *axes: str) -> Sharding:
    # A mesh of one device would compile to the same arithmetic, but not to the same text.
    if len(self.devices) == 1:
      return SingleDeviceSharding(self.devices[0])
    return NamedSharding(Mesh(np.array(self.devices), (AXIS,)), PartitionSpec(*axes))

  @property
  def replicated(self) -> Sharding:
    """Of the training state: whole on each device."""
    return self._sharding()

  @property
  def split(self) -> Sharding:
    """Of a batch: its rows shared out."""
    return self._sharding(AXIS)

  def require_even(self, batch_size: int) -> None:
    """Raises where the devices can't have the same number of rows each."""
    if batch_size % len(self.devices):
      count, processes = len(self.devices), jax.process_count()
      where = f"{count} devices" + (f" of {processes} processes" if processes > 1 else "")
      raise UsageError(
        "--batch-size: the devices share each batch evenly, so it must be a multiple of their "
        f"number; got {batch_size} for {where}. Use {max(batch_size // count, 1) * count}, or "
        "fewer devices."
      )

  def rows(self, batch_size: int) -> slice:
    """The rows of a batch that the devices of this process work on."""
    shards = self.split.addressable_devices_indices_map((batch_size,)).values()
    bounds = [index[0].indices(batch_size) for index in shards if index is not None]
    return slice(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))

  def put(self, rows: np.ndarray, batch_size: int) -> jax.Array:
    """Makes a batch of the rows that each process has."""
    shape = (batch_size, *rows.shape[1:])
    return jax.make_array_from_process_local_data(self.split, rows, shape)

  def create(self, make: Callable[..., Any], *args: Any) -> Any:
    """Calls a function under jit whose result, a tree, is to be whole on each device."""
    return jax.jit(make, out_shardings=self.replicated)(*args)


def whole(tree: Any) -> Any:
  """Takes a replicated tree to this process's first device, free of the others."""
  return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)
