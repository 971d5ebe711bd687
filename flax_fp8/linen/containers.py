"""Trees of variables with mappings of any type: FrozenDict, OrderedDict, or a user's own class.

Functions that rebuild a tree keep the type of each mapping. ``lax.scan`` over training steps,
``jax.tree.map`` over old and new variables, and checkpoints need the same structure after a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import flax.core
import jax
from jax.tree_util import DictKey

_LEAF = jax.tree.structure(0)


def with_items(old: Mapping[str, Any], items: Mapping[str, Any]) -> Any:
  """Returns a mapping with the type and key order of ``old`` and the given items.

  Args:
    old: a dict, FrozenDict, OrderedDict, defaultdict, or any mapping that is a pytree node.
    items: the new items. The keys may differ from those of ``old``.

  Returns:
    A mapping of the type of ``old``. A dict if that type, such as a dataclass, cannot be made with
    these keys.
  """
  ordered = {key: items[key] for key in (*old, *(key for key in items if key not in old))
             if key in items}  # fmt: skip
  if isinstance(old, flax.core.FrozenDict):
    return flax.core.FrozenDict(ordered)
  if isinstance(old, MutableMapping):  # a copy keeps other attributes, such as a default
    made = copy.copy(old)
    made.clear()
    made.update(ordered)
    return made
  if ordered.keys() == old.keys():
    return jax.tree.unflatten(_one_level(old)[1], [ordered[key] for key in _keys(old)])
  try:
    return type(old)(ordered)  # pyright: ignore[reportCallIssue]
  except TypeError:
    return ordered


def like(old: Any, new: Any) -> Any:
  """Gives each mapping in ``new`` the type of the mapping at the same path in ``old``."""
  if not isinstance(old, Mapping) or not isinstance(new, Mapping):
    return new
  return with_items(old, {key: like(old.get(key), value) for key, value in new.items()})


def plain(tree: Any) -> Any:
  """Converts nested mappings to dicts and keeps their order. Stops at other pytree nodes."""
  if not isinstance(tree, Mapping):
    return tree
  return {key: plain(value) for key, value in tree.items()}


def leaves_with_path(
  tree: Any, is_leaf: Callable[[Any], bool] = lambda _: False
) -> list[tuple[tuple[Any, ...], Any]]:
  """``jax.tree_util.tree_leaves_with_path``, but every item of a mapping has its key in the path.

  JAX numbers the children of nodes that are registered without keys.
  """
  children, structure = _one_level(tree)
  if is_leaf(tree) or structure == _LEAF:
    return [((), tree)]
  entries: list[Any] = [path[0] for path, _ in children]
  if isinstance(tree, Mapping):
    entries = [DictKey(key) for key in _keys(tree)]
  return [
    ((entry, *path), leaf)
    for entry, (_, child) in zip(entries, children, strict=True)
    for path, leaf in leaves_with_path(child, is_leaf)
  ]


def map_with_path(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
  """``jax.tree_util.tree_map_with_path`` with the paths of ``leaves_with_path``."""
  structure = jax.tree.structure(tree)
  leaves = zip(leaves_with_path(tree), *map(structure.flatten_up_to, others), strict=True)
  return structure.unflatten([function(path, leaf, *rest) for (path, leaf), *rest in leaves])


def _one_level(tree: Any) -> tuple[list[tuple[tuple[Any, ...], Any]], Any]:
  return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)


def _keys(mapping: Mapping[str, Any]) -> list[str]:
  """Returns the keys of a mapping in the order of its children as a pytree node."""
  children, structure = _one_level(mapping)
  numbers = structure.unflatten(range(len(children)))
  return sorted(numbers, key=lambda key: numbers[key])
