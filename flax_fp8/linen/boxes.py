"""Boxes of axis metadata, such as ``nn.Partitioned``, around the leaves of a tree.

Linen's own unboxing adds a sharding constraint. That makes a new value on each call, and fails if
the axis names are logical. The functions here return the boxed value unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def is_box(x: Any) -> bool:
  """Returns whether a node of a tree is a box."""
  return isinstance(x, nn.meta.AxisMetadata)


def unbox(tree: Any) -> Any:
  """Replaces each box in a tree by the value in it."""
  return jax.tree.map(_content, tree, is_leaf=is_box)


def rebox(tree: Any, like: Any) -> Any:
  """Boxes each leaf of a tree in the same way as the leaf of ``like`` at the same path.

  Args:
    tree: a tree without boxes.
    like: a tree that has the structure of ``tree`` once it is unboxed.

  Returns:
    ``tree`` with the boxes of ``like``.
  """
  return jax.tree.map(_put, like, tree, is_leaf=is_box)


def has_boxes(tree: Any) -> bool:
  """Returns whether a tree contains a box."""
  return any(map(is_box, jax.tree.leaves(tree, is_leaf=is_box)))


def box_as(leaf: jax.Array, others: Iterable[Any]) -> Any:
  """Boxes a leaf like the first boxed leaf in ``others``, without axis names.

  Lifted transformations later name the axes that they add, such as the axis of experts.

  Args:
    leaf: an array.
    others: arrays and boxes.

  Returns:
    A box of the same class, mesh and rules. ``leaf`` itself if no other leaf is an
    ``nn.Partitioned``.
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
