"""Which layers are meant: globs, regular expressions and predicates over module paths."""

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
  """One contraction with a kernel, as the rules of conversion see it.

  Attributes:
    path: names of the modules down to it, ``"encoder/layers_0/Dense_1"``; ``""`` is the root.
    owner: path of the module whose method contracts; the same, where that is a layer.
    kind: class of the layer, or the function that the module calls, ``"jnp.einsum"``.
    inputs: elements of the input, of one call.
    contracted: size of the contracted axes, K.
    features: size of the kernel's own axes, N.
    batch: size of the batch axes that the kernel has.
    itemsize: bytes of an element in the dtype of the GEMM.
    stored: whether the kernel is a parameter of that dtype, which stays in memory in any case.
    refusal: why it can't be FP8 whatever is asked for, or ``""``.
    model: class of the model.
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
    """Elements of the kernel."""
    return self.batch * self.contracted * self.features

  @property
  def module(self) -> Layer:
    """The module whose method contracts."""
    return self if self.owner is None else dataclasses.replace(self, path=self.owner)

  @property
  def is_function(self) -> bool:
    """Tells whether a module that is no layer contracts."""
    return self.owner not in (None, self.path)


def at(path: str, model: str = "") -> Layer:
  """Makes a layer of which nothing but the path is known."""
  return Layer(path=path, kind="", inputs=0, contracted=0, features=0, model=model)


Pattern: TypeAlias = str | re.Pattern[str] | Callable[[Layer], bool]


def matches(pattern: Pattern, layer: Layer) -> bool:
  """Tells whether a pattern means a layer; of a module's own contractions, also the module."""
  if isinstance(pattern, str | re.Pattern):
    path = layer.path if layer.is_function else f"{layer.path}/Fp8DotGeneral_0".lstrip("/")
    return matches_path(pattern, path, layer.model)
  return bool(pattern(layer))


def first_match(patterns: Iterable[Pattern], layer: Layer) -> Pattern | None:
  """Returns the first pattern that means a layer."""
  return next((pattern for pattern in patterns if matches(pattern, layer)), None)


def show(pattern: Pattern) -> str:
  """Writes a pattern as the user did."""
  if isinstance(pattern, str):
    return repr(pattern)
  if isinstance(pattern, re.Pattern):
    return f"re '{pattern.pattern}'"
  return getattr(pattern, "__name__", repr(pattern))


def near_misses(pattern: Pattern, paths: Iterable[str], limit: int = 5) -> list[str]:
  """Returns the paths that are most like a pattern that means none of them; else the first."""
  paths = sorted(set(paths))
  text = pattern.pattern if isinstance(pattern, re.Pattern) else str(pattern)
  last = {path: path.rpartition("/")[2] for path in paths}
  tail = text.rpartition("/")[2].strip("*")
  close = difflib.get_close_matches(text, paths, n=limit, cutoff=0.5)
  close += [path for path in paths if difflib.SequenceMatcher(None, tail, last[path]).ratio() > 0.6]
  return list(dict.fromkeys(close))[:limit] or paths[:limit]


def _is_predicate(x: object) -> bool:
  """Tells whether a pattern is a function; neither a class nor a recipe is."""
  return callable(x) and not isinstance(x, (type, Recipe))


def check_patterns(name: str, patterns: object) -> tuple[Pattern, ...]:
  """Returns patterns as a tuple; raises TypeError where one is of another kind."""
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
        f"{fields.show(pattern)} in {name}. Change that one."
      )
  return tuple(given)
