"""A converted Linen module: the same class and fields, whose runs stand under a conversion.

``init``, ``apply`` and ``bind`` are where a model meets its variables. It is of a subclass that
overrides these three: it hands the conversion the variables on their way in and out, and lets its
interceptor see each method call in between. All else is inherited: methods, signature, fields.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Protocol, TypeAlias

import flax.core.scope
import flax.linen as nn

from flax_fp8.linen.state import GUARD_DTYPE, OVERWRITE_WITH_GRADIENT


class Conversion(Protocol):
  """What stands between a converted module and its variables; hashable, compared by value."""

  def enter(self, variables: Any) -> dict[str, Any]:
    """Turns the variables that a user has into those that the model finds."""
    ...

  def leave(self, variables: Any) -> dict[str, Any]:
    """Turns the variables that the model has or changed into those that the user gets."""
    ...

  def initialized(self, variables: Any) -> dict[str, Any]:
    """Turns the variables that ``init`` made into those that the user gets."""
    ...

  def during(self, run: Run) -> contextlib.AbstractContextManager[Any]:
    """Stands around a run of the model."""
    ...


@dataclasses.dataclass(frozen=True)
class Run:
  """One run of a converted module.

  Attributes:
    module: the model, unmodified and unbound.
    args: of the method.
    kwargs: of the method.
    method: the method, None for ``__call__``.
    variables: those that the model finds; None while it is initialised.
    rngs: PRNG keys that were passed.
  """

  module: nn.Module
  args: Any = ()
  kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  method: Any = None
  variables: Any = None
  rngs: Any = None


Conversions: TypeAlias = tuple[Conversion, ...]

# A flag of the scopes of one run. Lifted transformations pass it on. A module that the model runs
# by another `apply` has a root scope without it.
RUN_FLAG = "fp8_run"


def mark_root(scope: flax.core.Scope) -> None:
  """Marks a root scope, before it has others in it, as that of a run of its own."""
  scope.flags = flax.core.freeze({**scope.flags, RUN_FLAG: object()})


# The conversions of the converted modules that run here.
_running: ContextVar[tuple[Conversions, ...]] = ContextVar("running", default=())


def make_converted(module: nn.Module, *conversions: Conversion) -> nn.Module:
  """Converts an unbound module; a converted one comes under more conversions, the last inmost."""
  plain = original(module)
  before = getattr(module, "fp8_conversions", ())
  return _converted_class(type(plain), (*before, *conversions))(**_fields(plain))


def original(module: nn.Module) -> nn.Module:
  """Returns the module that a converted one was made of; any other module itself."""
  cls: Any = type(module)
  return cls.fp8_original(**_fields(module)) if hasattr(cls, "fp8_original") else module


def _fields(module: nn.Module) -> dict[str, Any]:
  names = (field.name for field in dataclasses.fields(module) if field.init)
  return {name: getattr(module, name) for name in names if name != "parent"}


@functools.cache
def _converted_class(cls: type[nn.Module], conversions: Conversions) -> Any:
  """Makes the subclass, once: equal converted modules are of one class, and compile once.

  Conversions are no field of it: lifted transformations (``nn.remat(Model)``) make the model's own
  class of the fields.
  """

  def post_init(self: Any) -> None:
    cls.__post_init__(self)
    if self.parent is not None and conversions not in _running.get():
      _refuse_parent(self)

  def init_with_output(self: Any, rngs: Any, *args: Any, **kwargs: Any) -> Any:
    mutable = kwargs.pop("mutable", flax.core.scope.DenyList("intermediates"))
    run = Run(original(self), args, *_split(kwargs))
    with _extent(conversions, run), _explained():
      out, found = cls.init_with_output(self, rngs, *args, mutable=_widen(mutable), **kwargs)
    made: dict[str, Any] = dict(found)
    for conversion in reversed(conversions):
      made = conversion.initialized(made)
    if kwargs.get("capture_intermediates"):
      mutable = flax.core.scope.union_filters(mutable, "intermediates")
    return out, _narrow(made, mutable)

  def apply(self: Any, variables: Any, *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
    found = _enter(conversions, variables)
    run = Run(original(self), args, *_split(kwargs), found, kwargs.get("rngs"))
    with _extent(conversions, run), _explained():
      out = cls.apply(self, found, *args, mutable=_widen(mutable), **kwargs)
    if mutable is False and not kwargs.get("capture_intermediates"):
      return out
    captured = flax.core.scope.union_filters(mutable, "intermediates")
    return out[0], _narrow(_leave(conversions, out[1]), captured)

  def bind(self: Any, variables: Any, *args: Any, **kwargs: Any) -> Any:
    found = _enter(conversions, variables)
    run = Run(original(self), method="bind", variables=found)
    with _extent(conversions, run):
      bound = cls.bind(self, found, *args, **kwargs)
    return Bound(bound, run, self)

  def clone(self: Any, *, parent: Any = None, **kwargs: Any) -> Any:
    if isinstance(parent, flax.core.Scope) and RUN_FLAG not in parent.flags:
      mark_root(parent)
    return cls.clone(self, parent=parent, **kwargs)

  methods = {
    "__post_init__": post_init,
    "init_with_output": nn.nowrap(init_with_output),
    "apply": nn.nowrap(apply),
    "bind": nn.nowrap(bind),
    "clone": nn.nowrap(clone),
    "__reduce__": nn.nowrap(lambda self: (make_converted, (original(self), *conversions))),
    "fp8_conversions": conversions,
    "fp8_original": cls,
    "__module__": cls.__module__,
    "__qualname__": cls.__qualname__,
    "__doc__": cls.__doc__,
  }
  metaclass: Any = type(cls)
  made: Any = metaclass(cls.__name__, (cls,), methods)
  made.__init__ = cls.__init__  # which may do more than to set the fields
  return made


def _refuse_parent(module: Any) -> None:
  raise ValueError(
    "fp8_linear_layers: a converted module must be the outermost, and be run by its own init, "
    f"apply or bind; got {type(module).__name__} inside {type(module.parent).__name__}. Convert "
    "the outermost module, and choose what of it becomes FP8 with Fp8Config(targets=...)."
  )


@contextlib.contextmanager
def _explained() -> Generator[None]:
  """Explains the error of a function that computes with all of the parameters at once."""
  try:
    yield
  except TypeError as error:
    if GUARD_DTYPE not in str(error):
      raise
    raise ValueError(
      "fp8_linear_layers: what computes with parameters inside of the model, as nn.map_variables "
      f"does, must leave FP8 state alone, which is among them below {OVERWRITE_WITH_GRADIENT!r}; "
      f"got {error} Let it change the leaves that it means by their names."
    ) from error


def take_in(variables: Any, collection: str) -> dict[str, Any]:
  """Returns variables with a collection that is among the parameters as one of its own.

  Wrappers of models, such as those of Hugging Face, hand on ``params`` and no other collection.
  """
  params = variables.get("params")
  if not isinstance(params, Mapping) or collection not in params:
    return dict(variables)
  if collection in variables:
    raise ValueError(
      f"fp8_linear_layers: the collection {collection!r} must be passed once; got it in variables "
      "and among their params. Leave one out."
    )
  rest = {name: value for name, value in params.items() if name != collection}
  return {**variables, "params": rest, collection: params[collection]}


def _enter(conversions: Conversions, variables: Any) -> Any:
  for conversion in conversions:
    variables = conversion.enter(variables)
  return variables


def _leave(conversions: Conversions, variables: Any) -> Any:
  for conversion in reversed(conversions):
    variables = conversion.leave(variables)
  return variables


@contextlib.contextmanager
def _extent(conversions: Conversions, run: Run) -> Generator[None]:
  token = _running.set((*_running.get(), conversions))
  try:
    with contextlib.ExitStack() as stack:
      for conversion in conversions:
        stack.enter_context(conversion.during(run))
      yield
  finally:
    _running.reset(token)


def _split(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
  """Parts a method's own arguments from those of ``init`` and ``apply``; and names the method."""
  linen = ("rngs", "method", "mutable", "capture_intermediates")
  own = {name: value for name, value in kwargs.items() if name not in linen}
  return own, kwargs.get("method")


def _widen(mutable: Any) -> Any:
  """Lets parameters be made where state is: inside, it is kept among them."""
  if flax.core.scope.in_filter(mutable, OVERWRITE_WITH_GRADIENT):
    return flax.core.scope.union_filters(mutable, "params")
  return mutable


def _narrow(variables: dict[str, Any], mutable: Any) -> dict[str, Any]:
  """Keeps the collections that were asked for."""
  asked = lambda name: flax.core.scope.in_filter(mutable, name)
  return {name: value for name, value in variables.items() if asked(name)}


class Bound:
  """A bound converted module, or what it holds: calls of it run under the conversion."""

  def __init__(self, value: Any, run: Run, converted: Any) -> None:
    """Wraps a module, a method or a container of a bound converted module."""
    self._value, self._run, self._converted = value, run, converted

  def __getattr__(self, name: str) -> Any:
    with self._extent():
      return self._wrap(getattr(self._value, name))

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """Calls what is wrapped."""
    with self._extent():
      return self._value(*args, **kwargs)

  def __getitem__(self, key: Any) -> Any:
    return self._wrap(self._value[key])

  def __len__(self) -> int:
    return len(self._value)

  def __iter__(self) -> Iterator[Any]:
    return map(self._wrap, self._value)

  def __repr__(self) -> str:
    return repr(self._value)

  @property
  def variables(self) -> Any:
    """The variables, as the user gave them."""
    return _leave(self._converted.fp8_conversions, self._value.variables)

  def unbind(self) -> tuple[Any, Any]:
    """Returns the unbound converted module and its variables."""
    return self._converted, self.variables

  def _extent(self) -> Any:
    return _extent(self._converted.fp8_conversions, self._run)

  def _wrap(self, value: Any) -> Any:
    holds = isinstance(value, (list, tuple, Mapping)) and any(
      isinstance(x, nn.Module) for x in (value.values() if isinstance(value, Mapping) else value)
    )
    bound_method = isinstance(value, Callable) and isinstance(
      getattr(value, "__self__", None), nn.Module
    )
    wanted = isinstance(value, nn.Module) or holds or bound_method
    return Bound(value, self._run, self._converted) if wanted else value
