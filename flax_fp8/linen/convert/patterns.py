"""Patterns that select layers: globs, regular expressions and predicates over module paths."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from flax_fp8 import fields
from flax_fp8.patterns import matches_path
from flax_fp8.recipes.base import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
  """One contraction with a kernel. Patterns that are functions take it as their argument.

  Attributes:
    path: module path of the contraction, such as ``"encoder/layers_0/Dense_1"``; ``""`` is the
      root.
    owner: path of the module that contracts. Equal to ``path`` for a linear layer.
    kind: class of the layer, or the called function, such as ``"jnp.einsum"``.
    inputs: number of input elements in one call.
    contracted: size of the contracted axes, K.
    features: size of the kernel's other axes, N.
    batch: size of the kernel's batch axes.
    itemsize: bytes of one element in the dtype of the GEMM.
    stored: whether the kernel is a parameter of that dtype. Such a kernel is in memory anyway.
    refusal: the reason why the contraction cannot run in FP8, or ``""``.
    model: class name of the model.

  Example:
    >>> import flax_fp8 as fp8
    >>> config = fp8.Fp8Config(targets=lambda layer: layer.kernel_size > 2**20)
  """

  path: str
  owner: str | None = None
  kind: str
  inputs: int
  contracted: int
  features: int
  batch: int = 1
  itemsize: int = 4
  stored: bool = False
  refusal: str = ""
  model: str = ""

  @property
  def kernel_size(self) -> int:
    """Number of elements in the kernel."""
    return self.batch * self.contracted * self.features

  @property
  def module(self) -> Layer:
    """The layer with the path of the module that contracts."""
    return self if self.owner is None else dataclasses.replace(self, path=self.owner)

  @property
  def is_function(self) -> bool:
    """Whether the contraction belongs to a module that is not a linear layer."""
    return self.owner not in (None, self.path)


def at(path: str, model: str = "") -> Layer:
  """Returns a layer with only its path set."""
  return Layer(path=path, kind="", inputs=0, contracted=0, features=0, model=model)


Pattern: TypeAlias = str | re.Pattern[str] | Callable[[Layer], bool]


def matches(pattern: Pattern, layer: Layer) -> bool:
  """Returns whether a pattern matches a layer, or the module that owns the contraction."""
  if isinstance(pattern, str | re.Pattern):
    path = layer.path if layer.is_function else f"{layer.path}/Fp8DotGeneral_0".lstrip("/")
    return matches_path(pattern, path, layer.model)
  return bool(pattern(layer))


def first_match(patterns: Iterable[Pattern], layer: Layer) -> Pattern | None:
  """Returns the first pattern that matches a layer, or None."""
  return next((pattern for pattern in patterns if matches(pattern, layer)), None)


def show(pattern: Pattern) -> str:
  """Formats a pattern for messages."""
  if isinstance(pattern, str):
    return repr(pattern)
  if isinstance(pattern, re.Pattern):
    return f"re '{pattern.pattern}'"
  return getattr(pattern, "__name__", repr(pattern))


def close_matches(pattern: Pattern, paths: Iterable[str], limit: int = 5) -> list[str]:
  """Returns the paths most similar to an unmatched pattern, or the first paths if none is."""
  paths = sorted(set(paths))
  text = pattern.pattern if isinstance(pattern, re.Pattern) else str(pattern)
  last = {path: path.rpartition("/")[2] for path in paths}
  tail = text.rpartition("/")[2].strip("*")
  close = difflib.get_close_matches(text, paths, n=limit, cutoff=0.5)
  close += [path for path in paths if difflib.SequenceMatcher(None, tail, last[path]).ratio() > 0.6]
  return list(dict.fromkeys(close))[:limit] or paths[:limit]


def _is_predicate(x: object) -> bool:
  """Returns whether a pattern is a function. Classes and recipes are not."""
  return callable(x) and not isinstance(x, (type, Recipe))


def check_patterns(name: str, patterns: object) -> tuple[Pattern, ...]:
  """Returns patterns as a tuple. Raises TypeError if one is not a pattern."""
  is_text = lambda x: isinstance(x.pattern if isinstance(x, re.Pattern) else x, str)
  is_pattern = lambda x: is_text(x) or _is_predicate(x)
  given: Any = (patterns,) if is_pattern(patterns) else patterns
  if not isinstance(given, (tuple, list, set, frozenset)):
    raise TypeError(
      f"Fp8Config: {name} must be patterns; got {name}={fields.show(patterns)}. Pass a tuple of "
      "globs such as '*/head', of re.compile(...), or of functions of a Layer."
    )
  for pattern in given:
    if not is_pattern(pattern):
      raise TypeError(
        f"Fp8Config: a pattern must be a glob, an re.Pattern or a function of a Layer; got "
        f"{fields.show(pattern)} in {name}. Replace it with one of these."
      )
  return tuple(given)
