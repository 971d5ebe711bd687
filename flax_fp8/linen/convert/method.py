"""The contractions of one method of a module: what they are, and who carries them out."""

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
class Frame:
  """One method of one module that runs.

  Attributes:
    module: whose method it is.
    path: of the module, as patterns see it.
    scope: where the state of its contractions is.
    own: whether the module is the model's; another is run by its own ``apply`` inside of it.
    prefix: path of the root of such another.
    sealed: whether the module contracts by means of its own, with all that it calls.
    trace: in which the method runs.
    methods: of the module, each called by the one before, but for ``__call__``.
    names: of its contractions.
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
  """Contracts for one method of one module."""

  def __init__(
    self, frame: Frame, visitor: Visitor, *, named: bool, model: str, emulate: bool
  ) -> None:
    """Prepares for one run of a method.

    Args:
      frame: of the method.
      visitor: is asked about each contraction.
      named: whether all of its contractions are to be decided about, not only those of a layer.
      model: class of the model.
      emulate: as for ``Fp8DotGeneral``.
    """
    self.frame, self.visitor, self.named = frame, visitor, named
    self.model, self.emulate = model, emulate
    self.trace, self.mesh = _compat.current_trace(), jax.sharding.get_abstract_mesh()

  def contract(
    self, lhs: jax.Array, rhs: jax.Array, *, kind: str, kernel: int, params: Mapping[str, Any]
  ) -> jax.Array | None:
    """Contracts in FP8 where the visitor says so; see ``binding.Handler``."""
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
      # A loop's body, say, may read it first, but it is none of its variables.
      with _compat.under_trace(self.trace), jax.sharding.use_abstract_mesh(self.mesh):
        read_state(module, recipe)
    if cls is Fp8DotGeneral:
      return module(lhs, rhs, params["dimension_numbers"], **given)
    equation = _equation(params["dimension_numbers"], lhs.ndim, rhs.ndim, kernel)
    return module(equation, operands[1 - kernel], operands[kernel], **given)

  def _of_layer(self, kernel: jax.Array) -> bool:
    """Tells whether this is a layer: of Linen's, or one that has its kernel in ``kernel``."""
    if isinstance(self.frame.module, LAYERS):
      return True
    own = None if self.named else own_kernel(self.frame.module)
    return own is not None and own.size == kernel.size

  @contextlib.contextmanager
  def repeated(self, program: Any) -> Generator[None]:
    """Stands around one trace of a program: each starts from the same names."""
    names = self.frame.names
    with names.again(program) as self.frame.names:
      yield
    self.frame.names = names

  def bound(self) -> None:
    """Goes on with names of their own behind a program that was bound."""
    self.frame.names.settle()

  @property
  def _part(self) -> str:
    """What tells apart the contractions of several methods, and of modules that share a scope.

    It is the same whether a method is called from outside or by ``__call__``.
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
      refusal = f"run by an apply of its own: to convert it, functions={path!r}"
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
  """Writes the path of a module as patterns see it."""
  return "/".join(path)


def push(scope: Any, name: str) -> Any:
  """Returns the scope of a name below another, the same one each time."""
  return scope.push(name, reuse=True)


def own_kernel(module: Any) -> Any:
  """Returns the parameter of a module that has the name of the kernel of Linen's layers."""
  own: Mapping[str, Any] = module.variables.get("params", {})
  found = nn.meta.unbox(own.get("kernel"))
  return found if isinstance(found, jax.Array | np.ndarray) and found.ndim > 1 else None


def _is_among(params: Any, kernel: jax.Array) -> bool:
  """Tells whether parameters hold a kernel, judged by its dtype and size; for the report alone."""
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
