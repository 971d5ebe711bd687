"""Walks through a model as it runs, and has a visitor decide about each contraction of its layers.

An interceptor of Linen sees each method of each module. While a layer's method runs, or that of a
module whose own contractions are meant, every contraction that it binds is handed to the visitor.
The module whose method it is, its path and its scope are known from the call, not inferred.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_fp8 import _compat
from flax_fp8.linen.contractions import FP8Contraction
from flax_fp8.linen.convert import binding
from flax_fp8.linen.convert.method import (
  LAYERS,
  Contractions,
  Frame,
  Visitor,
  join,
  own_kernel,
  push,
)
from flax_fp8.linen.convert.names import Names
from flax_fp8.linen.convert.patterns import Layer, Pattern, at, first_match
from flax_fp8.linen.converted import RUN_FLAG


class Walk:
  """One walk through a model; ``intercept`` is for ``nn.intercept_methods``."""

  def __init__(
    self,
    visitor: Visitor,
    functions: tuple[Pattern, ...],
    *,
    model: str = "",
    emulate: bool = False,
    everything: bool = False,
  ) -> None:
    """Prepares a walk.

    Args:
      visitor: is asked about each contraction.
      functions: modules whose own contractions are to be decided about.
      model: class of the model, as patterns may write it.
      emulate: as for ``Fp8DotGeneral``.
      everything: whether the visitor is told of the contractions of all other modules too.
    """
    self.visitor, self.functions, self.model = visitor, functions, model
    self.emulate, self.everything = emulate, everything
    self._stack: list[Frame] = []
    self._run: Any = None

  def intercept(self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Runs one method of one module."""
    module = context.module
    if module.scope is None:
      return next_fun(*args, **kwargs)
    if not self._stack:
      self._run = module.scope.flags.get(RUN_FLAG)
    if context.method_name == "setup":
      with binding.handed_to(None):
        return next_fun(*args, **kwargs)
    # A lifted function is no method: its contractions are those of the call that lifts it.
    method = context.method_name
    method = method if hasattr(type(module), method) else "__call__"
    given = (*args, *kwargs.values())
    with (
      self._frame(module, method, context.orig_method, given) as handler,
      binding.handed_to(handler),
      _parameters_made_by_jax(module, handler),
    ):
      out = next_fun(*args, **kwargs)
    self.visitor.leave(module)
    return out

  @contextlib.contextmanager
  def _frame(
    self, module: Any, method: str, function: Any, given: Any
  ) -> Generator[binding.Handler | None]:
    outer = self._stack[-1] if self._stack else None
    own = module.scope.flags.get(RUN_FLAG) is self._run
    prefix, path, scope = (), module.path, module.scope
    if not own and outer is not None:
      prefix = outer.prefix
      if not module.path or outer.own:
        prefix = (*outer.path, module.name or type(module).__name__)
      path = (*prefix, *module.path)
      base = next(frame for frame in reversed(self._stack) if frame.own)
      scope = functools.reduce(push, path[len(base.path) :], base.scope)
    sealed = outer is not None and outer.sealed
    refusal = _own_dot_general(module)
    if refusal and method == "__call__":
      layer = _describe(module, join(path), jnp.asarray(given[0]), refusal)
      self.visitor.decide(dataclasses.replace(layer, model=self.model), scope.root)
    function = getattr(function, "func", function)  # a partial of the module
    with self._names(path, module.scope.root, function) as names:
      sealed, trace = sealed or bool(refusal), _compat.staging_trace()
      methods = self._methods(path, method)
      frame = Frame(module, path, scope, own, prefix, sealed, trace, methods, names)
      self._stack.append(frame)
      try:
        yield self._handler(frame)
      finally:
        self._stack.pop()

  def _outer(self, path: tuple[str, ...]) -> Frame | None:
    """Returns the method that is running in the same scope."""
    return next((frame for frame in reversed(self._stack) if frame.path == path), None)

  def _methods(self, path: tuple[str, ...], method: str) -> tuple[str, ...]:
    outer = self._outer(path)
    before = outer.methods if outer else ()
    return before if method == "__call__" or before[-1:] == (method,) else (*before, method)

  @contextlib.contextmanager
  def _names(self, path: tuple[str, ...], root: Any, function: Any) -> Generator[Names]:
    """Goes on with the names of a method that is running in this scope, or starts anew."""
    outer = self._outer(path)
    if outer is None:
      yield Names()
    elif outer.module.scope.root is root or outer.trace is _compat.staging_trace():
      yield outer.names
    else:  # in a lifted transformation, which traces it as often as it likes
      with outer.names.again(function) as names:
        yield names

  def _handler(self, frame: Frame) -> binding.Handler | None:
    """Returns who contracts for a method; None where that is JAX."""
    if frame.sealed or isinstance(frame.module, FP8Contraction):
      return None
    named = first_match(self.functions, at(join(frame.path), self.model)) is not None
    if named or self.everything or isinstance(frame.module, LAYERS) or _may_have_kernel(frame):
      how: Any = {"named": named, "model": self.model, "emulate": self.emulate}
      return Contractions(frame, self.visitor, **how)
    return None


def _may_have_kernel(frame: Frame) -> bool:
  """Tells whether a module has, or may be about to make, a parameter named as Linen's layers do."""
  return frame.module.is_mutable_collection("params") or own_kernel(frame.module) is not None


@contextlib.contextmanager
def _parameters_made_by_jax(module: Any, handler: Any) -> Generator[None]:
  """Leaves what initializers contract to JAX."""
  if handler is None or "param" in vars(module) or not module.is_mutable_collection("params"):
    yield
    return

  def quietly(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any, **kwargs: Any) -> Any:
      with binding.handed_to(None):
        return make(*args, **kwargs)

    return made

  for name in ("param", "variable"):
    object.__setattr__(module, name, quietly(getattr(module, name)))
  try:
    yield
  finally:
    for name in ("param", "variable"):
      object.__delattr__(module, name)


def _own_dot_general(module: Any) -> str:
  """Says by which means of its own a layer contracts, or ``""``."""
  for name in ("dot_general_cls", "dot_general"):
    held: Any = getattr(module, name, None) if isinstance(module, LAYERS[:2]) else None
    plain = isinstance(held, functools.partial) and held.func is lax.dot_general
    if held is not None and not plain:
      return f"has its own {name}"
  return ""


def _describe(module: Any, path: str, inputs: jax.Array, refusal: str) -> Layer:
  """Describes a layer that contracts by its own means, from its fields and its input."""
  axis, batch = getattr(module, "axis", -1), getattr(module, "batch_dims", ())
  sizes = [math.prod(inputs.shape[a] for a in _tuple(axes)) for axes in (axis, batch)]
  return Layer(
    path=path,
    owner=path,
    kind=type(module).__name__,
    inputs=inputs.size,
    contracted=sizes[0],
    features=math.prod(_tuple(module.features)),
    batch=sizes[1],
    refusal=refusal,
  )


def _tuple(x: Any) -> tuple[int, ...]:
  return tuple(x) if isinstance(x, (tuple, list)) else (x,)
