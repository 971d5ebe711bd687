"""Which variable is it that a module reads? Read from the traced program, never guessed.

A value is a variable if the program does nothing to it but slice it as a scan does, map it as a
vmap does, transpose it as both do for an axis that is not the first, and cast it. All else makes it
a value of its own.
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

# The name under which ``origins`` reports variables that the program reads otherwise.
READ = "read"


@dataclasses.dataclass(frozen=True)
class Level:
  """One scan or vmap that lifts one of several marked values.

  Attributes:
    depth: how many others of its kind are around it; of vmaps, within it. In what ``origins``
      returns, scans that lift none of the values are not counted.
    is_scan: whether it is a scan.
  """

  depth: int
  is_scan: bool


@dataclasses.dataclass(frozen=True)
class Origin:
  """The variable that a value is.

  Attributes:
    path: of the variable, its collection first.
    axes: for each axis of the value, the axis of the variable.
    lifted: axes of the variable that were scanned or mapped over, each with what does it.
    casts: how many casts it went through.
  """

  path: Path
  axes: tuple[int, ...]
  lifted: tuple[tuple[Level, int], ...] = ()
  casts: int = 0

  @property
  def order(self) -> tuple[int, ...]:
    """The permutation that makes the value's axes of the variable's that are not lifted."""
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
  """Marks values with the name under which ``origins`` reports them together."""
  _mark.bind(*values, name=name, mapped=())


# It has no results: nothing to differentiate, nothing that a vmap stacks.
_mark: Any = jax.extend.core.Primitive("mark")
_mark.multiple_results = True
_mark.def_impl(lambda *_, **__: [])
_mark.def_abstract_eval(lambda *_, **__: [])
mlir.register_lowering(_mark, lambda *_, **__: [])
ad.primitive_jvps[_mark] = lambda primals, _, **params: (_mark.bind(*primals, **params), [])


def _batch(args: Any, axes: Any, *, name: Hashable, mapped: tuple[Any, ...]) -> tuple[Any, Any]:
  """Notes which values are mapped, the outermost vmap first."""
  pairs = zip(args, axes, strict=True)
  values = [x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in pairs]
  is_mapped = tuple(axis is not None for axis in axes)
  return _mark.bind(*values, name=name, mapped=(is_mapped, *mapped)), []


batching.primitive_batchers[_mark] = _batch


def origins(fun: Callable[[Any], Any], variables: Any) -> Found:
  """Traces a function, and finds the variables that marked values are.

  Args:
    fun: takes variables; calls ``mark``.
    variables: variables dict; arrays or ShapeDtypeStructs.

  Returns:
    By name, what the values are in each call of ``mark``: the variables, or None for one that is
    none. By ``READ``, each variable that something else reads.
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
  """Returns the keys of a leaf; a box around it has only fields."""
  keys = (getattr(entry, "key", getattr(entry, "idx", None)) for entry in path)
  return tuple(key for key in keys if key is not None)


def _walk(
  jaxpr: Any, inputs: Sequence[Origin | None], found: Found, scans: int
) -> list[Origin | None]:
  """Follows variables through a program inside of some scans; returns what its results are."""
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
  """Notes the variables that an equation reads."""
  found.setdefault(READ, set()).update((origin,) for origin in given if origin)


def _unmapped(given: Sequence[Origin | None], mapped: Sequence[Sequence[bool]]) -> Origins:
  """Returns the origins of what one instance of a mapped function marked."""
  origins = list(given)
  for outer, is_mapped in enumerate(mapped):
    level = Level(len(mapped) - 1 - outer, is_scan=False)
    pairs = zip(origins, is_mapped, strict=True)
    origins = [origin.sliced(level) if origin and each else origin for origin, each in pairs]
  return tuple(origins)


def _numbered(values: Origins) -> Origins:
  """Counts the scans that lift values, and no others: a loop may stand around a whole model."""
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
  """Yields the programs among the parameters of an equation."""
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      inner = getattr(item, "jaxpr", item)
      if hasattr(inner, "eqns"):
        yield inner
