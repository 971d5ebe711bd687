"""Carries out the contractions of one method of a module, in FP8 or by JAX."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Generator, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_fp8 import _compat
from flax_fp8.linen.convert.names import Names
from flax_fp8.linen.convert.patterns import Layer
from flax_fp8.linen.dot_general import Fp8DotGeneral, Fp8Einsum
from flax_fp8.linen.state import read_state
from flax_fp8.ops.check import COMPUTE_DTYPES
from flax_fp8.recipes.base import Recipe

LAYERS = (nn.Dense, nn.DenseGeneral, nn.Einsum)


class Visitor(Protocol):
  """Decides how each contraction of a model is computed, and observes the walk."""

  def decide(self, layer: Layer, root: Any) -> Recipe | None:
    """Returns the recipe of a contraction, or None for high precision.

    Args:
      layer: the contraction.
      root: root scope of the current trace. A lifted transformation has one for each trace.
    """
    ...

  def unasked(self, module: str, kernel: jax.Array) -> None:
    """Observes a contraction of a module that is neither a layer nor named."""
    ...

  def asked(self, layer: Layer, kernel: jax.Array) -> None:
    """Observes a contraction that ``decide`` leaves in high precision."""
    ...

  def leave(self, module: nn.Module) -> None:
    """Observes the end of a method of a module."""
    ...


@dataclasses.dataclass
class Frame:
  """A running method of one module.

  Attributes:
    module: the module.
    path: the module's path, as patterns match it.
    scope: the scope that holds the state of its contractions.
    own: whether the module belongs to the model itself. False in a nested ``apply``.
    prefix: path of the root module of the nested ``apply``.
    sealed: whether the module, or a module around it, has its own ``dot_general``.
    trace: the trace in which the method runs.
    methods: the running methods of this module, outermost first, without ``__call__``.
    names: names of the module's contractions.
  """

  module: Any
  path: tuple[str, ...]
  scope: Any
  own: bool
  prefix: tuple[str, ...]
  sealed: bool
  trace: Any
  methods: tuple[str, ...]
  names: Names


class Contractions:
  """Handles the contractions of one method of one module."""

  def __init__(
    self, frame: Frame, visitor: Visitor, *, named: bool, model: str, emulate: bool
  ) -> None:
    """Creates the handler of one run of a method.

    Args:
      frame: the running method.
      visitor: decides for each contraction.
      named: whether ``visitor`` decides for all contractions, not only for those of a layer.
      model: class name of the model.
      emulate: as in ``Fp8DotGeneral``.
    """
    self.frame, self.visitor, self.named = frame, visitor, named
    self.model, self.emulate = model, emulate
    self.trace, self.mesh = _compat.current_trace(), jax.sharding.get_abstract_mesh()

  def contract(
    self, lhs: jax.Array, rhs: jax.Array, *, kind: str, kernel: int, params: Mapping[str, Any]
  ) -> jax.Array | None:
    """Contracts in FP8 if the visitor returns a recipe; see ``binding.Handler``."""
    operands = [lhs, rhs]
    if not self.named and not self._of_layer(operands[kernel]):
      return self.visitor.unasked(join(self.frame.path), operands[kernel])
    cls = Fp8Einsum if kind == "jnp.einsum" or kernel == 0 else Fp8DotGeneral
    name = self.frame.names.next(f"{self._part}{cls.__name__}")
    layer = self._layer(name, operands, kind, kernel, params)
    recipe = self.visitor.decide(layer, self.frame.scope.root)
    if recipe is None:
      return self.visitor.asked(layer, operands[kernel])
    how: Any = {"recipe": recipe, "emulate": self.emulate, "name": name}
    given = {key: params[key] for key in ("preferred_element_type", "out_sharding")}
    module: Any = cls(**how, parent=push(self.frame.scope, name))
    if self.frame.scope.is_mutable_collection("params"):
      # The body of a loop may be the first to read the state. Create the state outside of it.
      with _compat.under_trace(self.trace), jax.sharding.use_abstract_mesh(self.mesh):
        read_state(module, recipe)
    if cls is Fp8DotGeneral:
      return module(lhs, rhs, params["dimension_numbers"], **given)
    equation = _equation(params["dimension_numbers"], lhs.ndim, rhs.ndim, kernel)
    return module(equation, operands[1 - kernel], operands[kernel], **given)

  def _of_layer(self, kernel: jax.Array) -> bool:
    """Returns whether the module is a Linen layer, or contracts with its parameter ``kernel``."""
    if isinstance(self.frame.module, LAYERS):
      return True
    own = None if self.named else own_kernel(self.frame.module)
    return own is not None and own.size == kernel.size

  @contextlib.contextmanager
  def repeated(self, program: Any) -> Generator[None]:
    """Surrounds one trace of a program. Every trace starts from the same names."""
    names = self.frame.names
    with names.again(program) as self.frame.names:
      yield
    self.frame.names = names

  def bound(self) -> None:
    """Continues with new names after a program is bound."""
    self.frame.names.commit()

  @property
  def _part(self) -> str:
    """A prefix that keeps names unique among methods, and among modules that share a scope.

    The prefix does not depend on whether ``__call__`` or the user calls the method.
    """
    name, path = self.frame.module.name, self.frame.module.path
    shares = name and path and name != path[-1]
    return "".join(f"{each}_" for each in ([name] if shares else []) + [*self.frame.methods])

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
      refusal = f"run by a nested apply; to convert it, pass functions={path!r}"
    return Layer(
      path=path if is_layer or foreign else f"{path}/{name}".lstrip("/"),
      owner=path,
      kind=type(module).__name__ if is_layer else kind,
      inputs=x.size,
      itemsize=jnp.promote_types(x.dtype, w.dtype).itemsize,
      stored=_is_among(module.variables.get("params", {}), w),
      refusal=refusal,
      model=self.model,
      **_sizes(w.shape, contract, batch),
    )


def join(path: tuple[str, ...]) -> str:
  """Joins the path of a module, as patterns match it."""
  return "/".join(path)


def push(scope: Any, name: str) -> Any:
  """Returns the child scope of a name. Repeated calls return the same scope."""
  return scope.push(name, reuse=True)


def own_kernel(module: Any) -> Any:
  """Returns the module's parameter ``kernel`` if it has two or more axes, else None."""
  own: Mapping[str, Any] = module.variables.get("params", {})
  found = nn.meta.unbox(own.get("kernel"))
  return found if isinstance(found, jax.Array | np.ndarray) and found.ndim > 1 else None


def _is_among(params: Any, kernel: jax.Array) -> bool:
  """Returns whether a parameter has the kernel's dtype and size. Only the report uses this."""
  leaves = jax.tree.leaves(params)
  return any(leaf.dtype == kernel.dtype and leaf.size == kernel.size for leaf in leaves)


def _refuse(precision: Any, *dtypes: Any) -> str:
  if precision is not None and precision != _default_precision():
    of_each = precision if isinstance(precision, tuple) else (precision,)
    if any(each != lax.Precision.DEFAULT for each in of_each):
      names = dict.fromkeys(getattr(each, "name", str(each)) for each in of_each)
      return f"has precision {' and '.join(names)}"
  unfit = [dtype.name for dtype in dtypes if dtype.name not in COMPUTE_DTYPES]
  return f"computes in {unfit[0]}" if unfit else ""


def _default_precision() -> Any:
  """Returns the precision that JAX's configuration sets for a contraction without one."""
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
  """Converts dimension numbers to an einsum equation of the input and the kernel."""
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
