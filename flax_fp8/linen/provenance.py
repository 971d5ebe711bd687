"""Finds the variable that a module reads, from the traced program.

A value is a variable if the program only slices it (scan), maps it (vmap), transposes it or casts
it. Scans and vmaps transpose a value if the mapped axis is not the first. Any other operation makes
a new value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.interpreters import ad, batching, mlir

from flax_fp8 import _compat

Path: TypeAlias = tuple[str, ...]
Origins: TypeAlias = tuple["Origin | None", ...]
Found: TypeAlias = dict[Hashable, set[Origins]]

# The key under which ``origins`` reports variables that unmarked operations read.
READ = "read"


@dataclasses.dataclass(frozen=True)
class Level:
  """A scan or vmap that slices or maps one of several marked values.

  Attributes:
    depth: for a scan, the number of scans around it. For a vmap, the number of vmaps inside it. The
      results of ``origins`` do not count scans that slice none of the values.
    is_scan: whether this is a scan.
  """

  depth: int
  is_scan: bool


@dataclasses.dataclass(frozen=True)
class Origin:
  """The variable that a value comes from.

  Attributes:
    path: path of the variable, starting with its collection.
    axes: for each axis of the value, the axis of the variable.
    lifted: scanned or mapped axes of the variable, with the scan or vmap.
    casts: number of casts between the variable and the value.
  """

  path: Path
  axes: tuple[int, ...]
  lifted: tuple[tuple[Level, int], ...] = ()
  casts: int = 0

  @property
  def order(self) -> tuple[int, ...]:
    """The permutation from the variable's other axes to the axes of the value."""
    return tuple(sorted(self.axes).index(axis) for axis in self.axes)

  def transposed(self, permutation: Sequence[int]) -> Origin:
    """Returns the origin of a transpose of the value."""
    return dataclasses.replace(self, axes=tuple(self.axes[axis] for axis in permutation))

  def sliced(self, level: Level) -> Origin:
    """Returns the origin of one slice of the value, along its leading axis."""
    first, *rest = self.axes
    return dataclasses.replace(self, axes=tuple(rest), lifted=(*self.lifted, (level, first)))

  def cast(self) -> Origin:
    """Returns the origin of a cast of the value."""
    return dataclasses.replace(self, casts=self.casts + 1)


def mark(name: Hashable, *values: jax.Array) -> None:
  """Marks values. ``origins`` reports them together under this name."""
  _mark.bind(*values, name=name, mapped=())


# The primitive has no results, so there is nothing to differentiate or to stack.
_mark: Any = jax.extend.core.Primitive("mark")
_mark.multiple_results = True
_mark.def_impl(lambda *_, **__: [])
_mark.def_abstract_eval(lambda *_, **__: [])
mlir.register_lowering(_mark, lambda *_, **__: [])
ad.primitive_jvps[_mark] = lambda primals, _, **params: (_mark.bind(*primals, **params), [])


def _batch(args: Any, axes: Any, *, name: Hashable, mapped: tuple[Any, ...]) -> tuple[Any, Any]:
  """Records which values are mapped, outermost vmap first."""
  pairs = zip(args, axes, strict=True)
  values = [x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in pairs]
  is_mapped = tuple(axis is not None for axis in axes)
  return _mark.bind(*values, name=name, mapped=(is_mapped, *mapped)), []


batching.primitive_batchers[_mark] = _batch


def origins(fun: Callable[[Any], Any], variables: Any) -> Found:
  """Traces a function and finds the variables that its marked values come from.

  Args:
    fun: a function of the variables that calls ``mark``.
    variables: variables dict; arrays or ShapeDtypeStructs.

  Returns:
    For each name, the origins of the values in each call of ``mark``. The origin is None for a
    value that is not a variable. The key ``READ`` holds each variable that another operation reads.
  """
  jaxpr = jax.make_jaxpr(fun)(variables).jaxpr
  paths = [_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
  inputs = [
    Origin(path, tuple(range(variable.aval.ndim)))
    for path, variable in zip(paths, jaxpr.invars, strict=True)
  ]
  found: Found = {}
  _read(_walk(jaxpr, inputs, found, 0), found)
  return found


def _names(path: Any) -> Path:
  """Returns the keys in the path of a leaf, without the fields of boxes."""
  keys = (getattr(entry, "key", getattr(entry, "idx", None)) for entry in path)
  return tuple(key for key in keys if key is not None)


def _walk(
  jaxpr: Any, inputs: Sequence[Origin | None], found: Found, scans: int
) -> list[Origin | None]:
  """Follows variables through a program that is inside ``scans`` scans; returns its results."""
  known: dict[Any, Origin | None] = dict(zip(jaxpr.invars, inputs, strict=True))
  look_up = lambda atom: None if isinstance(atom, Literal) else known.get(atom)
  for equation in jaxpr.eqns:
    given = [look_up(atom) for atom in equation.invars]
    results = _step(equation, given, found, scans)
    known.update(zip(equation.outvars, results, strict=False))
  return [look_up(atom) for atom in jaxpr.outvars]


def _step(
  equation: Any, given: list[Origin | None], found: Found, scans: int
) -> list[Origin | None]:
  """Follows variables through one equation."""
  name, params = equation.primitive.name, equation.params
  if name == "mark":
    values = _numbered(_unmapped(given, params["mapped"]))
    found.setdefault(params["name"], set()).add(values)
    return []
  if name in ("copy", "copy_p", "sharding_constraint", "optimization_barrier"):
    return given
  if name == "convert_element_type":
    return [origin and origin.cast() for origin in given]
  if name == "transpose":
    return [origin and origin.transposed(params["permutation"]) for origin in given]
  if name == "scan" and (counts := _compat.scan_counts(params)) is not None:
    constants, carries = counts
    level = Level(scans, is_scan=True)
    slices = [origin and origin.sliced(level) for origin in given[constants + carries :]]
    inputs = [*given[:constants], *[None] * carries, *slices]
    _read(given[constants : constants + carries], found)
    _read(_walk(params["jaxpr"].jaxpr, inputs, found, scans + 1), found)
    return []
  if name == "while":
    skipped, count = params["cond_nconsts"], params["body_nconsts"]
    constants = given[skipped : skipped + count]
    _read([*given[:skipped], *given[skipped + count :]], found)
    body = params["body_jaxpr"].jaxpr
    inputs = [*constants, *[None] * (len(body.invars) - len(constants))]
    _read(_walk(body, inputs, found, scans), found)
    return []
  if name == "cond":
    for branch in params["branches"]:
      _read(_walk(branch.jaxpr, given[1:], found, scans), found)
    return []
  inner = list(subprograms(params))
  if name in _CALLS and len(inner) == 1 and len(inner[0].invars) == len(given):
    return _walk(inner[0], given, found, scans)
  _read(given, found)
  for jaxpr in inner:
    _walk(jaxpr, [None] * len(jaxpr.invars), found, scans)
  return []


def _read(given: Sequence[Origin | None], found: Found) -> None:
  """Records the variables that an equation reads."""
  found.setdefault(READ, set()).update((origin,) for origin in given if origin)


def _unmapped(given: Sequence[Origin | None], mapped: Sequence[Sequence[bool]]) -> Origins:
  """Returns the origins of the values in one instance of a mapped function."""
  origins = list(given)
  for outer, is_mapped in enumerate(mapped):
    level = Level(len(mapped) - 1 - outer, is_scan=False)
    pairs = zip(origins, is_mapped, strict=True)
    origins = [origin.sliced(level) if origin and each else origin for origin, each in pairs]
  return tuple(origins)


def _numbered(values: Origins) -> Origins:
  """Renumbers the scans that slice values. Ignores others, such as a loop around the model."""
  levels = {level for origin in values if origin for level, _ in origin.lifted if level.is_scan}
  depths = sorted(level.depth for level in levels)
  new = {level: Level(depths.index(level.depth), is_scan=True) for level in levels}
  rename = lambda lifted: tuple((new.get(level, level), axis) for level, axis in lifted)
  return tuple(
    origin and dataclasses.replace(origin, lifted=rename(origin.lifted)) for origin in values
  )


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


def subprograms(params: Mapping[str, Any]) -> Iterator[Any]:
  """Yields the programs in the parameters of an equation."""
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      inner = getattr(item, "jaxpr", item)
      if hasattr(inner, "eqns"):
        yield inner
