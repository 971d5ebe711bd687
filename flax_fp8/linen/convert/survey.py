"""A dry run: the layers of an unmodified model in the order of their calls, without arithmetic."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax

from flax_fp8.linen.arguments import fill
from flax_fp8.linen.convert.patterns import Layer, Pattern
from flax_fp8.linen.convert.report import Row
from flax_fp8.linen.convert.walk import Walk, join

Shapes = dict[str, dict[str, tuple[int, ...]]]


def survey(module: nn.Module, own: tuple[Pattern, ...], args: Any, kwargs: Any) -> tuple[Row, ...]:
  """Initialises a model abstractly and writes down its layers.

  Args:
    module: the model, unmodified.
    own: modules whose own calls of JAX's functions count as layers.
    args: what its ``init`` takes after the key; arrays, ShapeDtypeStructs, anything static.
    kwargs: the same by keyword.

  Returns:
    One row a layer, in the order of first calls, without a decision.
  """
  layers: dict[str, Layer] = {}
  calls: dict[str, Counter[Any]] = defaultdict(Counter)
  inner: Shapes = {}

  def record(layer: Layer, root: Any) -> None:
    layers[layer.path] = layer
    calls[layer.path][root] += 1

  def leave(module: nn.Module) -> None:
    inner.setdefault(join(module.path), _own_shapes(module.variables.get("params", {})))

  walk = Walk(record, own, leave=leave)
  with nn.intercept_methods(walk.intercept):
    params = init_shapes(module, args, kwargs).get("params", {})
  # A lifted transformation traces its body more than once, each time with a root scope of its own.
  return tuple(
    Row(layer, calls=max(calls[path].values()), stacked=_stacked(layer, inner, params))
    for path, layer in layers.items()
  )


def init_shapes(module: nn.Module, args: Any, kwargs: Any) -> Any:
  """Shapes of what ``module.init`` makes of arguments, arrays of which may be shapes."""

  def init() -> Any:
    full_args, full_kwargs = fill((args, kwargs))
    return nn.meta.unbox(module.init(jax.random.key(0), *full_args, **full_kwargs))

  return jax.eval_shape(init)


def _own_shapes(params: Any) -> dict[str, tuple[int, ...]]:
  """Shapes of the parameters that a module holds itself, not in a submodule."""
  own: dict[str, Any] = {name: nn.meta.unbox(leaf) for name, leaf in params.items()}
  return {name: leaf.shape for name, leaf in own.items() if hasattr(leaf, "shape")}


def _stacked(layer: Layer, inner: Shapes, params: Any) -> int:
  """Counts the layers that one call stands for: what lifted axes add to a parameter's shape."""
  names = layer.path.split("/")
  flat: dict[str, Any] = flax.traverse_util.flatten_dict(params, sep="/")
  for path in ("/".join(names), "/".join(names[:-1])):
    for name, shape in inner.get(path, {}).items():
      whole = flat.get(f"{path}/{name}".lstrip("/"))
      if whole is not None:
        return math.prod(whole.shape) // max(1, math.prod(shape))
  return 1
