"""Converted Linen modules.

A converted module is an instance of a subclass of the model's class. The subclass overrides
``init``, ``apply`` and ``bind``. They pass the variables through the conversion before and after a
run, and enter its context during the run. Methods, signatures and fields are inherited.
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
  """Changes the variables and the runs of a module. Hashable and compared by value."""

  def enter(self, variables: Any) -> dict[str, Any]:
    """Converts the user's variables to the variables that the model reads."""
    ...

  def leave(self, variables: Any) -> dict[str, Any]:
    """Converts the variables that the model returns to the user's variables."""
    ...

  def initialized(self, variables: Any) -> dict[str, Any]:
    """Converts the variables that ``init`` creates to the user's variables."""
    ...

  def during(self, run: Run) -> contextlib.AbstractContextManager[Any]:
    """Returns a context that surrounds a run of the model."""
    ...


@dataclasses.dataclass(frozen=True)
class Run:
  """One run of a converted module.

  Attributes:
    module: the original model, unbound.
    args: positional arguments of the method.
    kwargs: keyword arguments of the method.
    method: the method; None for ``__call__``.
    variables: the variables that the model reads; None in ``init``.
    rngs: the PRNG keys passed to ``apply``.
  """

  module: nn.Module
  args: Any = ()
  kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  method: Any = None
  variables: Any = None
  rngs: Any = None


Conversions: TypeAlias = tuple[Conversion, ...]

# A flag in the scopes of one run. Lifted transformations copy it to the scopes that they make. The
# scopes of a nested `apply` or `bind` do not have it.
RUN_FLAG = "fp8_run"


def mark_root(scope: flax.core.Scope) -> None:
  """Marks a root scope as the root of a run. Call it before the scope has children."""
  scope.flags = flax.core.freeze({**scope.flags, RUN_FLAG: object()})


class OwnModules:
  """Distinguishes the modules of one run from those of a nested ``apply`` or ``bind`` in it.

  Module paths start again at the root in a nested call, so they may equal paths of the model.
  """

  def __init__(self) -> None:
    """Starts without a run. The first marked module that ``has`` sees belongs to it."""
    self._flag: object = None

  def has(self, module: Any) -> bool:
    """Returns whether a module belongs to the run."""
    flag = module.scope.flags.get(RUN_FLAG) if module.scope else None
    self._flag = self._flag or flag
    return flag is not None and flag is self._flag


# The conversions of the converted modules that are running.
_running: ContextVar[tuple[Conversions, ...]] = ContextVar("running", default=())


def make_converted(module: nn.Module, *conversions: Conversion) -> nn.Module:
  """Converts an unbound module. A converted module gets the conversions in addition, innermost."""
  plain = original(module)
  before = getattr(module, "fp8_conversions", ())
  return _converted_class(type(plain), (*before, *conversions))(**_fields(plain))


def original(module: nn.Module) -> nn.Module:
  """Returns the original of a converted module. Returns other modules unchanged."""
  cls: Any = type(module)
  return cls.fp8_original(**_fields(module)) if hasattr(cls, "fp8_original") else module


def _fields(module: nn.Module) -> dict[str, Any]:
  names = (field.name for field in dataclasses.fields(module) if field.init)
  return {name: getattr(module, name) for name in names if name != "parent"}


@functools.cache
def _converted_class(cls: type[nn.Module], conversions: Conversions) -> Any:
  """Creates the subclass. The cache makes equal converted modules equal, so they compile once.

  The conversions are not a field, because lifted transformations such as ``nn.remat(Model)``
  construct the model's own class from the fields.
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
  made.__init__ = cls.__init__  # a custom __init__ may do more than set the fields
  return made


def _refuse_parent(module: Any) -> None:
  raise ValueError(
    "fp8_linear_layers: a converted module must be the outermost module and be run by its own "
    f"init, apply or bind; got {type(module).__name__} inside {type(module.parent).__name__}. "
    "Convert the outermost module, and select its layers with Fp8Config(targets=...)."
  )


@contextlib.contextmanager
def _explained() -> Generator[None]:
  """Explains the error of a function that computes with all parameters, including FP8 state."""
  try:
    yield
  except TypeError as error:
    if GUARD_DTYPE not in str(error):
      raise
    raise ValueError(
      "fp8_linear_layers: functions of the model's parameters, such as in nn.map_variables, must "
      f"not change FP8 state, which is stored under {OVERWRITE_WITH_GRADIENT!r} among them; "
      f"got {error} Select the leaves to change by their names."
    ) from error


def take_in(variables: Any, collection: str) -> dict[str, Any]:
  """Moves a collection that is stored among the parameters to the top level of the variables.

  Wrappers that pass only ``params``, such as those of Hugging Face, store the collection there.
  """
  params = variables.get("params")
  if not isinstance(params, Mapping) or collection not in params:
    return dict(variables)
  if collection in variables:
    raise ValueError(
      f"fp8_linear_layers: the collection {collection!r} must be passed once; got it in variables "
      "and in variables['params']. Remove one of them."
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
  """Returns the method's own keyword arguments, without those of ``apply``, and the method."""
  linen = ("rngs", "method", "mutable", "capture_intermediates")
  own = {name: value for name, value in kwargs.items() if name not in linen}
  return own, kwargs.get("method")


def _widen(mutable: Any) -> Any:
  """Makes parameters mutable if the state is, because the model stores state among them."""
  if flax.core.scope.in_filter(mutable, OVERWRITE_WITH_GRADIENT):
    return flax.core.scope.union_filters(mutable, "params")
  return mutable


def _narrow(variables: dict[str, Any], mutable: Any) -> dict[str, Any]:
  """Keeps the requested collections."""
  asked = lambda name: flax.core.scope.in_filter(mutable, name)
  return {name: value for name, value in variables.items() if asked(name)}


class Bound:
  """A bound converted module or one of its attributes. Calls run under the conversion."""

  def __init__(self, value: Any, run: Run, converted: Any) -> None:
    """Wraps a module, a bound method or a container of modules."""
    self._value, self._run, self._converted = value, run, converted

  def __getattr__(self, name: str) -> Any:
    with self._extent():
      return self._wrap(getattr(self._value, name))

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """Calls the wrapped module or method."""
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
    """The variables in the user's form."""
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
