"""Checkpoints of training states and variables, written and read by Orbax.

What Orbax does stays as it is: it writes shards in parallel and renames a finished checkpoint into
place. Added here is the comparison of what there is with what is wanted, leaf by leaf, in words
that say what to do about FP8 state that is missing or too much.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from flax_fp8.linen.state import OVERWRITE_WITH_GRADIENT
from flax_fp8.training.paths import Difference, compare, few, leaves_by_path, name

Directory = str | os.PathLike[str]


class Restored(NamedTuple):
  """What ``restore_checkpoint`` found.

  Attributes:
    tree: of the structure of the target.
    missing: paths of the leaves that were taken from the target.
    extra: paths of the leaves of the checkpoint that were left out.
  """

  tree: Any
  missing: tuple[str, ...]
  extra: tuple[str, ...]


def save_checkpoint(directory: Directory, state: Any, *, overwrite: bool = False) -> None:
  """Writes a training state, or any tree of arrays, and returns when it stands.

  Args:
    directory: made where missing; a path, or what else Orbax takes (``gs://...``).
    state: pytree of arrays, sharded or not, and numbers; a ``TrainState``, say. In a program of
      several processes each calls this.
    overwrite: deletes what checkpoints are there already, once the new one stands.

  Raises:
    ValueError: ``directory`` has a checkpoint and ``overwrite`` is False, or it is a file.
    TypeError: a leaf is fp32_max_grad, or of another dtype that only lives inside a program.

  Numerics:
    Bits are kept.

  Returns:
    Nothing. ``directory`` is one of ``orbax.checkpoint.CheckpointManager``, of one item, numbered
    from 0; killed at any moment, it has the checkpoint from before or the new one. For checkpoints
    of many steps, use that class itself with ``StandardSave(state)``: a ``TrainState`` is a plain
    pytree, and ``restore_checkpoint`` reads the newest.

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
  _require_plain_dtypes("save_checkpoint", state)
  if os.path.isfile(directory):
    raise ValueError(
      f"save_checkpoint: directory must be a directory or nothing; got the file {directory}. "
      "Choose another path."
    )
  with _manager(directory, create=True) as manager:
    newest = manager.latest_step()
    if newest is not None and not overwrite:
      raise ValueError(
        f"save_checkpoint: directory must have no checkpoint yet; got {directory} with one. Choose "
        "another, or pass overwrite=True to replace it."
      )
    following = 0 if newest is None else newest + 1
    manager.save(following, args=ocp.args.PyTreeSave(state), force=True)


def restore_checkpoint(
  directory: Directory,
  target: Any,
  *,
  allow_missing: Sequence[str] = (),
  allow_extra: Sequence[str] = (),
) -> Restored:
  """Reads a checkpoint, all of it or the part that ``target`` describes.

  Args:
    directory: where ``save_checkpoint`` wrote it, or a ``CheckpointManager`` of one item.
    target: pytree of what is wanted, of arrays or ShapeDtypeStructs. Each leaf is read with the
      sharding of its target, on whatever mesh it was written; without one, onto the first device.
    allow_missing: patterns (``fnmatch``) of paths that the checkpoint may lack. Their leaves are
      taken from ``target``, where they must be arrays.
    allow_extra: patterns of paths that only the checkpoint has, and that are not read; ``"*"``
      allows all, to read the parameters alone, say.

  Returns:
    ``(tree, missing, extra)``: the tree, of the structure of ``target``; the paths of leaves that
    were taken from ``target``; those of leaves that were not read. A path is that of keys and
    fields, joined by slashes: ``params/params/Dense_0/kernel`` of a ``TrainState``.

  Raises:
    ValueError: there is no checkpoint, or it can't be read, for some of its files are missing; it
      has not the leaves of ``target`` in its shapes and dtypes; a leaf that is missing is no array
      in ``target``, or does not divide by its sharding. Names the paths.
    TypeError: patterns are a string, or a leaf of ``target`` is fp32_max_grad.

  Numerics:
    Bits are kept; nothing is cast, nothing padded.

  Example:
    The parameters alone, of a checkpoint of a whole training state:

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
  _check_patterns(allow_missing, allow_extra)
  _require_plain_dtypes("restore_checkpoint", target)
  wanted = leaves_by_path(target)
  _check_shardings(wanted)
  with _manager(directory, create=False) as manager:
    step = _newest(manager, directory)
    metadata = _read_metadata(manager, step, directory)
    saved = leaves_by_path(metadata)
    difference = _compare(saved, wanted)
    _check_difference(difference, wanted, allow_missing, allow_extra)
    read = _read(manager, step, metadata, wanted, directory)
  found = leaves_by_path(read)
  tree = jax.tree_util.tree_map_with_path(
    lambda path, leaf: found[name(path)] if name(path) in saved else leaf, target
  )
  return Restored(tree, difference.missing, difference.extra)


def _manager(directory: Directory, *, create: bool) -> ocp.CheckpointManager:
  # Synchronous, since a training step may donate, and so overwrite, the arrays being saved. The old
  # checkpoint is deleted only once its successor stands.
  options = ocp.CheckpointManagerOptions(
    max_to_keep=1, enable_async_checkpointing=False, create=create
  )
  path = os.fspath(directory)
  path = path if "://" in path else os.path.abspath(path)
  return ocp.CheckpointManager(path, options=options, item_handlers=ocp.PyTreeCheckpointHandler())


def _newest(manager: ocp.CheckpointManager, directory: Directory) -> int:
  step = manager.latest_step()
  if step is None:
    raise ValueError(
      f"restore_checkpoint: directory must have a finished checkpoint; got {directory}, which has "
      "none. Pass the directory that save_checkpoint was given."
    )
  return step


def _unreadable(directory: Directory, error: object) -> ValueError:
  reason = (str(error) or repr(error)).splitlines()[0].split(" [tensorstore_spec", 1)[0]
  return ValueError(
    f"restore_checkpoint: the checkpoint must be whole; got {directory}, which can't be read: "
    f"{reason}. Restore another one, or copy its files again."
  )


def _read_metadata(manager: ocp.CheckpointManager, step: int, directory: Directory) -> Any:
  try:
    metadata: Any = manager.item_metadata(step)
  except Exception as error:  # Orbax raises nothing narrower
    raise _unreadable(directory, error) from error
  if metadata is None:
    raise _unreadable(directory, "it has no metadata of its leaves")
  return metadata.tree


def _read(
  manager: ocp.CheckpointManager,
  step: int,
  metadata: Any,
  wanted: Mapping[str, Any],
  directory: Directory,
) -> Any:
  """Reads the leaves that are wanted; the others are Orbax's placeholder."""
  item = jax.tree_util.tree_map_with_path(
    lambda path, _: _placed(wanted.get(name(path), ocp.PLACEHOLDER)), metadata
  )
  restore_args = jax.tree.map(_restore_args, item)
  args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args)
  try:
    return manager.restore(step, args=args)
  except Exception as error:  # Orbax raises nothing narrower
    raise _unreadable(directory, error) from error


def _placed(leaf: Any) -> Any:
  """Gives a ShapeDtypeStruct that names no sharding the first device."""
  if not isinstance(leaf, jax.ShapeDtypeStruct) or leaf.sharding is not None:
    return leaf
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
  if leaf is ocp.PLACEHOLDER:
    return ocp.RestoreArgs()
  return ocp.checkpoint_utils.construct_restore_args(leaf)


def _compare(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> Difference:
  """Compares shapes and dtypes; numbers of Python have no dtype of their own."""
  numbers = {
    path
    for path, leaf in saved.items()
    if isinstance(leaf, ocp.metadata.ScalarMetadata) or not hasattr(wanted.get(path), "dtype")
  }
  describe = lambda leaves: {
    path: f"{'' if path in numbers else getattr(leaf, 'dtype', '')}{getattr(leaf, 'shape', ())}"
    for path, leaf in leaves.items()
  }
  return compare(describe(saved), describe(wanted), describe=str)


def _check_difference(
  difference: Difference,
  wanted: Mapping[str, Any],
  allow_missing: Sequence[str],
  allow_extra: Sequence[str],
) -> None:
  refused = Difference(
    missing=_not_matched(difference.missing, allow_missing),
    extra=_not_matched(difference.extra, allow_extra),
    other=difference.other,
  )
  if refused:
    raise ValueError(
      "restore_checkpoint: the checkpoint must have the leaves of target; got "
      f"{refused}. {_advise(refused)}"
    )
  if abstract := [p for p in difference.missing if isinstance(wanted[p], jax.ShapeDtypeStruct)]:
    raise ValueError(
      "restore_checkpoint: leaves that the checkpoint lacks are taken from target, where they must "
      f"be arrays; got ShapeDtypeStructs for {few(abstract)}. Initialise them."
    )


def _not_matched(paths: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
  return tuple(p for p in paths if not any(fnmatch.fnmatchcase(p, q) for q in patterns))


def _advise(refused: Difference) -> str:
  """Says what to do: first about FP8 state, which is what differs between the two ways to train."""
  state = f"*{OVERWRITE_WITH_GRADIENT}/*"
  missing, extra, other = (
    any(OVERWRITE_WITH_GRADIENT in path for path in paths)
    for paths in (refused.missing, refused.extra, refused.other)
  )
  advice: list[str] = []
  if missing or other:
    advice.append(
      "Where the checkpoint has no FP8 state, or that of another recipe, restore what it has, and "
      "then use upgrade_variables(model, variables, *inputs)"
      + (f"; or take the state from target, with allow_missing=[{state!r}]." if missing else ".")
    )
  if extra:
    advice.append(
      "Where target has no FP8 state, leave the checkpoint's out with "
      f"allow_extra=[{state!r}], or restore it all and use downgrade_variables(variables)."
    )
  return " ".join(advice) or (
    "Pass a target of the same model and optimiser, or name what may differ in allow_missing and "
    "allow_extra."
  )


def _check_patterns(*given: Any) -> None:
  for patterns in given:
    if isinstance(patterns, str):
      raise TypeError(
        "restore_checkpoint: allow_missing and allow_extra must be sequences of patterns; got the "
        f"string {patterns!r}. Pass [{patterns!r}]."
      )


def _check_shardings(wanted: Mapping[str, Any]) -> None:
  """Asks JAX early whether shapes divide, for Orbax would have begun to read."""
  for path, leaf in wanted.items():
    if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None:
      try:
        leaf.sharding.shard_shape(leaf.shape)
      except ValueError as error:
        raise ValueError(
          f"restore_checkpoint: shapes must divide by the shardings of target; got {path!r} of "
          f"shape {leaf.shape} and {leaf.sharding}. Shard another axis, or replicate it."
        ) from error


def _require_plain_dtypes(caller: str, tree: Any) -> None:
  """Refuses dtypes that exist for autodiff alone; PRNG keys are Orbax's business."""
  extended = [
    path
    for path, leaf in leaves_by_path(tree).items()
    if hasattr(leaf, "dtype")
    and jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  ]
  if extended:
    raise TypeError(
      f"{caller}: leaves must be of dtypes that can be stored; got fp32_max_grad or its like at "
      f"{few(extended)}. Take the variables from before as_max_grad, or cast them to float32."
    )
