"""Linen's method interceptors, fixed for ``python -O``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import flax.linen as nn
import flax.linen.module as linen_module


@contextlib.contextmanager
def intercept_methods(interceptor: Callable[..., Any]) -> Generator[None]:
  """``nn.intercept_methods`` that also removes its interceptor under ``python -O``.

  Flax removes the interceptor inside an ``assert``. ``python -O`` skips assertions, so the
  interceptor would stay installed and see every model.
  """
  stack: Any = getattr(linen_module, "_global_interceptor_stack", ())
  depth = len(stack)
  try:
    with nn.intercept_methods(interceptor):
      yield
  finally:
    while len(stack) > depth:
      stack.pop()
