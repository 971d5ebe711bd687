"""Which parameter is it that a module multiplies? Read from the traced program, never guessed.

A value is a parameter if the program does nothing to it but slice it as a scan does, map it as a
vmap does, and cast it once. All else makes it a value of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.interpreters import ad, batching, mlir

from flax_fp8 import _compat

Path: TypeAlias = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Origin:
  """The parameter that a value is.

  Attributes:
    path: of the parameter.
    stacked: how many of its leading axes were scanned or mapped over.
    is_cast: whether the value is a cast of it.
  """

  path: Path
  stacked: int = 0
  is_cast: bool = False


def mark(x: jax.Array, name: Path) -> jax.Array:
  """Returns a value as it is, marked with the name under which ``origins`` reports it."""
  return _mark.bind(x, name=name, mapped=0)


_mark: Any = jax.extend.core.Primitive("mark")
_mark.def_impl(lambda x, **_: x)
_mark.def_abstract_eval(lambda x, **_: x)
ad.deflinear2(_mark, lambda cotangent, _, **__: [cotangent])
mlir.register_lowering(_mark, lambda context, x, **_: [x])


def _batch(args: Any, axes: Any, *, name: Path, mapped: int) -> tuple[jax.Array, int]:
  return _mark.bind(jnp.moveaxis(args[0], axes[0], 0), name=name, mapped=mapped + 1), 0


batching.primitive_batchers[_mark] = _batch


def origins(fun: Callable[[Any], Any], variables: Any) -> dict[Path, Origin | None]:
  """Traces a function, and finds the parameter that each marked value is.

  Args:
    fun: takes variables; calls ``mark``.
    variables: variables dict; arrays or ShapeDtypeStructs.

  Returns:
    By name, the parameter; None for a value that is none, or not always the same one.
  """
  jaxpr = jax.make_jaxpr(fun)(variables).jaxpr
  paths = [_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
  inputs = [Origin(path[1:]) if path[0] == "params" else None for path in paths]
  found: dict[Path, set[Origin | None]] = {}
  _walk(jaxpr, inputs, found)
  return {name: next(iter(seen)) if len(seen) == 1 else None for name, seen in found.items()}


def _names(path: Any) -> Path:
  """Returns the keys of a leaf; a box around it has only fields."""
  return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))


def _walk(
  jaxpr: Any, inputs: Sequence[Origin | None], found: dict[Path, set[Origin | None]]
) -> list[Origin | None]:
  """Follows parameters through a program; returns what its results are."""
  known: dict[Any, Origin | None] = dict(zip(jaxpr.invars, inputs, strict=True))
  look_up = lambda atom: None if isinstance(atom, Literal) else known.get(atom)
  for equation in jaxpr.eqns:
    given = [look_up(atom) for atom in equation.invars]
    results = _step(equation, given, found)
    known.update(zip(equation.outvars, results, strict=False))
  return [look_up(atom) for atom in jaxpr.outvars]


def _step(
  equation: Any, given: list[Origin | None], found: dict[Path, set[Origin | None]]
) -> list[Origin | None]:
  """Follows parameters through one equation."""
  name, params = equation.primitive.name, equation.params
  if name == "mark":
    origin = given[0]
    if origin is not None and params["mapped"]:
      origin = dataclasses.replace(origin, stacked=origin.stacked + params["mapped"])
    found.setdefault(params["name"], set()).add(origin)
    return [given[0]]
  if name in ("copy", "copy_p", "sharding_constraint", "optimization_barrier"):
    return given
  if name == "convert_element_type":
    origin = given[0]
    if origin is None or origin.is_cast:
      return [None]
    return [dataclasses.replace(origin, is_cast=True)]
  if name == "scan" and (counts := _compat.scan_counts(params)) is not None:
    constants, carries = counts
    slices = [
      None if x is None or x.is_cast else dataclasses.replace(x, stacked=x.stacked + 1)
      for x in given[constants + carries :]
    ]
    _walk(params["jaxpr"].jaxpr, [*given[:constants], *[None] * carries, *slices], found)
    return []
  if name == "while":
    constants = given[params["cond_nconsts"] :][: params["body_nconsts"]]
    body = params["body_jaxpr"].jaxpr
    _walk(body, [*constants, *[None] * (len(body.invars) - len(constants))], found)
    return []
  if name == "cond":
    for branch in params["branches"]:
      _walk(branch.jaxpr, given[1:], found)
    return []
  inner = list(_jaxprs(params))
  if name in _CALLS and len(inner) == 1 and len(inner[0].invars) == len(given):
    return _walk(inner[0], given, found)
  for jaxpr in inner:
    _walk(jaxpr, [None] * len(jaxpr.invars), found)
  return []


_CALLS = frozenset(
  {
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "remat",
    "remat2",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
  }
)


def _jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
  """Yields the programs among the parameters of an equation."""
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      inner = getattr(item, "jaxpr", item)
      if hasattr(inner, "eqns"):
        yield inner
