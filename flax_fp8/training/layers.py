"""Finds the FP8 contractions in a tree of variables, and unstacks their state.

``nn.scan`` and ``nn.vmap`` stack the state of layers along any axis. The state of one contraction
is a scale ``(1,)`` and a history ``(length,)``. All other axes are stacking axes, in their order.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.core
import numpy as np

from flax_fp8.linen.boxes import unbox
from flax_fp8.linen.lifted import lifted_first
from flax_fp8.linen.state import OVERWRITE_WITH_GRADIENT
from flax_fp8.meta_dtype import to_float32
from flax_fp8.ops.metrics import METRICS
from flax_fp8.recipes.base import Role

Path: TypeAlias = tuple[str, ...]
_LEAVES = {
  f"{role.value}_{key}": (role, key) for role in Role for key in ("scale", "amax_history", *METRICS)
}
_NAMED_BY_FLAX = re.compile(r"\w*Fp8\w*_\d+")


@dataclasses.dataclass(frozen=True)
class Layer:
  """One contraction, or one element of a stack.

  Attributes:
    name: path of the module, such as ``layers[3]/query``.
    state: leaves by variable name, without stacking axes.
  """

  name: str
  state: Mapping[str, np.ndarray]

  def leaves(self, role: Role) -> dict[str, np.ndarray]:
    """Returns the leaves of one tensor."""
    known = {name: _LEAVES[name] for name in self.state}
    return {key: self.state[name] for name, (owner, key) in known.items() if owner is role}


def layers(tree: Any) -> Iterator[Layer]:
  """Yields every contraction that has state, in the order of the tree.

  Args:
    tree: nested mapping, with state under keys ``_overwrite_with_gradient``.

  Yields:
    Each contraction, and each element of a stack.

  Raises:
    TypeError: a leaf of the state is traced or abstract.
  """
  read = jax.device_get(dict(_modules(tree, (), False)))
  found = {path: lifted_first(state) for path, state in read.items()}
  stacks = {path: _stack(state) for path, state in found.items()}
  below: dict[Path, list[tuple[int, ...]]] = {}
  for path, stack in stacks.items():
    for length in range(1, len(path) + 1):
      below.setdefault(path[:length], []).append(stack)
  for path, state in found.items():
    name, at = _short(path, below), _outermost(path, below)
    for index in np.ndindex(stacks[path]):
      part = {key: leaf[index] if leaf.shape else leaf for key, leaf in state.items()}
      yield Layer(_indexed(name, index, at), part)


def _modules(tree: Any, path: Path, inside: bool) -> Iterator[tuple[Path, dict[str, Any]]]:
  """Yields the path and the leaves of each module that has state."""
  if not isinstance(tree, Mapping):
    return
  leaves: dict[str, Any] = {}
  for key, value in tree.items():
    if key == OVERWRITE_WITH_GRADIENT:
      yield from _modules(value, path, True)
    elif isinstance(value, Mapping):
      collection = not path and not inside and key == "params"
      yield from _modules(value, path if collection else (*path, key), inside)
    elif inside and key in _LEAVES:
      leaves[key] = _concrete(value, (*path, key))
  if leaves:
    yield path, leaves


def _concrete(leaf: Any, path: Path) -> Any:
  leaf = unbox(leaf)
  if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, (jax.Array, np.ndarray)):
    raise TypeError(
      f"stats: state must be concrete arrays; got {'/'.join(path)} of {type(leaf)}. Call stats "
      "outside jit, with the variables that the jitted function returned."
    )
  return to_float32(leaf)


def _stack(state: Mapping[str, Any]) -> tuple[int, ...]:
  """Returns the stacking axes of a module's leaves: all axes but the last."""
  return max((leaf.shape[:-1] for leaf in state.values()), key=len)


def _short(path: Path, below: Mapping[Path, Sequence[Any]]) -> Path:
  """Drops the automatic name of a contraction if it is the only one in its layer."""
  if len(path) < 2 or not _NAMED_BY_FLAX.fullmatch(path[-1]):
    return path
  return path[:-1] if len(below[path[:-1]]) == 1 else path


def _outermost(path: Path, below: Mapping[Path, Sequence[Any]]) -> int:
  """Returns the length of the shortest prefix under which all state has the same stacking axes."""
  lengths = range(1, len(path) + 1)
  return next((length for length in lengths if len(set(below[path[:length]])) == 1), 0)


def _indexed(name: Path, index: tuple[int, ...], at: int) -> str:
  if not index:
    return "/".join(name)
  where = str(list(index)).replace(" ", "")
  at = min(at, len(name))
  return "/".join((*name[: at - 1], f"{name[at - 1]}{where}", *name[at:])) if name else where
