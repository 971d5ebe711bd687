"""One language of patterns over module paths, for choosing layers and for judging GEMMs.

A glob means a whole path (``*`` crosses slashes), a regular expression any part of it. A path may
be written with or without the model's class before it, and with or without the FP8 module after it:
``Net/mlp/up/Fp8DotGeneral_0``, ``mlp/up``.
"""

from __future__ import annotations

import fnmatch
import re

_FP8_MODULE = re.compile(r"(^|/)(\w+_)?Fp8(DotGeneral|Einsum)_\d+$")


def matches_path(pattern: str | re.Pattern[str], path: str, model: str = "") -> bool:
  """Tells whether a pattern means a module.

  Args:
    pattern: a glob or a regular expression.
    path: of the module, without the model's class.
    model: name of the model's class; where it is empty, no pattern may have it.
  """
  spellings = {path, _FP8_MODULE.sub("", path)}
  has_slash = isinstance(pattern, re.Pattern) or "/" in pattern
  if model and has_slash:  # "*Net*" means no model of that name
    spellings |= {f"{model}/{spelling}" for spelling in spellings}
  if isinstance(pattern, re.Pattern):
    return any(pattern.search(spelling) for spelling in spellings)
  return any(fnmatch.fnmatchcase(spelling, pattern) for spelling in spellings)
