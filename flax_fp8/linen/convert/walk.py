"""Walks through a running model and hands the contractions of its layers to a visitor.

A Linen interceptor sees every method call of every module. While a method of a layer, or of a
module selected by ``Fp8Config.functions``, runs, a handler receives every contraction that it
binds. The call provides the module, its path and its scope, so nothing is inferred.
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
from flax_fp8.linen.converted import OwnModules


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
    """Creates a walk.

    Args:
      visitor: decides for each contraction.
      functions: patterns of modules with contractions that count as layers.
      model: class name of the model, which patterns may contain.
      emulate: as in ``Fp8DotGeneral``.
      everything: whether the visitor also observes the contractions of all other modules.
    """
    self.visitor, self.functions, self.model = visitor, functions, model
    self.emulate, self.everything = emulate, everything
    self._stack: list[Frame] = []
    self._own = OwnModules()

  def intercept(self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Runs one method of one module."""
    module = context.module
    if module.scope is None:
      return next_fun(*args, **kwargs)
    if not self._stack:
      self._own = OwnModules()
    if context.method_name == "setup":
      with binding.handed_to(None):
        return next_fun(*args, **kwargs)
    # A lifted function is not a method. Its contractions belong to the call that lifts it.
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
    own = self._own.has(module)
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
    function = getattr(function, "func", function)  # a partial with the module bound
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
    """Returns the innermost running method in the same scope, or None."""
    return next((frame for frame in reversed(self._stack) if frame.path == path), None)

  def _methods(self, path: tuple[str, ...], method: str) -> tuple[str, ...]:
    outer = self._outer(path)
    before = outer.methods if outer else ()
    return before if method == "__call__" or before[-1:] == (method,) else (*before, method)

  @contextlib.contextmanager
  def _names(self, path: tuple[str, ...], root: Any, function: Any) -> Generator[Names]:
    """Continues the names of a running method in this scope, or starts new ones."""
    outer = self._outer(path)
    if outer is None:
      yield Names()
    elif outer.module.scope.root is root or outer.trace is _compat.staging_trace():
      yield outer.names
    else:  # in a lifted transformation, which may trace the function several times
      with outer.names.again(function) as names:
        yield names

  def _handler(self, frame: Frame) -> binding.Handler | None:
    """Returns the handler of a method's contractions. None means JAX."""
    if frame.sealed or isinstance(frame.module, FP8Contraction):
      return None
    named = first_match(self.functions, at(join(frame.path), self.model)) is not None
    if named or self.everything or isinstance(frame.module, LAYERS) or _may_have_kernel(frame):
      how: Any = {"named": named, "model": self.model, "emulate": self.emulate}
      return Contractions(frame, self.visitor, **how)
    return None


def _may_have_kernel(frame: Frame) -> bool:
  """Returns whether a module has, or may still create, a parameter named ``kernel``."""
  return frame.module.is_mutable_collection("params") or own_kernel(frame.module) is not None


@contextlib.contextmanager
def _parameters_made_by_jax(module: Any, handler: Any) -> Generator[None]:
  """Leaves the contractions inside initializers to JAX."""
  if handler is None or "param" in vars(module) or not module.is_mutable_collection("params"):
    yield
    return

  def by_jax(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any, **kwargs: Any) -> Any:
      with binding.handed_to(None):
        return make(*args, **kwargs)

    return made

  for name in ("param", "variable"):
    object.__setattr__(module, name, by_jax(getattr(module, name)))
  try:
    yield
  finally:
    for name in ("param", "variable"):
      object.__delattr__(module, name)


def _own_dot_general(module: Any) -> str:
  """Returns the reason if a layer has its own ``dot_general``, else ``""``."""
  for name in ("dot_general_cls", "dot_general"):
    held: Any = getattr(module, name, None) if isinstance(module, LAYERS[:2]) else None
    plain = isinstance(held, functools.partial) and held.func is lax.dot_general
    if held is not None and not plain:
      return f"has its own {name}"
  return ""


def _describe(module: Any, path: str, inputs: jax.Array, refusal: str) -> Layer:
  """Describes a layer with its own ``dot_general``, from its fields and its input."""
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
