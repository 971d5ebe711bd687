"""Finds how a model uses its parameters, from the traced program.

A value derives from parameters if it depends on parameters and constants only. Examples are a cast
or transposed kernel, and the sum of two kernels. Values that depend on the model's input do not.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import jax
from jax.extend.core import Literal

from flax_fp8 import _compat
from flax_fp8.linen.provenance import subprograms

Path: TypeAlias = tuple[str, ...]
# The parameters that a value derives from. None if it depends on anything else.
Sources: TypeAlias = frozenset[Path] | None

CONVOLUTION, LOOKUP = "convolution", "lookup"
CONTRACTED = "contracted by lax.ragged_dot or in a custom_jvp or custom_vjp function"


def uses(fun: Callable[..., Any], params: Any, arrays: Any) -> dict[Hashable, set[Path]]:
  """Traces a function and finds the parameters from which each marked value derives.

  Args:
    fun: a function of parameters and arrays that marks values with ``provenance.mark``.
    params: nested dict of ShapeDtypeStructs.
    arrays: pytree of the other arguments, as ShapeDtypeStructs.

  Returns:
    Paths of parameters by mark. The keys ``CONVOLUTION``, ``LOOKUP`` and ``CONTRACTED`` hold the
    parameters that convolutions, lookups and any contractions use.
  """
  jaxpr = jax.make_jaxpr(fun)(params, arrays).jaxpr
  leaves = jax.tree_util.tree_leaves_with_path(params)
  made = [frozenset({path_of(path)}) for path, _ in leaves]
  inputs = [*made, *(None for _ in jax.tree.leaves(arrays))]
  found: dict[Hashable, set[Path]] = {}
  _walk(jaxpr, inputs, found)
  return found


def path_of(path: Any) -> Path:
  """Converts the path of a leaf to names. A parameter may be a dict or a list of arrays."""
  return tuple(str(getattr(entry, "key", getattr(entry, "idx", entry))) for entry in path)


def _walk(jaxpr: Any, inputs: Sequence[Sources], found: dict[Hashable, set[Path]]) -> list[Sources]:
  known: dict[Any, Sources] = dict(zip(jaxpr.invars, inputs, strict=True))
  of = lambda atom: frozenset() if isinstance(atom, Literal) else known.get(atom)
  for equation in jaxpr.eqns:
    given = [of(atom) for atom in equation.invars]
    _note(equation, given, found)
    known.update(zip(equation.outvars, _results(equation, given, found), strict=True))
  return [of(atom) for atom in jaxpr.outvars]


def _note(equation: Any, given: Sequence[Sources], found: dict[Hashable, set[Path]]) -> None:
  name = equation.primitive.name
  where = {"mark": (equation.params.get("name"), 0)}
  where |= {"conv_general_dilated": (CONVOLUTION, 1), "gather": (LOOKUP, 0)}
  if name in where:
    key, operand = where[name]
    found.setdefault(key, set()).update(given[operand] or ())
  if name in ("dot_general", "ragged_dot_general", "ragged_dot"):
    found.setdefault(CONTRACTED, set()).update(*(made or () for made in given[:2]))


def _results(
  equation: Any, given: Sequence[Sources], found: dict[Hashable, set[Path]]
) -> Sequence[Sources]:
  name, params, count = equation.primitive.name, equation.params, len(equation.outvars)
  inputs = list(given)
  if name == "scan" and (counts := _compat.scan_counts(params)) is not None:
    constants, carries = counts
    inputs[constants : constants + carries] = [None] * carries
  if name == "while":
    skipped = params["cond_nconsts"]
    constants = params["body_nconsts"]
    inputs = [*given[skipped:][:constants], *[None] * (len(given) - skipped - constants)]
  if name == "cond":
    inputs = inputs[1:]
  results: list[list[Sources]] = []
  for inner in subprograms(params):
    fits = len(inner.invars) == len(inputs)
    results.append(_walk(inner, inputs if fits else [None] * len(inner.invars), found))
  if results:
    same = len(results[0]) == count and name not in ("while", "cond")
    return results[0] if same else [None] * count
  made = None if None in given else frozenset().union(*(each or () for each in given))
  return [made] * count
