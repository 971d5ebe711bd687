"""Checkpoints of training states and variables, written and read by Orbax.

Orbax writes shards in parallel, and renames a finished checkpoint into place. This module adds a
lock, checksums of the leaves, and a comparison of the checkpoint with the target. Its errors give
advice on missing and extra FP8 state.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from flax_fp8 import fields
from flax_fp8.training import checkpoint_checks as checks
from flax_fp8.training.checksums import checksums, damaged
from flax_fp8.training.paths import few, leaves_by_path, name

try:
  import fcntl
except ImportError:  # Windows
  fcntl = None

Directory = str | os.PathLike[str]

CHECKSUMS = "flax_fp8_checksums"
NUMBER = 0  # placeholder for a leaf that is read as a zero-dimensional NumPy array
REASON = 200


class Restored(NamedTuple):
  """Result of ``restore_checkpoint``.

  Attributes:
    tree: the restored tree, with the structure of the target.
    missing: paths of the leaves that were taken from the target.
    extra: paths of the leaves of the checkpoint that were not read.
  """

  tree: Any
  missing: tuple[str, ...]
  extra: tuple[str, ...]


def save_checkpoint(directory: Directory, state: Any, *, overwrite: bool = False) -> None:
  """Saves a tree of arrays.

  The call returns after the checkpoint is written completely. A second save to the same directory
  raises an error unless ``overwrite`` is True. In a loop, pass ``overwrite=True``, or save each
  step to its own directory.

  If the process is killed while saving, ``directory`` has either the old or the new checkpoint.

  Args:
    directory: path, or another location that Orbax supports (``gs://...``). It is created if
      missing.
    state: pytree of arrays, sharded or not, PRNG keys and numbers, such as a ``TrainState``. In a
      multi-process program, every process calls this function.
    overwrite: deletes older checkpoints in ``directory`` after the new one is complete.

  Returns:
    None. The layout of ``directory`` is that of an ``orbax.checkpoint.CheckpointManager`` with a
    single item; steps are numbered from 0. To keep checkpoints of many steps, use that class with
    ``StandardSave(state)``. A ``TrainState`` is a plain pytree. ``restore_checkpoint`` reads the
    newest step.

  Raises:
    ValueError: ``directory`` is a file, or has a checkpoint and ``overwrite`` is False; ``state``
      has no leaves; or a leaf has the path of another leaf, was donated, or has no elements.
    TypeError: ``directory`` is not a path, ``overwrite`` is not a boolean, or a leaf is
      fp32_max_grad or of another type that can't be stored.
    OSError: the checkpoint could not be written, or another program is saving to ``directory``. An
      older checkpoint is still there.

  Numerics:
    All bits are kept. A CRC-32 of each leaf, or of each shard, is stored too.
    ``restore_checkpoint`` verifies it. The checksums take about 0.3 seconds per GiB of the data of
    a process.

  Example:
    >>> import tempfile, jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   fp8.save_checkpoint(directory, {"params": {"kernel": jnp.ones(2)}})
    ...   target = {"params": {"kernel": jnp.zeros(2)}}
    ...   fp8.restore_checkpoint(directory, target).tree
    {'params': {'kernel': Array([1., 1.], dtype=float32)}}

  References:
    https://orbax.readthedocs.io/en/latest/guides/checkpoint/orbax_checkpoint_101.html
  """
  checks.require_directory("save_checkpoint", directory)
  overwrite = fields.flag("save_checkpoint", "overwrite", overwrite)
  checks.require_storable(state)
  if os.path.isfile(directory):
    raise ValueError(
      f"save_checkpoint: directory must be a directory or nothing; got the file {directory}. "
      "Choose another path."
    )
  with _only_writer(directory), _manager(directory, create=True) as manager:
    newest = manager.latest_step()
    if newest is not None and not overwrite:
      raise ValueError(
        f"save_checkpoint: directory must have no checkpoint yet; got {directory} with one. Choose "
        "another, or pass overwrite=True to replace it."
      )
    following = 0 if newest is None else newest + 1
    _write(manager, following, state, directory)


def restore_checkpoint(
  directory: Directory,
  target: Any,
  *,
  allow_missing: Sequence[str] = (),
  allow_extra: Sequence[str] = (),
) -> Restored:
  """Reads a checkpoint, or the part of it that ``target`` describes.

  Args:
    directory: directory of ``save_checkpoint``, or of a ``CheckpointManager`` with a single item.
    target: pytree of arrays or ShapeDtypeStructs that describes the result. Each leaf is read with
      the sharding of its target, even if it was saved on another mesh. Without a sharding, it is
      read onto the first device.
    allow_missing: patterns (``fnmatch``) of paths that the checkpoint may lack. These leaves are
      taken from ``target``, where they must be arrays.
    allow_extra: patterns of paths that only the checkpoint has. These leaves are not read. Pass
      ``["*"]`` to allow all, for example to read only the parameters.

  Returns:
    ``(tree, missing, extra)``: the tree with the structure of ``target``; the paths of leaves that
    were taken from ``target``; and the paths of leaves that were not read. A path is keys and
    fields joined by slashes, such as ``params/params/Dense_0/kernel`` in a ``TrainState``.

  Raises:
    ValueError: there is no checkpoint; it can't be read; a leaf differs from its saved checksum;
      the leaves differ from ``target`` in paths, shapes or dtypes; a missing leaf is not an array
      in ``target``; a shape does not divide by its sharding; or a number does not fit the type of
      its target. The error names the paths.
    TypeError: ``directory`` is not a path, ``allow_missing`` or ``allow_extra`` is a string, or a
      leaf of ``target`` is fp32_max_grad.

  Numerics:
    All bits are kept. Arrays are neither cast nor padded. Only numbers that were saved as Python
    numbers take the type of their target, which rounds floating-point numbers.

    Checkpoints that Orbax or earlier versions wrote have no checksums and are not verified. In a
    multi-process program, each process verifies the saved shards that one of its own shards
    contains.

  Example:
    Read only the parameters from the checkpoint of a training state:

    >>> import tempfile, jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   fp8.save_checkpoint(directory, {"step": jnp.array(7), "params": jnp.ones(2)})
    ...   target = {"params": jnp.zeros(2)}
    ...   fp8.restore_checkpoint(directory, target, allow_extra=["*"])
    Restored(tree={'params': Array([1., 1.], dtype=float32)}, missing=(), extra=('step',))

  References:
    https://orbax.readthedocs.io/en/latest/guides/checkpoint/checkpointing_pytrees.html
  """
  checks.require_directory("restore_checkpoint", directory)
  checks.check_patterns(allow_missing, allow_extra)
  checks.require_plain_dtypes("restore_checkpoint", target)
  checks.require_distinct_paths("restore_checkpoint", target)
  wanted = leaves_by_path(target)
  checks.check_shardings(wanted)
  with _manager(directory, create=False) as manager:
    step = _newest(manager, directory)
    metadata = _read_metadata(manager, step, directory)
    checks.require_distinct_paths("restore_checkpoint", metadata.tree)
    saved = leaves_by_path(metadata.tree)
    difference = checks.difference_of(saved, wanted)
    checks.check_difference(difference, wanted, allow_missing, allow_extra)
    item = _item(metadata.tree, wanted)
    found = _read(manager, step, item, directory)
  _verify(found, saved, metadata.custom_metadata, directory)
  checks.check_keys(found, wanted)
  tree = jax.tree_util.tree_map_with_path(
    lambda path, leaf: (
      _take_type(name(path), found[name(path)], leaf) if name(path) in found else leaf
    ),
    target,
  )
  return Restored(tree, difference.missing, difference.extra)


@contextlib.contextmanager
def _only_writer(directory: Directory) -> Generator[None]:
  """Locks a local directory. The operating system releases the lock if this process dies."""
  if fcntl is None or "://" in os.fspath(directory):
    yield
    return
  os.makedirs(directory, exist_ok=True)
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    if not _everywhere(jax.process_index() != 0 or _locked(descriptor)):
      raise BlockingIOError(
        "save_checkpoint: only one program may save to a directory at a time; got "
        f"{directory}, where another program is saving. Nothing was changed. Save to another "
        "directory, or save from one program only."
      )
    yield
  finally:
    os.close(descriptor)


def _locked(descriptor: int) -> bool:
  assert fcntl is not None
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError:  # a file system without locks
    return True
  return True


def _everywhere(holds: bool) -> bool:
  """Returns whether ``holds`` is true in all processes of this program."""
  if jax.process_count() == 1:
    return holds
  return bool(np.all(multihost_utils.process_allgather(np.asarray(holds))))


def _manager(directory: Directory, *, create: bool) -> ocp.CheckpointManager:
  # Synchronous, because a training step may donate, and so overwrite, the arrays being saved.
  # Orbax deletes the old checkpoint only after the new one is complete.
  options = ocp.CheckpointManagerOptions(
    max_to_keep=1, enable_async_checkpointing=False, create=create
  )
  path = os.fspath(directory)
  path = path if "://" in path else os.path.abspath(path)
  handler = ocp.PyTreeCheckpointHandler()
  try:
    return ocp.CheckpointManager(path, options=options, item_handlers=handler)
  except Exception as error:  # Orbax raises nothing narrower
    raise (_unwritten if create else _unreadable)(directory, error) from error


def _write(manager: ocp.CheckpointManager, step: int, state: Any, directory: Directory) -> None:
  sums = checksums(leaves_by_path(state))
  args = ocp.args.PyTreeSave(state, custom_metadata={CHECKSUMS: sums})
  try:
    manager.save(step, args=args, force=True)
  except Exception as error:  # Orbax raises nothing narrower
    raise _unwritten(directory, error) from error


def _newest(manager: ocp.CheckpointManager, directory: Directory) -> int:
  step = manager.latest_step()
  if step is None:
    raise ValueError(
      f"restore_checkpoint: directory must have a finished checkpoint; got {directory}, which has "
      "none. Pass the directory of save_checkpoint."
    )
  return step


def _reason(error: object) -> str:
  """Returns the root cause of an error in one line."""
  while isinstance(error, BaseException) and error.__cause__ is not None:
    error = error.__cause__
  kind = "" if isinstance(error, ValueError | str) else f"{type(error).__name__}: "
  reason = kind + (str(error) or repr(error)).splitlines()[0].split(" [tensorstore_spec", 1)[0]
  reason = reason.rstrip(".")
  half = REASON // 2
  return reason if len(reason) <= REASON else f"{reason[:half]} ... {reason[-half:]}"


def _unwritten(directory: Directory, error: object) -> OSError:
  return OSError(
    f"save_checkpoint: the checkpoint must be written completely; got {directory}, where writing "
    f"failed: {_reason(error)}. An older checkpoint is still there. Fix the cause, such as a full "
    "disk, or choose another directory, and save again."
  )


def _unreadable(directory: Directory, error: object) -> ValueError:
  return ValueError(
    f"restore_checkpoint: the checkpoint must be complete and undamaged; got {directory}, which "
    f"can't be read: {_reason(error)}. Restore another checkpoint, or copy its files again."
  )


def _read_metadata(manager: ocp.CheckpointManager, step: int, directory: Directory) -> Any:
  try:
    metadata: Any = manager.item_metadata(step)
  except Exception as error:  # Orbax raises nothing narrower
    raise _unreadable(directory, f"its metadata is damaged, {_reason(error)}") from error
  if metadata is None:
    raise _unreadable(directory, "it has no metadata of its leaves")
  return metadata


def _item(metadata: Any, wanted: Mapping[str, Any]) -> Any:
  """Returns how Orbax must read each leaf; ``PLACEHOLDER`` for leaves that it must skip."""

  def form(path: Any, saved: Any) -> Any:
    target = wanted.get(name(path), ocp.PLACEHOLDER)
    if target is ocp.PLACEHOLDER or isinstance(target, str):
      return target
    if checks.is_number(saved, target):
      return NUMBER
    if isinstance(target, np.ndarray):
      return target
    # Orbax reads the raw data of a PRNG key, which have more dimensions than the key.
    like = saved if checks.is_key(target) else target
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=_sharding(target))

  return jax.tree_util.tree_map_with_path(form, metadata)


def _read(
  manager: ocp.CheckpointManager, step: int, item: Any, directory: Directory
) -> dict[str, Any]:
  """Reads the wanted leaves, by path."""
  args = ocp.args.PyTreeRestore(item=item, restore_args=jax.tree.map(_restore_args, item))
  try:
    read = leaves_by_path(manager.restore(step, args=args))
    return {
      path: read[path] for path, leaf in leaves_by_path(item).items() if leaf is not ocp.PLACEHOLDER
    }
  except Exception as error:  # Orbax raises nothing narrower
    raise _unreadable(directory, error) from error


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
  if isinstance(leaf, checks.ARRAYS):
    return ocp.checkpoint_utils.construct_restore_args(leaf)
  return ocp.RestoreArgs(restore_type=np.ndarray) if leaf is NUMBER else ocp.RestoreArgs()


def _sharding(target: Any) -> jax.sharding.Sharding:
  return target.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _verify(
  found: Mapping[str, Any], saved: Mapping[str, Any], custom_metadata: Any, directory: Directory
) -> None:
  """Compares checksums, if the checkpoint has them."""
  if CHECKSUMS not in (custom_metadata or {}):
    return
  try:
    sums = custom_metadata[CHECKSUMS]
    if sums.keys() != saved.keys():
      raise ValueError("its checksums belong to other leaves")
    wrong = damaged(found, sums)
  except Exception as error:  # the checksums may be damaged too
    raise _unreadable(directory, error) from error
  if wrong:
    raise _unreadable(directory, f"{few(wrong)} differ from what was saved")


def _take_type(path: str, read: Any, target: Any) -> Any:
  """Converts a number to the type of its target; other leaves have the type already."""
  if isinstance(read, jax.Array | str) or (isinstance(target, np.ndarray) and read.ndim):
    return read
  if type(read.item()) is type(target):
    return read.item()
  kind = getattr(target, "dtype", type(target))
  with np.errstate(all="ignore"):
    number = read.astype(kind)
  rounded = all(jnp.issubdtype(each.dtype, np.floating) for each in (read, number))
  if not (np.array_equal(number, read, equal_nan=rounded) or (rounded and np.isfinite(number))):
    raise ValueError(
      "restore_checkpoint: numbers must fit the types of target; got "
      f"{path!r}={read} for {jnp.dtype(kind).name}. Use a wider type in target."
    )
  if isinstance(target, jax.Array | jax.ShapeDtypeStruct):
    return jax.device_put(number, _sharding(target))
  if isinstance(target, np.ndarray):
    return number
  return number[()] if isinstance(target, np.generic) else number.item()
