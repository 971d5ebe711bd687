"""The switch between hand-written kernels and what XLA compiles of plain JAX.

There is no kernel to choose at present. Triton kernels for the scales and the casts of delayed
scaling were measured on an H100: a Transformer block was 0.8 % slower with them than without, and
they are gone. ``benchmarks/README.md`` has the figures.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal, get_args

from flax_fp8 import fields

Kernels = Literal["auto", "all", "off"]


def use_kernels(which: Kernels) -> contextlib.AbstractContextManager[Any]:
  """Chooses what is left to hand-written kernels, in what is traced inside.

  No recipe has such a kernel at present, so every choice compiles the same program.

  Args:
    which: "auto", as without this context: kernels where they were measured to be faster. "all":
      every kernel that can run. "off": plain JAX everywhere.

  Returns:
    A context manager.

  Raises:
    ValueError: ``which`` is none of these.

  Numerics:
    The same bits, whatever is chosen.

  Example:
    >>> import flax_fp8 as fp8
    >>> with fp8.use_kernels("off"):
    ...   pass  # trace, or call a compiled function for the first time

  References:
    benchmarks/README.md, "Measured on an H100".
  """
  fields.choice("use_kernels", "which", which, get_args(Kernels))
  return contextlib.nullcontext()
