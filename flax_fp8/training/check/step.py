"""Calls a training step as a black box, with known FP8 state.

Each call gets copies, so the arrays of the caller are neither changed nor donated.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_fp8.linen.containers import leaves_with_path, map_with_path
from flax_fp8.linen.lifted import own_axes, own_back, own_last
from flax_fp8.linen.state import OVERWRITE_WITH_GRADIENT
from flax_fp8.meta_dtype import is_max_grad, like, to_float32
from flax_fp8.recipes.base import Role
from flax_fp8.training import paths

HISTORY, SCALE, STEPS = "amax_history", "scale", "steps_to_update"
_OPTIMIZERS = {"opt", "optim", "optimizer", "optimiser", "opt_state", "optimizer_state"}
_DEPTH = 3


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A variable of an FP8 contraction in a training state.

  Attributes:
    path: path in the training state, joined by slashes.
    group: path of the collection that contains it; copies of a collection have different groups.
    role: "input", "kernel" or "output_grad"; empty if it is not a variable of a recipe.
    key: "amax_history", "scale" and so on.
    in_optimizer: whether it is in the state of an optimizer.
    shape: shape of the array.
    axis: axis with the slots of a history; all other axes are stacking axes.
  """

  path: str
  group: str
  role: str
  key: str
  in_optimizer: bool
  shape: tuple[int, ...]
  axis: int = 0

  @property
  def tensor(self) -> str:
    """Path of the tensor that this variable describes."""
    return self.path.removesuffix("/value").removesuffix(f"_{self.key}")

  @property
  def module(self) -> str:
    """Path of the contraction."""
    return self.tensor.removesuffix(self.role).removesuffix("/")

  @property
  def history(self) -> str:
    """Path of the history of the same tensor."""
    return self.path.replace(f"{self.role}_{self.key}", f"{self.role}_{HISTORY}")

  @property
  def below(self) -> str:
    """Path of the tensor within the collection."""
    return self.tensor.removeprefix(self.group).removeprefix("/")

  def read(self, leaf: Any) -> np.ndarray:
    """Returns the array as float64, with stacking axes first if it has the expected rank."""
    value = np.asarray(to_float32(leaf)).astype(np.float64)
    return own_last(value, self.axis) if value.ndim == len(self.shape) else value

  def place(self, value: np.ndarray) -> np.ndarray:
    """Inverts ``read``: moves stacking axes back to their places."""
    return own_back(value, self.axis)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Result of a call of the step.

  Attributes:
    state: the new training state.
    fp8: FP8 state by path; float64, with stacking axes first.
    prints: checksum of each other trained array, by path.
  """

  state: Any
  fp8: Mapping[str, np.ndarray]
  prints: Mapping[str, int]


def same(path: str, one: Outcome, other: Outcome) -> bool:
  """Returns whether a leaf of FP8 state is equal in two outcomes."""
  return path in other.fp8 and np.array_equal(one.fp8[path], other.fp8[path], equal_nan=True)


def find_state(state: Any) -> list[Leaf]:
  """Finds the FP8 state of a training state.

  FP8 state is every leaf under a key ``_overwrite_with_gradient``. Without such a key, it is every
  leaf with the name of a variable of a recipe.
  """
  found = leaves_with_path(state)
  named = [(path, [paths.name((entry,)) for entry in path]) for path, _ in found]
  in_collection = any(OVERWRITE_WITH_GRADIENT in parts for _, parts in named)
  leaves: list[Leaf] = []
  for (path, leaf), (_, parts) in zip(found, named, strict=True):
    own = parts[:-1] if parts[-1:] == ["value"] else parts
    role, key = _role(own[-1]) if own else ("", "")
    if OVERWRITE_WITH_GRADIENT in parts:
      depth = parts.index(OVERWRITE_WITH_GRADIENT) + 1
    elif role and not in_collection:
      depth = 0
    else:
      continue
    in_optimizer = _in_optimizer(state, path[: depth or len(path)])
    group, shape = "/".join(parts[:depth]), np.shape(leaf)
    leaves.append(Leaf("/".join(parts), group, role, key, in_optimizer, shape))
  return _with_axes(leaves)


def _with_axes(leaves: Sequence[Leaf]) -> list[Leaf]:
  """Finds the axis with the slots of each leaf, from the shapes of all leaves of its module."""
  modules: dict[str, dict[str, tuple[int, ...]]] = {}
  for leaf in leaves:
    if leaf.role:
      modules.setdefault(leaf.module, {})[leaf.path] = leaf.shape
  axes = {path: axis for shapes in modules.values() for path, axis in own_axes(shapes).items()}
  last = lambda leaf: max(len(leaf.shape) - 1, 0)
  return [dataclasses.replace(leaf, axis=axes.get(leaf.path, last(leaf))) for leaf in leaves]


def _role(name: str) -> tuple[str, str]:
  """Splits the name of a variable into its role and key."""
  for role in Role:
    key = name.removeprefix(f"{role.value}_")
    if key != name:
      return role.value, key
  return "", name


def _in_optimizer(tree: Any, path: Any) -> bool:
  for entry in path:
    if type(tree).__module__.partition(".")[0] == "optax" or paths.name((entry,)) in _OPTIMIZERS:
      return True
    tree = _child(tree, entry)
  return False


def _child(tree: Any, entry: Any) -> Any:
  if hasattr(entry, "name"):
    return getattr(tree, entry.name, None)
  try:
    return tree[getattr(entry, "key", getattr(entry, "idx", None))]
  except (TypeError, KeyError, IndexError):
    return None


def copy(tree: Any) -> Any:
  """Copies every array, so that the step may donate or overwrite it."""
  return jax.tree.map(_copy, tree)


def _copy(leaf: Any) -> Any:
  if isinstance(leaf, np.ndarray):
    return leaf.copy()
  if is_max_grad(leaf):
    return like(jnp.copy(to_float32(leaf)), leaf)
  return jax.device_put(leaf, may_alias=False) if isinstance(leaf, jax.Array) else leaf


def plant(state: Any, values: Mapping[str, np.ndarray]) -> Any:
  """Replaces leaves by values, cast to their dtype and placed on their devices."""

  def one(path: Any, leaf: Any) -> Any:
    value = values.get(paths.name(path))
    return leaf if value is None else _like(np.reshape(value, np.shape(leaf)), leaf)

  return map_with_path(one, state)


def _like(value: np.ndarray, leaf: Any) -> Any:
  plain = to_float32(leaf)
  value = value.astype(plain.dtype)
  if not isinstance(plain, jax.Array):
    return value
  there = jax.device_put(value, plain.sharding if getattr(plain, "committed", True) else None)
  return like(there, leaf)


class Step:
  """A training step that gets copies of its arguments.

  Attributes:
    leaves: the FP8 state in the training state.
    own: the part of ``leaves`` outside optimizer states, or all of them if none is outside.
    others: paths of all other leaves.
    calls: number of calls so far.
  """

  def __init__(self, step_fn: Callable[..., Any], state: Any, batch: Any) -> None:
    self._step_fn, self._batch = step_fn, batch
    self.leaves = find_state(state)
    self._all = set(paths.leaves_by_path(state))
    self._fp8 = {leaf.path: leaf for leaf in self.leaves}
    self.own = [leaf for leaf in self.leaves if not leaf.in_optimizer] or self.leaves
    self.others = frozenset(self._all - self._fp8.keys())
    self.calls = 0

  def __call__(self, state: Any, batch: Any = None) -> Outcome:
    """Calls the step on copies of ``state`` and ``batch``.

    Raises:
      ValueError: the step raised an error, or did not return a training state.
    """
    self.calls += 1
    batch = self._batch if batch is None else batch
    try:
      output = self._step_fn(copy(state), copy(batch))
    except Exception as error:
      advice = "Call step_fn(state, batch) yourself to see where."
      if isinstance(error, TypeError) and "required positional argument" in str(error):
        advice = (
          "For step_fn(state, x, y), pass lambda state, batch: step_fn(state, *batch) and (x, y)."
        )
      raise ValueError(
        f"check_train_step: step_fn must run on the state and the batch; got "
        f"{type(error).__name__} in call {self.calls}: {str(error).rstrip('.')}. {advice}"
      ) from error
    return self._outcome(self._new_state(output))

  def skipped(self, before: Outcome, after: Outcome) -> bool:
    """Returns whether a call changed neither parameters nor scales and histories."""
    state = [leaf.path for leaf in self.own if leaf.key in (HISTORY, SCALE, STEPS)]
    return before.prints == after.prints and all(
      path in after.fp8 and same(path, before, after) for path in state
    )

  def _outcome(self, new: Any) -> Outcome:
    leaves = paths.leaves_by_path(new)
    fp8 = {p: leaf.read(leaves[p]) for p, leaf in sorted(self._fp8.items()) if p in leaves}
    prints = {p: _print(leaves[p]) for p in sorted(self.others) if _is_trained(leaves[p])}
    return Outcome(new, fp8, prints)

  def starting(self, state: Any) -> Outcome:
    """Returns the training state before a step as an outcome."""
    return self._outcome(state)

  def _new_state(self, output: Any) -> Any:
    """Finds the new state in the output of the step."""
    candidates = list(_within(output, _DEPTH))
    for wanted in (self._all, self.others):
      for tree in candidates:
        if wanted and wanted <= set(paths.leaves_by_path(tree)):
          return tree
    got = dict.fromkeys(paths.leaves_by_path(output))
    difference = paths.compare(got, dict.fromkeys(sorted(self._all)), describe=lambda _: None)
    raise ValueError(
      "check_train_step: step_fn must return the new state, alone or in a tuple, with all leaves "
      f"of the old state; got a result with {difference}. Return the state first, as in "
      "state, loss = step_fn(state, batch)."
    )


def _within(tree: Any, depth: int) -> Iterator[Any]:
  """Yields a tree and its elements, level by level."""
  level = [tree]
  for _ in range(depth):
    yield from level
    level = [child for node in level for child in _children(node)]


def _children(node: Any) -> Iterator[Any]:
  if isinstance(node, Mapping):
    yield from node.values()
  elif isinstance(node, (tuple, list)):
    yield from node


def _is_trained(leaf: Any) -> bool:
  """Returns whether a leaf may be a parameter or a moment, not a counter, key or loss scale."""
  return np.ndim(leaf) > 0 and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _print(leaf: Any) -> int:
  return zlib.crc32(np.asarray(leaf).tobytes())
