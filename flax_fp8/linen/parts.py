"""The layout of a fused kernel: position, initialization and scale factor of each part.

Layers that share an input become one GEMM with their output columns side by side. A separate axis
of slots distinguishes the parts. A mesh can shard the axes around it without separating the columns
of one head or one hidden feature.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_fp8.amax import largest_magnitude

_LARGEST_FACTOR = np.float32(2.0**126)  # its reciprocal is normal in float32


@dataclasses.dataclass(frozen=True)
class Parts:
  """Columns ``[*groups, slots, width]`` of one kernel, with the slots divided among the parts.

  A separate layer of a part has ``heads = prod(groups) * (slots of the part)`` blocks of ``width``
  columns, ordered by group.

  Attributes:
    slots: name of each part and its number of slots in each group.
    width: number of columns in a slot.
    groups: sizes of the axes in front of the slots.
  """

  slots: tuple[tuple[str, int], ...]
  width: int
  groups: tuple[int, ...] = ()

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the columns."""
    return (*self.groups, sum(count for _, count in self.slots), self.width)

  @property
  def heads(self) -> dict[str, int]:
    """Number of blocks of ``width`` columns in each part."""
    return {name: math.prod(self.groups) * count for name, count in self.slots}

  def join(self, parts: Mapping[str, jax.Array]) -> jax.Array:
    """Joins parts ``[..., heads, width]`` to one array ``[..., *groups, slots, width]``."""
    grouped = [
      parts[name].reshape(*parts[name].shape[:-2], *self.groups, count, self.width)
      for name, count in self.slots
    ]
    return jnp.concatenate(grouped, axis=-2)

  def split(self, joined: jax.Array) -> dict[str, jax.Array]:
    """Splits ``[..., *groups, slots, width]`` into parts ``[..., heads, width]``."""
    lead = joined.shape[: joined.ndim - len(self.shape)]
    pieces = zip(self.heads.items(), self._pieces(joined, -2), strict=True)
    return {name: piece.reshape(*lead, heads, self.width) for (name, heads), piece in pieces}

  def init(self, init: Callable[..., Any]) -> Callable[..., Any]:
    """Returns an initializer of the fused array that calls a layer's initializer for each part.

    Args:
      init: initializer of a separate layer. It takes a key, the shape ``[..., features]`` and a
        dtype. It returns an array, or a ``flax.linen`` box with a name for each axis of the fused
        array.

    Returns:
      A function of a key, the leading shape and a dtype. It returns the fused array, in the box if
      ``init`` returns one.
    """

    def fused(key: jax.Array, lead: Sequence[int], dtype: Any) -> Any:
      keys = jax.random.split(key, len(self.slots))
      made = [
        init(part_key, (*lead, heads * self.width), dtype)
        for part_key, heads in zip(keys, self.heads.values(), strict=True)
      ]
      arrays = {
        name: jax.tree.leaves(part)[0].reshape(*lead, heads, self.width)
        for (name, heads), part in zip(self.heads.items(), made, strict=True)
      }
      return jax.tree.unflatten(jax.tree.structure(made[0]), [self.join(arrays)])

    return fused

  def factors(self, kernel: jax.Array) -> dict[str, jax.Array]:
    """Computes the power of two that brings each part close to the largest part.

    ``2 ** floor(log2(max(|kernel|) / max(|part|)))``

    Args:
      kernel: ``[..., *groups, slots, width]``; float32, bfloat16 or float16.

    Returns:
      For each part, a float32 scalar of at least 1. The scaled part does not exceed the amax of the
      kernel.

    Numerics:
      The factor is 1 for a part that is zero, not finite, or more than 2**126 times too small.
    """
    axes = tuple(axis for axis in range(kernel.ndim) if axis != kernel.ndim - 2)
    of_slots = largest_magnitude(lax.stop_gradient(kernel), axes).ravel()
    pieces = zip(self.heads, self._pieces(of_slots, 0), strict=True)
    return {name: _factor(jnp.max(of_slots) / jnp.max(piece)) for name, piece in pieces}

  def scale(self, kernel: jax.Array, factors: Mapping[str, jax.Array]) -> jax.Array:
    """Multiplies each part of ``[..., slots, width]`` by its factor in float32; keeps the dtype."""
    column = jnp.concatenate([jnp.full((n, 1), factors[name]) for name, n in self.slots])
    return (kernel.astype(jnp.float32) * jnp.broadcast_to(column, kernel.shape)).astype(
      kernel.dtype
    )

  def _pieces(self, x: jax.Array, axis: int) -> list[jax.Array]:
    """Splits the axis of slots between the parts."""
    counts = [count for _, count in self.slots]
    return jnp.split(x, np.cumsum(counts)[:-1].tolist(), axis=axis)


def _factor(ratio: jax.Array) -> jax.Array:
  """Returns the largest power of two up to a ratio of at least 1; 1 if the ratio is not usable."""
  ratio = jnp.where(ratio <= _LARGEST_FACTOR, ratio, 1.0)
  exponent = lax.bitcast_convert_type(ratio, jnp.uint32) & np.uint32(0x7F800000)
  return lax.bitcast_convert_type(exponent, jnp.float32)
