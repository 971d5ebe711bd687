"""``jnp.einsum`` and ``lax.dot_general``, handed to someone else while a module's method runs.

JAX's two public names are replaced while any thread needs it. Each thread, and within it each
method, has its own handler; where there is none, JAX's functions run as ever.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Generator
from contextvars import ContextVar
from typing import Any, Protocol

import jax.numpy as jnp
from jax import lax


class Handler(Protocol):
  """What contracts in the place of JAX."""

  def einsum(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Is called as ``jnp.einsum``, which is passed on as ``original``."""
    ...

  def dot_general(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Is called as ``lax.dot_general``."""
    ...


_handler: ContextVar[Handler | None] = ContextVar("handler", default=None)
_lock = threading.Lock()
_originals: dict[str, Callable[..., Any]] = {}
_users = 0


def current() -> Handler | None:
  """Returns the handler of the method that runs."""
  return _handler.get()


@contextlib.contextmanager
def handed_to(handler: Handler | None) -> Generator[None]:
  """While inside, calls of JAX's two functions by this thread go to ``handler``; None is JAX."""
  if handler is None and _handler.get() is None:
    yield
    return
  token = _handler.set(handler)
  _install()
  try:
    yield
  finally:
    _uninstall()
    _handler.reset(token)


def _install() -> None:
  global _users
  with _lock:
    _users += 1
    if _users > 1:
      return
    for module, name in ((jnp, "einsum"), (lax, "dot_general")):
      _originals[name] = getattr(module, name)
      setattr(module, name, _dispatch(name, _originals[name]))


def _uninstall() -> None:
  global _users
  with _lock:
    _users -= 1
    if not _users:
      jnp.einsum, lax.dot_general = _originals["einsum"], _originals["dot_general"]


def _dispatch(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
  @functools.wraps(original)
  def call(*args: Any, **kwargs: Any) -> Any:
    handler = _handler.get()
    if handler is None:
      return original(*args, **kwargs)
    with handed_to(None):
      return getattr(handler, name)(original, *args, **kwargs)

  return call
