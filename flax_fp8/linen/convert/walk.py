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
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_fp8 import _compat
from flax_fp8.linen.contractions import FP8Contraction
from flax_fp8.linen.convert import binding
from flax_fp8.linen.convert.patterns import Layer, Pattern, at, first_match
from flax_fp8.linen.converted import RUN_FLAG
from flax_fp8.linen.dot_general import Fp8DotGeneral, Fp8Einsum
from flax_fp8.linen.state import read_state
from flax_fp8.ops.check import COMPUTE_DTYPES
from flax_fp8.recipes.base import Recipe

LAYERS = (nn.Dense, nn.DenseGeneral, nn.Einsum)


class Visitor(Protocol):
  """Who is asked about the contractions of a model."""

  def decide(self, layer: Layer, root: Any) -> Recipe | None:
    """Returns the recipe of a contraction, or None to let it be.

    Args:
      layer: the contraction.
      root: scope of the trace that it is in; a lifted transformation has one for each trace.
    """
    ...

  def unasked(self, module: str, kernel: jax.Array) -> None:
    """Is told of a contraction of a module that is neither a layer nor named."""
    ...

  def asked(self, layer: Layer, kernel: jax.Array) -> None:
    """Is told of a contraction that was decided about and that JAX will carry out."""
    ...

  def leave(self, module: nn.Module) -> None:
    """Is told that a method of a module is through."""
    ...


@dataclasses.dataclass
class _Names:
  """Numbers the contractions in one scope, from one call of a method from outside to its end.

  Attributes:
    entry: the method that was called; the first part of the name, unless it is ``__call__``.
    counts: contractions so far, by the first part of the name.
    repeated: the same at the end of a trace of a program. JAX may trace it again, which starts from
      ``counts`` too, until it binds the program.
    program: what the trace was of; another program goes on from its end.
  """

  entry: str
  counts: Counter[str] = dataclasses.field(default_factory=Counter)
  repeated: Counter[str] = dataclasses.field(default_factory=Counter)
  program: Any = None

  def next(self, kind: str) -> str:
    """Makes a new name."""
    name = kind if self.entry == "__call__" else f"{self.entry}_{kind}"
    self.counts[name] += 1
    return f"{name}_{self.counts[name] - 1}"

  def settle(self) -> None:
    """Goes on behind a program that is bound."""
    self.counts |= self.repeated
    self.program = None

  @contextlib.contextmanager
  def again(self, program: Any) -> Generator[_Names]:
    """Makes the names for one trace of a program that JAX may trace several times."""
    if program is not self.program:
      self.settle()
    self.program = program
    inner = _Names(self.entry, Counter(self.counts))
    yield inner
    self.repeated |= inner.counts | inner.repeated


@dataclasses.dataclass
class _Frame:
  """One method of one module that runs.

  Attributes:
    module: whose method it is.
    path: of the module, as patterns see it.
    scope: where the state of its contractions is.
    own: whether the module is the model's; another is run by its own ``apply`` inside of it.
    prefix: path of the root of such another.
    sealed: whether the module contracts by means of its own, with all that it calls.
    trace: in which the method runs.
    names: of its contractions.
  """

  module: Any
  path: tuple[str, ...]
  scope: Any
  own: bool
  prefix: tuple[str, ...]
  sealed: bool
  trace: Any
  names: _Names


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
    self._stack: list[_Frame] = []
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
      scope = functools.reduce(_push, path[len(base.path) :], base.scope)
    sealed = outer is not None and outer.sealed
    refusal = _own_dot_general(module)
    if refusal and method == "__call__":
      layer = _describe(module, join(path), jnp.asarray(given[0]), refusal)
      self.visitor.decide(dataclasses.replace(layer, model=self.model), scope.root)
    function = getattr(function, "func", function)  # a partial of the module
    with self._names(path, module.scope.root, method, function) as names:
      sealed, trace = sealed or bool(refusal), _compat.staging_trace()
      frame = _Frame(module, path, scope, own, prefix, sealed, trace, names)
      self._stack.append(frame)
      try:
        yield self._handler(frame)
      finally:
        self._stack.pop()

  @contextlib.contextmanager
  def _names(
    self, path: tuple[str, ...], root: Any, method: str, function: Any
  ) -> Generator[_Names]:
    """Goes on with the names of a method that is running in this scope, or starts anew."""
    outer = next((frame for frame in reversed(self._stack) if frame.path == path), None)
    if outer is None:
      yield _Names(method)
    elif outer.module.scope.root is root or outer.trace is _compat.staging_trace():
      yield outer.names
    else:  # in a lifted transformation, which traces it as often as it likes
      with outer.names.again(function) as names:
        yield names

  def _handler(self, frame: _Frame) -> binding.Handler | None:
    """Returns who contracts for a method; None where that is JAX."""
    if frame.sealed or isinstance(frame.module, FP8Contraction):
      return None
    named = first_match(self.functions, at(join(frame.path), self.model)) is not None
    if named or self.everything or isinstance(frame.module, LAYERS) or _may_have_kernel(frame):
      return _Contractions(self, frame, named=named)
    return None


def _may_have_kernel(frame: _Frame) -> bool:
  """Tells whether a module has, or may be about to make, a parameter named as Linen's layers do."""
  return frame.module.is_mutable_collection("params") or _kernel(frame.module) is not None


def _kernel(module: Any) -> Any:
  """Returns the parameter of a module that has the name of the kernel of Linen's layers."""
  own: Mapping[str, Any] = module.variables.get("params", {})
  found = nn.meta.unbox(own.get("kernel"))
  return found if isinstance(found, jax.Array | np.ndarray) and found.ndim > 1 else None


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


class _Contractions:
  """Contracts for one method of one module."""

  def __init__(self, walk: Walk, frame: _Frame, *, named: bool) -> None:
    self.walk, self.frame, self.named = walk, frame, named

  def contract(
    self, lhs: jax.Array, rhs: jax.Array, *, kind: str, kernel: int, params: Mapping[str, Any]
  ) -> jax.Array | None:
    operands = [lhs, rhs]
    if not self.named and not self._of_layer(operands[kernel]):
      return self.walk.visitor.unasked(join(self.frame.path), operands[kernel])
    cls = Fp8Einsum if kind == "jnp.einsum" else Fp8DotGeneral
    name = self.frame.names.next(f"{self._part}{cls.__name__}")
    layer = self._layer(name, operands, kind, kernel, params)
    recipe = self.walk.visitor.decide(layer, self.frame.scope.root)
    if recipe is None:
      return self.walk.visitor.asked(layer, operands[kernel])
    how: Any = {"recipe": recipe, "emulate": self.walk.emulate, "name": name}
    given = {key: params[key] for key in ("preferred_element_type", "out_sharding")}
    module: Any = cls(**how, parent=_push(self.frame.scope, name))
    creates = self.frame.scope.is_mutable_collection("params")
    if creates and _compat.staging_trace() is not self.frame.trace:  # none is of a loop's body
      with jax.ensure_compile_time_eval():
        read_state(module, recipe)
    if cls is Fp8DotGeneral:
      return module(lhs, rhs, params["dimension_numbers"], **given)
    equation = _equation(params["dimension_numbers"], lhs.ndim, rhs.ndim, kernel)
    return module(equation, operands[1 - kernel], operands[kernel], **given)

  def _of_layer(self, kernel: jax.Array) -> bool:
    """Tells whether this is a layer: of Linen's, or one that has its kernel in ``kernel``."""
    own = _kernel(self.frame.module)
    return isinstance(self.frame.module, LAYERS) or (own is not None and own.size == kernel.size)

  @contextlib.contextmanager
  def repeated(self, program: Any) -> Generator[None]:
    names = self.frame.names
    with names.again(program) as self.frame.names:
      yield
    self.frame.names = names

  def bound(self) -> None:
    self.frame.names.settle()

  @property
  def _part(self) -> str:
    """What tells the contractions of modules apart that share one scope."""
    name, path = self.frame.module.name, self.frame.module.path
    return f"{name}_" if name and path and name != path[-1] else ""

  def _layer(
    self, name: str, operands: list[jax.Array], kind: str, kernel: int, params: Mapping[str, Any]
  ) -> Layer:
    module, path = self.frame.module, join(self.frame.path)
    is_first = name in ("Fp8DotGeneral_0", "Fp8Einsum_0")
    is_layer = self.frame.own and is_first and self._of_layer(operands[kernel])
    contract, batch = (axes[kernel] for axes in params["dimension_numbers"])
    x, w = operands[1 - kernel], operands[kernel]
    refusal = _refuse(params["precision"], x.dtype, w.dtype)
    if foreign := not self.frame.own and not self.named:
      refusal = f"run by an apply of its own: to convert it, functions={path!r}"
    return Layer(
      path=path if is_layer or foreign else f"{path}/{name}".lstrip("/"),
      owner=path,
      kind=type(module).__name__ if is_layer else kind,
      inputs=x.size,
      itemsize=jnp.promote_types(x.dtype, w.dtype).itemsize,
      stored=_is_among(module.variables.get("params", {}), w),
      refusal=refusal,
      model=self.walk.model,
      **_sizes(w.shape, contract, batch),
    )


def join(path: tuple[str, ...]) -> str:
  """Writes the path of a module as patterns see it."""
  return "/".join(path)


def _push(scope: Any, name: str) -> Any:
  return scope.push(name, reuse=True)


def _is_among(params: Any, kernel: jax.Array) -> bool:
  """Tells whether parameters hold a kernel, judged by its dtype and size; for the report alone."""
  leaves = jax.tree.leaves(params)
  return any(leaf.dtype == kernel.dtype and leaf.size == kernel.size for leaf in leaves)


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


def _refuse(precision: Any, *dtypes: Any) -> str:
  if precision is not None and precision != _default_precision():
    of_each = precision if isinstance(precision, tuple) else (precision,)
    if any(each != lax.Precision.DEFAULT for each in of_each):
      names = dict.fromkeys(getattr(each, "name", str(each)) for each in of_each)
      return f"has precision {' and '.join(names)}"
  unfit = [dtype.name for dtype in dtypes if dtype.name not in COMPUTE_DTYPES]
  return f"computes in {unfit[0]}" if unfit else ""


def _default_precision() -> Any:
  """Returns the precision that JAX's settings give a contraction that asks for none."""
  one = jax.ShapeDtypeStruct((1,), jnp.float32)
  numbers = (((0,), (0,)), ((), ()))
  jaxpr = jax.make_jaxpr(lambda x, y: lax.dot_general(x, y, numbers))(one, one)
  return jaxpr.eqns[0].params["precision"]


def _sizes(shape: tuple[int, ...], contract: Any, batch: Any) -> dict[str, int]:
  sizes = [math.prod(shape[int(axis)] for axis in axes) for axes in (contract, batch)]
  paired = {int(axis) for axis in (*contract, *batch)}
  features = math.prod(size for axis, size in enumerate(shape) if axis not in paired)
  return {"contracted": sizes[0], "batch": sizes[1], "features": features}


def _equation(numbers: Any, lhs_ndim: int, rhs_ndim: int, kernel: int) -> str:
  """Writes dimension numbers as an einsum equation of the input and the kernel."""
  (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = numbers
  letters = iter(map(chr, (*range(ord("a"), ord("z") + 1), *range(ord("A"), ord("Z") + 1))))
  lhs = [next(letters) for _ in range(lhs_ndim)]
  rhs = [next(letters) for _ in range(rhs_ndim)]
  for left, right in ((lhs_batch, rhs_batch), (lhs_contract, rhs_contract)):
    for i, j in zip(left, right, strict=True):
      rhs[j] = lhs[i]
  batch = [lhs[i] for i in lhs_batch]
  own = [label for label in lhs if label not in rhs] + [label for label in rhs if label not in lhs]
  x, w, out = map("".join, (*((rhs, lhs) if kernel == 0 else (lhs, rhs)), batch + own))
  return f"{x},{w}->{out}"


def _tuple(x: Any) -> tuple[int, ...]:
  return tuple(x) if isinstance(x, (tuple, list)) else (x,)
