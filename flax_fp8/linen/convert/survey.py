"""The dry run: traces an unmodified model and lists its contractions in the order of the calls."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import flax.core
import flax.linen as nn
import jax
import numpy as np

from flax_fp8.linen.arguments import fill
from flax_fp8.linen.convert.method import join
from flax_fp8.linen.convert.parameters import (
  CONTRACTED,
  CONVOLUTION,
  LOOKUP,
  Path,
  path_of,
  uses,
)
from flax_fp8.linen.convert.patterns import Layer, Pattern
from flax_fp8.linen.convert.report import Row
from flax_fp8.linen.convert.walk import Walk
from flax_fp8.linen.converted import mark_root
from flax_fp8.linen.intercept import intercept_methods
from flax_fp8.linen.provenance import mark

# For each module path: the class, and the shapes of its own parameters inside its own trace.
Modules = dict[str, tuple[str, dict[str, tuple[int, ...]]]]


def survey(
  module: nn.Module, functions: tuple[Pattern, ...], args: Any, kwargs: Any
) -> tuple[Row, ...]:
  """Initializes a model abstractly and lists its contractions.

  Args:
    module: the unmodified model.
    functions: patterns of modules with contractions that count as layers.
    args: arguments of ``module.init`` after the key; arrays, ShapeDtypeStructs or static values.
    kwargs: keyword arguments of ``module.init``.

  Returns:
    One row for each contraction, in the order of the first calls, without a decision. Then one row
    for each module with matrices that none of these contractions uses.
  """
  visitor = _Survey()
  arguments, treedef = jax.tree.flatten((args, dict(kwargs)))
  is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)
  params = init_shapes(module, args, kwargs).get("params", {})
  outputs: list[tuple[int, ...]] = []

  def run(params: Any, arrays: list[Any]) -> None:
    given = iter(arrays)
    full_args, full_kwargs = treedef.unflatten(next(given) if is_shape(x) else x for x in arguments)
    walk = Walk(visitor, functions, model=type(module).__name__, everything=True)
    with intercept_methods(walk.intercept):
      out = _initialize(module, params, full_args, full_kwargs)
      outputs.extend(map(np.shape, jax.tree.leaves(out)))
      visitor.close()

  used = uses(run, flax.core.unfreeze(params), [x for x in arguments if is_shape(x)])
  leaves = jax.tree_util.tree_leaves_with_path(flax.core.unfreeze(params))
  flat = {path_of(path): leaf for path, leaf in leaves}
  rows = [
    Row(layer, calls=visitor.calls[path], stacked=visitor.stacked(layer, flat))
    for path, layer in visitor.layers.items()
  ]
  if rows:
    widths = {shape[-1] for shape in outputs if shape}
    rows[-1] = dataclasses.replace(rows[-1], is_last=rows[-1].layer.features in widths)
  unused = _unused(visitor.modules, flat, used)
  return (*rows, *(row for row in unused if row.layer.path not in visitor.layers))


def init_shapes(module: nn.Module, args: Any, kwargs: Any) -> Any:
  """Returns the shapes of ``module.init(...)``. Array arguments may be ShapeDtypeStructs."""

  def init() -> Any:
    full_args, full_kwargs = fill((args, kwargs))
    return nn.meta.unbox(module.init(jax.random.key(0), *full_args, **full_kwargs))

  return jax.eval_shape(init)


def _initialize(module: nn.Module, params: Any, args: Any, kwargs: Any) -> Any:
  """Runs a model as ``init`` does, but with given parameters. Returns its output."""
  method = kwargs.pop("method", None) or "__call__"
  for name in ("mutable", "capture_intermediates"):
    kwargs.pop(name, None)

  def call(scope: Any) -> Any:
    mark_root(scope)
    bound = module.clone(parent=scope, _deep_clone=True)
    run = getattr(type(bound), method) if isinstance(method, str) else method
    return run(bound, *args, **kwargs)

  flags = {"initializing": True}
  given, rngs = {"params": params}, {"params": jax.random.key(0)}
  return flax.core.apply(call, mutable=True, flags=flags)(given, rngs=rngs)[0]


class _Survey:
  """The visitor of the dry run: records layers, calls and modules."""

  def __init__(self) -> None:
    self.layers: dict[str, Layer] = {}
    self.calls: Counter[str] = Counter()
    self._by_root: dict[str, Counter[Any]] = defaultdict(Counter)
    self.modules: Modules = {}

  def decide(self, layer: Layer, root: Any) -> None:
    self.layers[layer.path] = layer
    # A lifted transformation may trace its body several times, each time with a new root scope.
    self._by_root[layer.path][root] += 1

  def close(self) -> None:
    """Counts the calls and drops the references to traces."""
    self.calls = Counter({path: max(n.values()) for path, n in self._by_root.items()})
    self._by_root.clear()

  def asked(self, layer: Layer, kernel: jax.Array) -> None:
    mark(("layer", layer.path), kernel)

  def unasked(self, module: str, kernel: jax.Array) -> None:
    mark(("module", module), kernel)

  def leave(self, module: nn.Module) -> None:
    own: dict[str, Any] = dict(module.variables.get("params", {}))
    leaves = {name: nn.meta.unbox(x) for name, x in own.items() if _is_leaf(x)}
    flat = jax.tree_util.tree_leaves_with_path(leaves)
    shapes = {"/".join(path_of(path)): np.shape(leaf) for path, leaf in flat}
    # A lifted transformation leaves the inner trace first. There the shapes lack the lifted axes.
    kind, first = self.modules.get(join(module.path), ("", {}))
    self.modules[join(module.path)] = kind if first else type(module).__name__, shapes | first

  def stacked(self, layer: Layer, params: dict[Path, Any]) -> int:
    """Returns the number of layers stacked by lifted axes, from the shape of a parameter."""
    for path in (layer.path, layer.module.path):
      _, shapes = self.modules.get(path, ("", {}))
      for name, shape in shapes.items():
        whole = params.get((*_split(path), *_split(name)))
        if whole is not None:
          return math.prod(whole.shape) // max(1, math.prod(shape))
    return 1


def _is_leaf(x: Any) -> bool:
  return not isinstance(x, (dict, flax.core.FrozenDict))


def _split(path: str) -> Path:
  return tuple(path.split("/")) if path else ()


def _unused(modules: Modules, params: dict[Path, Any], used: Any) -> Iterator[Row]:
  """Yields a row for each module with matrices that no layer uses."""
  converted = set[Path]()
  by: dict[Path, str] = {}
  for key, paths in used.items():
    if key in (CONTRACTED, CONVOLUTION, LOOKUP):
      continue
    kind, name = key
    if kind == "layer":
      converted |= paths
    else:
      by |= dict.fromkeys(paths, name)
  left: dict[str, dict[Path, tuple[int, ...]]] = {path: {} for path in modules}
  for path, leaf in params.items():
    # A parameter may be a tree of arrays.
    module = next(p for n in range(len(path) - 1, -1, -1) if (p := join(path[:n])) in modules)
    _, shapes = modules[module]
    name = "/".join(path[len(_split(module)) :])
    shape: Any = shapes.get(name, leaf.shape)
    if len(shape) > 1 and path not in converted:
      left[module][path] = shape
  for path, found in left.items():
    if found:
      sizes = [math.prod(shape) for shape in found.values()]
      features = next(iter(found.values()))[-1] if len(found) == 1 else 1
      layer = Layer(
        path=path,
        kind=modules[path][0],
        inputs=0,
        contracted=sum(sizes) // features,
        features=features,
        refusal=_reason(list(found), by, used),
      )
      yield Row(layer, stacked=params[next(iter(found))].size // sizes[0], contracts=False)


def _reason(params: list[Path], by: dict[Path, str], used: Any) -> str:
  callers = dict.fromkeys(by[param] for param in params if param in by)
  if callers:
    shown = repr(next(iter(callers))) if len(callers) == 1 else repr(tuple(callers))
    return f"not a linear layer; to convert it, pass functions={shown}"
  for kind in (CONVOLUTION, CONTRACTED, LOOKUP):
    if used.get(kind, set()) & set(params):
      return kind
  return "not contracted"
