"""Checksums of checkpoint leaves, computed on save and compared on restore.

Each block of a leaf, as sharded over devices, has its own CRC-32. So no process needs data of
another process, and a reader may use another mesh. The checksums are JSON in the checkpoint's
metadata.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_fp8.training.checkpoint_checks import is_key


def checksums(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Computes the checksums of leaves. In a multi-process program, every process calls this.

  Args:
    leaves: leaves by path: arrays, sharded or not, PRNG keys, numbers or strings.

  Returns:
    A list for each path: the dtype, or the implementation of a key; the shape of a block; and the
    CRC-32 of all blocks in hexadecimal, in the order of ``np.ndindex`` over the grid of blocks.
  """
  stored = {path: _stored(leaf) for path, leaf in leaves.items()}
  own = {path: _own_sums(leaf) for path, leaf in stored.items()}
  sums = np.concatenate([each.ravel() for each in own.values()])
  if jax.process_count() > 1:
    # Each block has one owner. Its checksum is zero in other processes.
    sums = np.asarray(multihost_utils.process_allgather(sums)).max(axis=0)
  ends = np.cumsum([each.size for each in own.values()])[:-1]
  return {
    path: [_kind(leaves[path]), list(_block(leaf)), each.astype(">u4").tobytes().hex()]
    for (path, leaf), each in zip(stored.items(), np.split(sums, ends), strict=True)
  }


def damaged(leaves: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
  """Returns the paths of leaves that differ from what was saved.

  A process verifies only the blocks that it holds.

  Args:
    leaves: leaves by path, as they were read.
    saved: result of ``checksums`` for at least these leaves.
  """
  return [path for path, leaf in leaves.items() if not _agrees(leaf, *saved[path])]


def _own_sums(leaf: Any) -> np.ndarray:
  """Computes the CRC-32 of each block that this process writes; zero for all other blocks."""
  block = _block(leaf)
  sums = np.zeros(_grid(np.shape(leaf), block), np.uint32)
  if isinstance(leaf, jax.Array):
    for shard in leaf.addressable_shards:
      if shard.replica_id == 0:
        place = tuple((s.start or 0) // n for s, n in zip(shard.index, block, strict=True))
        sums[place] = _crc(_on_host(shard.data))
  elif jax.process_index() == 0:
    sums[...] = _crc(np.asarray(leaf))
  return sums


def _agrees(leaf: Any, kind: str, block: list[int], digits: str) -> bool:
  stored = _stored(leaf)
  sums = np.frombuffer(bytes.fromhex(digits), ">u4").reshape(_grid(np.shape(stored), block))
  held = list(_held(stored))
  for place in np.ndindex(sums.shape):
    starts = [i * n for i, n in zip(place, block, strict=True)]
    part = _part(held, starts, block)
    if part is not None and _crc(part) != sums[place]:
      return False
  # The target may ask for the raw data of a key as a NumPy array.
  return kind == _kind(leaf) or not isinstance(leaf, jax.Array)


def _held(leaf: Any) -> Iterator[tuple[list[int], np.ndarray]]:
  """Yields the start indices and the data of each part that this process holds."""
  if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
    whole = _on_host(leaf) if isinstance(leaf, jax.Array) else np.asarray(leaf)
    yield [0] * whole.ndim, whole
  else:
    for shard in leaf.addressable_shards:
      yield [s.start or 0 for s in shard.index], _on_host(shard.data)


def _part(
  held: list[tuple[list[int], np.ndarray]], starts: list[int], block: list[int]
) -> np.ndarray | None:
  """Extracts a block from the held parts; None if no part contains the whole block."""
  for begins, array in held:
    low = [start - begin for start, begin in zip(starts, begins, strict=True)]
    high = [i + n for i, n in zip(low, block, strict=True)]
    if min(low, default=0) >= 0 and all(i <= n for i, n in zip(high, array.shape, strict=True)):
      return array[tuple(map(slice, low, high))]
  return None


def _on_host(array: jax.Array) -> np.ndarray:
  """Copies an array to the host. Unlike ``np.asarray``, the array does not cache the copy."""
  shards = [shard.data for shard in array.addressable_shards]
  return np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards))


def _crc(array: np.ndarray) -> int:
  return zlib.crc32(array.reshape(-1).view(np.uint8).data)


def _stored(leaf: Any) -> Any:
  return jax.random.key_data(leaf) if is_key(leaf) else leaf


def _kind(leaf: Any) -> str:
  if is_key(leaf):
    return str(jax.random.key_impl(leaf))
  return str(leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype)


def _block(leaf: Any) -> tuple[int, ...]:
  shape = np.shape(leaf)
  return tuple(leaf.sharding.shard_shape(shape)) if isinstance(leaf, jax.Array) else shape


def _grid(shape: tuple[int, ...], block: Any) -> tuple[int, ...]:
  return tuple(size // each for size, each in zip(shape, block, strict=True))
