"""Switches between hand-written kernels and code that XLA compiles from plain JAX.

No recipe has a hand-written kernel at present. Triton kernels for the scales and casts of delayed
scaling were measured on an H100 and removed: with them, a Transformer block was 0.8 % slower.
``docs/results.md`` has the figures.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal, get_args

from flax_fp8 import fields

Kernels = Literal["auto", "all", "off"]


def use_kernels(which: Kernels) -> contextlib.AbstractContextManager[Any]:
  """Selects which hand-written kernels to use in code that is traced inside the context.

  No recipe has a hand-written kernel at present, so every choice compiles the same program.

  Args:
    which: "auto" uses kernels that were measured to be faster, as without this context. "all" uses
      every kernel that can run. "off" uses plain JAX everywhere.

  Returns:
    A context manager.

  Raises:
    ValueError: ``which`` is not one of these strings.

  Numerics:
    Every choice gives the same bits.

  Example:
    >>> import flax_fp8 as fp8
    >>> with fp8.use_kernels("off"):
    ...   pass  # trace, or call a compiled function for the first time

  References:
    docs/results.md, "Timed on an H100".
  """
  fields.choice("use_kernels", "which", which, get_args(Kernels))
  return contextlib.nullcontext()
