"""Boxes of axis metadata (``nn.Partitioned`` and its like) around the leaves of a tree.

Linen's own unboxing asks the compiler for a sharding, which makes a new value each time, and fails
where the names are logical. Here a box is opened, and what was in it is put back, as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def is_box(x: Any) -> bool:
  """Tells whether a node of a tree is a box."""
  return isinstance(x, nn.meta.AxisMetadata)


def unbox(tree: Any) -> Any:
  """Returns a tree with what is in its boxes in their place."""
  return jax.tree.map(_content, tree, is_leaf=is_box)


def rebox(tree: Any, like: Any) -> Any:
  """Puts each leaf of a tree into a box as ``like`` has one in its place.

  Args:
    tree: without boxes.
    like: a tree that is of the same structure without its boxes.

  Returns:
    ``tree`` with the boxes of ``like``.
  """
  return jax.tree.map(_put, like, tree, is_leaf=is_box)


def has_boxes(tree: Any) -> bool:
  """Tells whether there is a box in a tree."""
  return any(map(is_box, jax.tree.leaves(tree, is_leaf=is_box)))


def box_as(leaf: jax.Array, others: Iterable[Any]) -> Any:
  """Boxes a leaf as the first of some others that is boxed, with no name for any of its axes.

  Lifted transformations then name the axes that they add: those of experts, say.

  Args:
    leaf: an array.
    others: arrays and boxes.

  Returns:
    A box of the class of the other, with its mesh and rules; ``leaf`` where no other is boxed, or
    its box has no names.
  """
  box: Any = next((other for other in others if isinstance(other, nn.Partitioned)), None)
  if box is None:
    return leaf
  return box.replace(value=leaf, names=(None,) * jnp.ndim(leaf))


def _content(x: Any) -> Any:
  if not is_box(x):
    return x
  (value,) = jax.tree.leaves(x)
  return value


def _put(old: Any, new: Any) -> Any:
  return jax.tree.unflatten(jax.tree.structure(old), [new]) if is_box(old) else new
