"""Splits each batch over all devices of all processes, and replicates the training state.

A process reads only the rows of its own devices. JAX joins the rows into one array, and the
compiled step reduces losses, gradients and amaxes over the devices.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

AXIS = "data"


@dataclasses.dataclass(frozen=True)
class Devices:
  """The devices that share every batch, in the order of its rows; the same in each process."""

  devices: tuple[Any, ...]

  @classmethod
  def every(cls) -> "Devices":
    return cls(tuple(jax.devices()))

  @classmethod
  def first(cls) -> "Devices":
    return cls(tuple(jax.local_devices()[:1]))

  def sharding(self, *axes: str) -> Sharding:
    # A mesh of one device would compile to the same arithmetic, but to another text.
    if len(self.devices) == 1:
      return SingleDeviceSharding(self.devices[0])
    return NamedSharding(Mesh(np.array(self.devices), (AXIS,)), PartitionSpec(*axes))

  def rows(self, batch_size: int) -> slice:
    """The rows of a batch that belong to the devices of this process."""
    shards = self.sharding(AXIS).addressable_devices_indices_map((batch_size,)).values()
    bounds = [index[0].indices(batch_size) for index in shards if index is not None]
    return slice(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))

  def put(self, rows: np.ndarray, batch_size: int) -> jax.Array:
    """Makes the global batch from the rows of each process."""
    shape = (batch_size, *rows.shape[1:])
    return jax.make_array_from_process_local_data(self.sharding(AXIS), rows, shape)

  def create(self, make: Callable[..., Any], *args: Any) -> Any:
    """Calls a function under jit and replicates its result."""
    return jax.jit(make, out_shardings=self.sharding())(*args)
