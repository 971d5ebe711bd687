"""The kernels of several layers in one: where each part lies, its factor, how it is initialised.

Layers that share an input are one GEMM with their output columns side by side. An axis of its own
tells the parts apart, and the axes around it stay whole: a mesh may split them without separating
what belongs together.
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
  """Columns ``[*groups, slots, width]`` of one kernel, the slots shared out among the parts.

  A part by itself has ``heads = prod(groups) * slots of the part`` blocks of ``width`` columns,
  ordered by group.

  Attributes:
    slots: the part's name, and how many slots of each group are its.
    width: columns of a slot.
    groups: sizes of the axes before.
  """

  slots: tuple[tuple[str, int], ...]
  width: int
  groups: tuple[int, ...] = ()

  @property
  def shape(self) -> tuple[int, ...]:
    """The columns' shape."""
    return (*self.groups, sum(count for _, count in self.slots), self.width)

  @property
  def heads(self) -> dict[str, int]:
    """The blocks of ``width`` columns that each part has."""
    return {name: math.prod(self.groups) * count for name, count in self.slots}

  def join(self, parts: Mapping[str, jax.Array]) -> jax.Array:
    """Makes ``[..., heads, width]`` of each part one array ``[..., *groups, slots, width]``."""
    grouped = [
      parts[name].reshape(*parts[name].shape[:-2], *self.groups, count, self.width)
      for name, count in self.slots
    ]
    return jnp.concatenate(grouped, axis=-2)

  def split(self, joined: jax.Array) -> dict[str, jax.Array]:
    """Takes ``[..., *groups, slots, width]`` apart into ``[..., heads, width]`` of each part."""
    lead = joined.shape[: joined.ndim - len(self.shape)]
    pieces = zip(self.heads.items(), self._pieces(joined, -2), strict=True)
    return {name: piece.reshape(*lead, heads, self.width) for (name, heads), piece in pieces}

  def init(self, init: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an initialiser of the fused array from that of a layer, which it calls once a part.

    Args:
      init: takes a key, the shape ``[..., features]`` that a separate layer has, and a dtype; gives
        an array, or one in a box of ``flax.linen`` with an axis name for each axis of the fused
        array.

    Returns:
      What takes a key, the leading shape and a dtype, and gives the fused array, in the box.
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
    """Computes the power of two by which each part comes near the largest one.

    ``2 ** floor(log2(max(|kernel|) / max(|part|)))``

    Args:
      kernel: ``[..., *groups, slots, width]``; float32, bfloat16 or float16.

    Returns:
      For each part a float32 scalar, at least 1. No part times it is larger than the kernel.

    Numerics:
      1 for a part of zeros, of non-finite values, or one that is 2**126 times too small.
    """
    axes = tuple(axis for axis in range(kernel.ndim) if axis != kernel.ndim - 2)
    of_slots = largest_magnitude(lax.stop_gradient(kernel), axes).ravel()
    pieces = zip(self.heads, self._pieces(of_slots, 0), strict=True)
    return {name: _factor(jnp.max(of_slots) / jnp.max(piece)) for name, piece in pieces}

  def scale(self, kernel: jax.Array, factors: Mapping[str, jax.Array]) -> jax.Array:
    """Multiplies each part of ``[..., slots, width]`` by its factor in float32; the dtype stays."""
    column = jnp.concatenate([jnp.full((n, 1), factors[name]) for name, n in self.slots])
    return (kernel.astype(jnp.float32) * jnp.broadcast_to(column, kernel.shape)).astype(
      kernel.dtype
    )

  def _pieces(self, x: jax.Array, axis: int) -> list[jax.Array]:
    """Cuts the axis of slots between the parts."""
    counts = [count for _, count in self.slots]
    return jnp.split(x, np.cumsum(counts)[:-1].tolist(), axis=axis)


def _factor(ratio: jax.Array) -> jax.Array:
  """The largest power of two that is no larger than a ratio of at least 1; 1 for what is none."""
  ratio = jnp.where(ratio <= _LARGEST_FACTOR, ratio, 1.0)
  exponent = lax.bitcast_convert_type(ratio, jnp.uint32) & np.uint32(0x7F800000)
  return lax.bitcast_convert_type(exponent, jnp.float32)
