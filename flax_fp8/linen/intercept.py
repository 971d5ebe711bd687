"""Linen's method interceptors, which end where they should under ``python -O`` too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import flax.linen as nn
import flax.linen.module as linen_module


@contextlib.contextmanager
def intercept_methods(interceptor: Callable[..., Any]) -> Generator[None]:
  """``nn.intercept_methods``, which takes its interceptor out inside an ``assert``.

  ``python -O`` leaves assertions out, and so the interceptor in: it would see every model.
  """
  stack: Any = getattr(linen_module, "_global_interceptor_stack", ())
  depth = len(stack)
  try:
    with nn.intercept_methods(interceptor):
      yield
  finally:
    while len(stack) > depth:
      stack.pop()
