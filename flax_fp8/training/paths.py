"""Paths of leaves as strings, and a short description of how two trees differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from flax_fp8.linen.containers import leaves_with_path

SHOWN = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
  """How a tree differs from the expected tree.

  Attributes:
    missing: paths of leaves that only the expected tree has.
    extra: paths of leaves that only the given tree has.
    other: paths of leaves that differ, each with its actual and expected description.
  """

  missing: tuple[str, ...]
  extra: tuple[str, ...]
  other: tuple[str, ...]

  def __bool__(self) -> bool:
    return bool(self.missing or self.extra or self.other)

  def __str__(self) -> str:
    kinds = {"missing": self.missing, "extra": self.extra, "others": self.other}
    return ", ".join(f"{kind}: {few(names)}" for kind, names in kinds.items() if names)


def leaves_by_path(tree: Any, is_leaf: Callable[[Any], bool] = lambda _: False) -> dict[str, Any]:
  """Returns the leaves by path; a path is keys, attributes and indices, joined by slashes."""
  found = leaves_with_path(tree, is_leaf)
  return {name(path): leaf for path, leaf in found}


def name(path: Iterable[Any]) -> str:
  """Joins the entries of a ``jax.tree_util`` path with slashes."""
  return "/".join(jax.tree_util.keystr((entry,), simple=True) for entry in path)


def compare(
  got: Mapping[str, Any], want: Mapping[str, Any], describe: Callable[[Any], Any] = np.shape
) -> Difference:
  """Compares leaves by path.

  Args:
    got: actual leaves, by path.
    want: expected leaves, by path.
    describe: returns the property of a leaf that must be equal in both.

  Returns:
    The difference, which is false if there is none.
  """
  pairs = {path: (describe(got[path]), describe(want[path])) for path in want if path in got}
  return Difference(
    missing=tuple(path for path in want if path not in got),
    extra=tuple(path for path in got if path not in want),
    other=tuple(f"{path} {has} for {should}" for path, (has, should) in pairs.items()
                if has != should),
  )  # fmt: skip


def few(names: Iterable[str]) -> str:
  """Lists the first names and the number of names left out."""
  names = list(names)
  more = f" ... and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
  return f"{names[:SHOWN]}{more}"
