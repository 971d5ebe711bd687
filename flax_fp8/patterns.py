"""Matches patterns with module paths. Conversion and ``assert_fp8`` use the same patterns.

A glob matches a whole path, and ``*`` crosses slashes. A regular expression matches any part of a
path. The model's class before the path and the FP8 module after it are optional: ``mlp/up`` means
``Net/mlp/up/Fp8DotGeneral_0``.
"""

from __future__ import annotations

import fnmatch
import re

_FP8_MODULE = re.compile(r"(^|/)(\w+_)?Fp8(DotGeneral|Einsum)_\d+$")


def matches_path(pattern: str | re.Pattern[str], path: str, model: str = "") -> bool:
  """Tells whether a pattern matches a module.

  Args:
    pattern: a glob or a regular expression.
    path: path of the module, without the model's class.
    model: name of the model's class. If empty, patterns with a class do not match.
  """
  spellings = {path, _FP8_MODULE.sub("", path)}
  has_slash = isinstance(pattern, re.Pattern) or "/" in pattern
  if model and has_slash:  # "*Net*" does not match by the class of the model
    spellings |= {f"{model}/{spelling}" for spelling in spellings}
  if isinstance(pattern, re.Pattern):
    return any(pattern.search(spelling) for spelling in spellings)
  return any(fnmatch.fnmatchcase(spelling, pattern) for spelling in spellings)
