"""What ``save_checkpoint`` and ``restore_checkpoint`` refuse, in words that say what to do."""

from __future__ import annotations

import fnmatch
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.core import Tracer

from flax_fp8 import fields
from flax_fp8.linen.state import OVERWRITE_WITH_GRADIENT
from flax_fp8.training.paths import Difference, compare, few, leaves_by_path, name

ARRAYS = (jax.Array, jax.ShapeDtypeStruct, np.ndarray)


def is_key(leaf: Any) -> bool:
  """Tells typed PRNG keys from other leaves."""
  return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def require_directory(caller: str, directory: Any) -> None:
  """Refuses what names no directory."""
  if not isinstance(directory, str | os.PathLike):
    raise TypeError(
      f"{caller}: directory must be a path; got directory={fields.show(directory)}. Pass "
      f"{caller}(directory, tree)."
    )


def require_distinct_paths(caller: str, tree: Any) -> None:
  """Refuses leaves that we or Orbax, which joins by dots, would take for one another."""
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  names = [Counter(separator.join(name([entry]) for entry in path) for path in paths)
           for separator in "/."]  # fmt: skip
  if same := [each for counted in names for each, count in counted.items() if count > 1]:
    raise ValueError(
      f"{caller}: paths of leaves must differ when joined by slashes or dots; got several leaves "
      f"at {few(same)}. Rename keys that contain a slash or a dot."
    )


def require_plain_dtypes(caller: str, tree: Any) -> None:
  """Refuses dtypes that exist for autodiff alone."""
  extended = [
    path
    for path, leaf in leaves_by_path(tree).items()
    if hasattr(leaf, "dtype")
    and jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    and not is_key(leaf)
  ]
  if extended:
    raise TypeError(
      f"{caller}: leaves must be of dtypes that can be stored; got fp32_max_grad or its like at "
      f"{few(extended)}. Take the variables from before as_max_grad, or cast them to float32."
    )


def require_storable(tree: Any) -> None:
  """Refuses what Orbax would refuse in the middle of its work, or could not give back."""
  require_distinct_paths("save_checkpoint", tree)
  require_plain_dtypes("save_checkpoint", tree)
  leaves = leaves_by_path(tree)
  if not leaves:
    raise ValueError("save_checkpoint: state must have leaves; got none. Save it with the arrays.")
  if unlike := [f"{p} {type(x).__name__}" for p, x in leaves.items() if not _is_plain(x)]:
    raise TypeError(
      "save_checkpoint: leaves must be arrays, real numbers of at most 64 bits, or strings; got "
      f"{few(unlike)}. Convert them, or leave them out."
    )
  arrays = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, ARRAYS)}
  if empty := [f"{path} {leaf.shape}" for path, leaf in arrays.items() if 0 in leaf.shape]:
    raise ValueError(
      f"save_checkpoint: arrays must have elements, for Orbax stores no others; got {few(empty)}. "
      "Leave them out of state, and allow_missing when you restore."
    )
  if gone := [p for p, x in arrays.items() if isinstance(x, jax.Array) and x.is_deleted()]:
    raise ValueError(
      "save_checkpoint: arrays must be alive; got arrays that were donated or deleted at "
      f"{few(gone)}. Save the state that the step returned, or save before the step."
    )


def _is_plain(leaf: Any) -> bool:
  if isinstance(leaf, jax.Array | str):
    return not isinstance(leaf, Tracer)
  if isinstance(leaf, np.ndarray):
    return leaf.dtype.kind not in "OSUMm"
  return isinstance(leaf, bool | int | float | np.number) and np.asarray(leaf).dtype.kind in "biufV"


def check_patterns(*given: Any) -> None:
  """Refuses a string in the place of a sequence of patterns."""
  for patterns in given:
    if isinstance(patterns, str):
      raise TypeError(
        "restore_checkpoint: allow_missing and allow_extra must be sequences of patterns; got the "
        f"string {patterns!r}. Pass [{patterns!r}]."
      )


def check_shardings(wanted: Mapping[str, Any]) -> None:
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


def difference_of(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> Difference:
  """Compares shapes and dtypes; numbers of Python have no dtype of their own."""
  numbers = {path for path in wanted if path in saved and is_number(saved[path], wanted[path])}
  # Whether these keys are of the saved implementation shows once they are read.
  keys = {path for path in wanted if is_key(wanted[path])}

  def describe(leaves: Mapping[str, Any]) -> dict[str, str]:
    return {path: "" if path in keys else _describe(leaf, path in numbers)
            for path, leaf in leaves.items()}  # fmt: skip

  return compare(describe(saved), describe(wanted), describe=str)


def is_number(saved: Any, wanted: Any) -> bool:
  """Tells what is read as it is, and then takes the type of its target."""
  return isinstance(saved, ocp.metadata.ScalarMetadata) or not isinstance(wanted, ARRAYS)


def _describe(leaf: Any, number: bool) -> str:
  if isinstance(leaf, str | ocp.metadata.StringMetadata):
    return "str"
  return f"{'' if number else getattr(leaf, 'dtype', '')}{getattr(leaf, 'shape', ())}"


def check_difference(
  difference: Difference,
  wanted: Mapping[str, Any],
  allow_missing: Sequence[str],
  allow_extra: Sequence[str],
) -> None:
  """Raises where the checkpoint is not what the target describes, unless that is allowed."""
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
      f"be arrays; got ShapeDtypeStructs for {few(abstract)}. Initialize them."
    )


def check_keys(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
  """Raises where a PRNG key was saved with another implementation, or as plain numbers."""
  kind = lambda leaf: f"{getattr(leaf, 'dtype', type(leaf).__name__)}{np.shape(leaf)}"
  pairs = {
    p: (kind(found[p]), kind(wanted[p])) for p in found if is_key(found[p]) or is_key(wanted[p])
  }
  if other := [f"{path} {got} for {want}" for path, (got, want) in pairs.items() if got != want]:
    raise ValueError(
      "restore_checkpoint: PRNG keys must have the implementation with which they were saved; got "
      f"{few(other)}. Make the keys of target with jax.random.key(seed, impl=...); restore raw key "
      "data into uint32, for jax.random.wrap_key_data."
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
    "Pass a target of the same model and optimizer, or name what may differ in allow_missing and "
    "allow_extra."
  )
