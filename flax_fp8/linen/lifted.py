"""The axes that lifted transformations add to FP8 state.

``nn.scan`` and ``nn.vmap`` stack variables along an axis that the user chooses. The state of one
contraction is a scale ``(1,)`` and a history ``(length,)``. These functions find the state's own
axis from the shapes. All other axes belong to lifted transformations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Shape: TypeAlias = tuple[int, ...]


def own_axes(shapes: Mapping[str, Shape]) -> dict[str, int]:
  """Returns the axis of each state variable that no lifted transformation added.

  ``scale (3, 1), history (3, 16): 1``; ``scale (1, 3), history (16, 3): 0``

  Args:
    shapes: shapes of the state variables of one contraction, by name.

  Returns:
    The axis by name, never negative. 0 for a variable without axes.

  Numerics:
    A history differs from its scale along this axis. If no two shapes differ, the result is the
    last axis of size 1, because all choices then describe the same values.
  """
  return {name: _own_axis(shape, shapes) for name, shape in shapes.items()}


def lifted_first(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Moves the axes of lifted transformations to the front and keeps their order.

  Args:
    leaves: state variables of one contraction, by name; NumPy or JAX arrays.

  Returns:
    The same arrays with their own axis last.
  """
  axes = own_axes({name: leaf.shape for name, leaf in leaves.items()})
  return {name: own_last(leaf, axes[name]) for name, leaf in leaves.items()}


def own_last(leaf: Any, axis: int) -> Any:
  """Moves one axis of an array to the end. Returns an array without axes unchanged."""
  if not leaf.ndim:
    return leaf
  return leaf.transpose(*(other for other in range(leaf.ndim) if other != axis), axis)


def own_back(leaf: Any, axis: int) -> Any:
  """Moves the last axis of an array to the given position; the inverse of ``own_last``."""
  if not leaf.ndim:
    return leaf
  order = list(range(leaf.ndim - 1))
  return leaf.transpose(*order[:axis], leaf.ndim - 1, *order[axis:])


def _own_axis(shape: Shape, shapes: Mapping[str, Shape]) -> int:
  alike = [other for other in shapes.values() if len(other) == len(shape)]
  sizes = [set(along) for along in zip(*alike, strict=True)]
  differing = [axis for axis, found in enumerate(sizes) if len(found) > 1]
  ones = [axis for axis, found in enumerate(sizes) if found == {1}]
  if len(differing) == 1:
    return differing[0]
  return ones[-1] if ones else max(len(shape) - 1, 0)
