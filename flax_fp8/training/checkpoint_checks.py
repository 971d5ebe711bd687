"""Input checks of ``save_checkpoint`` and ``restore_checkpoint``, with errors that give advice."""

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
  """Returns whether a leaf is a typed PRNG key."""
  return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def require_directory(caller: str, directory: Any) -> None:
  """Raises TypeError if ``directory`` is not a path."""
  if not isinstance(directory, str | os.PathLike):
    raise TypeError(
      f"{caller}: directory must be a path; got directory={fields.show(directory)}. Pass "
      f"{caller}(directory, tree)."
    )


def require_distinct_paths(caller: str, tree: Any) -> None:
  """Raises ValueError if two leaves have the same path.

  Paths must differ when joined by slashes, as here, and when joined by dots, as in Orbax.
  """
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  names = [Counter(separator.join(name([entry]) for entry in path) for path in paths)
           for separator in "/."]  # fmt: skip
  if same := [each for counted in names for each, count in counted.items() if count > 1]:
    raise ValueError(
      f"{caller}: paths of leaves must differ when joined by slashes or dots; got several leaves "
      f"at {few(same)}. Rename keys that contain a slash or a dot."
    )


def require_plain_dtypes(caller: str, tree: Any) -> None:
  """Raises TypeError for extended dtypes such as fp32_max_grad, which can't be stored."""
  extended = [
    path
    for path, leaf in leaves_by_path(tree).items()
    if hasattr(leaf, "dtype")
    and jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    and not is_key(leaf)
  ]
  if extended:
    raise TypeError(
      f"{caller}: leaves must have dtypes that can be stored; got fp32_max_grad or another "
      f"extended dtype at {few(extended)}. Pass the variables from before as_max_grad, or cast "
      "them to float32."
    )


def require_storable(tree: Any) -> None:
  """Raises an error for leaves that Orbax can't save, or can't restore unchanged."""
  require_distinct_paths("save_checkpoint", tree)
  require_plain_dtypes("save_checkpoint", tree)
  leaves = leaves_by_path(tree)
  if not leaves:
    raise ValueError("save_checkpoint: state must have leaves; got none. Pass a tree with arrays.")
  if unlike := [f"{p} {type(x).__name__}" for p, x in leaves.items() if not _is_plain(x)]:
    raise TypeError(
      "save_checkpoint: leaves must be arrays, real numbers of at most 64 bits, or strings; got "
      f"{few(unlike)}. Convert them, or remove them from state."
    )
  arrays = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, ARRAYS)}
  if empty := [f"{path} {leaf.shape}" for path, leaf in arrays.items() if 0 in leaf.shape]:
    raise ValueError(
      f"save_checkpoint: arrays must have elements, because Orbax can't store empty arrays; got "
      f"{few(empty)}. Remove them from state, and pass allow_missing when you restore."
    )
  if gone := [p for p, x in arrays.items() if isinstance(x, jax.Array) and x.is_deleted()]:
    raise ValueError(
      "save_checkpoint: arrays must not be deleted; got arrays that were donated or deleted at "
      f"{few(gone)}. Save the state that the step returned, or save before the step."
    )


def _is_plain(leaf: Any) -> bool:
  if isinstance(leaf, jax.Array | str):
    return not isinstance(leaf, Tracer)
  if isinstance(leaf, np.ndarray):
    return leaf.dtype.kind not in "OSUMm"
  return isinstance(leaf, bool | int | float | np.number) and np.asarray(leaf).dtype.kind in "biufV"


def check_patterns(*given: Any) -> None:
  """Raises TypeError for a string where a sequence of patterns is expected."""
  for patterns in given:
    if isinstance(patterns, str):
      raise TypeError(
        "restore_checkpoint: allow_missing and allow_extra must be sequences of patterns; got the "
        f"string {patterns!r}. Pass [{patterns!r}]."
      )


def check_shardings(wanted: Mapping[str, Any]) -> None:
  """Raises ValueError if a shape does not divide by its sharding, before Orbax starts to read."""
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
  """Compares shapes and dtypes; Python numbers have no dtype."""
  numbers = {path for path in wanted if path in saved and is_number(saved[path], wanted[path])}
  # The implementation of a saved key is known only after it is read. See check_keys.
  keys = {path for path in wanted if is_key(wanted[path])}

  def describe(leaves: Mapping[str, Any]) -> dict[str, str]:
    return {path: "" if path in keys else _describe(leaf, path in numbers)
            for path, leaf in leaves.items()}  # fmt: skip

  return compare(describe(saved), describe(wanted), describe=str)


def is_number(saved: Any, wanted: Any) -> bool:
  """Returns whether a leaf is a number, which is converted to the type of its target."""
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
  """Raises ValueError if checkpoint and target differ in a way that is not allowed."""
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
      "restore_checkpoint: leaves of target that the checkpoint does not have must be arrays; got "
      f"ShapeDtypeStructs for {few(abstract)}. Initialize these leaves of target."
    )


def check_keys(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
  """Raises ValueError if a PRNG key was saved with another implementation, or as raw data."""
  kind = lambda leaf: f"{getattr(leaf, 'dtype', type(leaf).__name__)}{np.shape(leaf)}"
  pairs = {
    p: (kind(found[p]), kind(wanted[p])) for p in found if is_key(found[p]) or is_key(wanted[p])
  }
  if other := [f"{path} {got} for {want}" for path, (got, want) in pairs.items() if got != want]:
    raise ValueError(
      "restore_checkpoint: PRNG keys of target must have the implementation of the saved keys; got "
      f"{few(other)}. Create the keys of target with jax.random.key(seed, impl=...), or restore "
      "raw key data as uint32 and pass it to jax.random.wrap_key_data."
    )


def _not_matched(paths: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
  return tuple(p for p in paths if not any(fnmatch.fnmatchcase(p, q) for q in patterns))


def _advise(refused: Difference) -> str:
  """Returns advice on a difference: about FP8 state if it differs, else in general."""
  state = f"*{OVERWRITE_WITH_GRADIENT}/*"
  missing, extra, other = (
    any(OVERWRITE_WITH_GRADIENT in path for path in paths)
    for paths in (refused.missing, refused.extra, refused.other)
  )
  advice: list[str] = []
  if missing or other:
    advice.append(
      "If the checkpoint has no FP8 state, or the state of another recipe, restore it with a "
      "matching target, and then call upgrade_variables(model, variables, *inputs)"
      + (f"; or keep the state of target with allow_missing=[{state!r}]." if missing else ".")
    )
  if extra:
    advice.append(
      "If target has no FP8 state, skip the state of the checkpoint with "
      f"allow_extra=[{state!r}], or restore everything and call downgrade_variables(variables)."
    )
  return " ".join(advice) or (
    "Pass a target of the same model and optimizer, or list paths that may differ in allow_missing "
    "and allow_extra."
  )
