"""Walks through a model as it runs, and has someone decide about each contraction with a kernel.

An interceptor of Linen sees each method of each module. Before a Dense or DenseGeneral runs it gets
the ``dot_general_cls`` of its recipe; while a module runs whose own contractions are meant, JAX's
functions are handed to one that runs them in FP8. Modules get their old attributes back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from flax_fp8.contraction import plan_einsum
from flax_fp8.linen.convert import functions
from flax_fp8.linen.convert.patterns import Layer, Pattern, at, first_match
from flax_fp8.linen.dot_general import Fp8DotGeneral, Fp8Einsum
from flax_fp8.ops.check import COMPUTE_DTYPES
from flax_fp8.recipes.base import Recipe

# Given a contraction and the root scope of the trace that it is in.
Decide: TypeAlias = Callable[[Layer, Any], Recipe | None]


class Walk:
  """One walk through a model; ``intercept`` is for ``nn.intercept_methods``."""

  def __init__(
    self,
    decide: Decide,
    own: tuple[Pattern, ...],
    *,
    emulate: bool = False,
    leave: Callable[[nn.Module], None] = lambda module: None,
  ) -> None:
    """Prepares a walk.

    Args:
      decide: is asked about each contraction; the recipe to run it in, or None to let it be.
      own: modules whose own calls of JAX's functions are contractions to decide about.
      emulate: as for ``Fp8DotGeneral``.
      leave: is called with each module when one of its methods is through.
    """
    self.decide, self.own, self.emulate, self.leave = decide, own, emulate, leave
    self.contracted = 0

  def intercept(self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Runs one method of one module."""
    module = context.module
    if module.scope is None or context.method_name == "setup":
      return next_fun(*args, **kwargs)
    if isinstance(module, Fp8DotGeneral | Fp8Einsum):
      self.contracted += 1
    if isinstance(module, nn.Dense | nn.DenseGeneral) and context.method_name == "__call__":
      inputs = kwargs["inputs"] if "inputs" in kwargs else args[0]
      with functions.handed_to(None), self._converted(module, jnp.asarray(inputs)):
        out = next_fun(*args, **kwargs)
    else:
      with functions.handed_to(self._handler(module)):
        out = next_fun(*args, **kwargs)
    self.leave(module)
    return out

  @contextmanager
  def _converted(self, module: nn.Dense | nn.DenseGeneral, inputs: jax.Array) -> Generator[None]:
    """Gives a layer the ``dot_general_cls`` of its recipe while it runs."""
    assert module.scope is not None
    recipe = self.decide(_describe(module, inputs), module.scope.root)
    if recipe is None:
      yield
      return
    contracted = self.contracted
    made_by = functools.partial(
      Fp8DotGeneral, recipe=recipe, emulate=self.emulate, out_sharding=_out_sharding(module)
    )
    object.__setattr__(module, "dot_general_cls", made_by)
    try:
      yield
    finally:
      object.__setattr__(module, "dot_general_cls", None)
    if self.contracted == contracted:
      raise ValueError(
        f"fp8_linear_layers: a layer to convert must contract with its dot_general_cls; got "
        f"{type(module).__name__} at {join(module.path)!r}, whose __call__ did not. Exclude it, or "
        "name it in functions if it calls jnp.einsum or lax.dot_general."
      )

  def _handler(self, module: nn.Module) -> functions.Handler | None:
    """Returns who contracts for a module; one and the same while its methods call each other."""
    running = functions.current()
    if isinstance(running, _OwnContractions) and running.module is module:
      return running
    named = first_match(self.own, at(join(module.path))) is not None
    if isinstance(module, nn.Einsum) or named:
      return _OwnContractions(self, module)
    return None


class _OwnContractions:
  """Contracts for one module, in the order of its calls: ``Fp8Einsum_0``, ``Fp8Einsum_1``..."""

  def __init__(self, walk: Walk, module: nn.Module) -> None:
    self.walk, self.module = walk, module
    self.calls: dict[str, int] = {}

  def einsum(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    equation, *operands = args
    if not isinstance(equation, str) or len(operands) != 2:
      return original(*args, **kwargs)
    lhs, rhs = map(jnp.asarray, operands)
    sizes = lambda: _einsum_sizes(equation, lhs, rhs)
    module = self._module(Fp8Einsum, "jnp.einsum", lhs, rhs, sizes, kwargs)
    if module is None:
      return original(*args, **kwargs)
    return module(equation, lhs, rhs, **kwargs)

  def dot_general(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    names = ("lhs", "rhs", "dimension_numbers", "precision", "preferred_element_type")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    lhs, rhs = (jnp.asarray(given.pop(name)) for name in ("lhs", "rhs"))
    numbers = given.pop("dimension_numbers")
    sizes = lambda: _sizes(rhs.shape, numbers[0][1], numbers[1][1])
    module = self._module(Fp8DotGeneral, "lax.dot_general", lhs, rhs, sizes, given)
    if module is None:
      return original(*args, **kwargs)
    return module(lhs, rhs, numbers, **given)

  def _module(
    self,
    cls: type[Fp8DotGeneral | Fp8Einsum],
    kind: str,
    lhs: jax.Array,
    rhs: jax.Array,
    sizes: Callable[[], dict[str, int]],
    options: dict[str, Any],
  ) -> Any:
    """Makes the FP8 module of this call, or None where it is to stay as it is."""
    is_layer, path = isinstance(self.module, nn.Einsum), join(self.module.path)
    name = f"{cls.__name__}_{self.calls.get(cls.__name__, 0)}"
    self.calls[cls.__name__] = self.calls.get(cls.__name__, 0) + 1
    layer = Layer(
      path=path if is_layer else f"{path}/{name}".lstrip("/"),
      kind="Einsum" if is_layer else kind,
      inputs=lhs.size,
      itemsize=jnp.promote_types(lhs.dtype, rhs.dtype).itemsize,
      stored=_is_among(self.module.variables.get("params", {}), rhs),
      refusal=_refuse(options.get("precision"), lhs.dtype, rhs.dtype),
      **sizes(),
    )
    scope: Any = self.module.scope
    if (recipe := self.walk.decide(layer, scope.root)) is None:
      return None
    left = {key: value for key, value in options.items() if value is not None}
    if unknown := sorted(left.keys() - {"precision", "preferred_element_type", "out_sharding"}):
      raise ValueError(
        f"fp8_linear_layers: {kind} in FP8 takes no {', '.join(unknown)}; got a call at {path!r}. "
        f"Exclude {layer.path!r}, or leave the argument out."
      )
    for key in options.keys() - left.keys():
      del options[key]
    return cls(recipe=recipe, emulate=self.walk.emulate, parent=scope.push(name, reuse=True))


def _is_among(params: Any, kernel: jax.Array) -> bool:
  """Tells whether parameters hold a kernel, judged by its dtype and size."""
  leaves = jax.tree.leaves(params)
  return any(leaf.dtype == kernel.dtype and leaf.size == kernel.size for leaf in leaves)


def join(path: tuple[str, ...]) -> str:
  """Writes the path of a module as patterns see it."""
  return "/".join(path)


def _describe(module: nn.Dense | nn.DenseGeneral, inputs: jax.Array) -> Layer:
  """Describes a layer from its fields and its input, before its kernel is there."""
  axis, batch_dims, features = -1, (), module.features
  if isinstance(module, nn.DenseGeneral):
    axis, batch_dims = module.axis, module.batch_dims
  dtype = module.dtype or jnp.promote_types(inputs.dtype, module.param_dtype)
  sizes = [math.prod(inputs.shape[a] for a in _tuple(axes)) for axes in (axis, batch_dims)]
  return Layer(
    path=join(module.path),
    kind=type(module).__name__,
    inputs=inputs.size,
    contracted=sizes[0],
    features=math.prod(_tuple(features)),
    batch=sizes[1],
    itemsize=jnp.dtype(dtype).itemsize,
    stored=jnp.dtype(dtype) == module.param_dtype,
    refusal=_own_dot_general(module) or _refuse(module.precision, jnp.dtype(dtype)),
  )


def _own_dot_general(module: nn.Dense | nn.DenseGeneral) -> str:
  names = ("dot_general_cls", "dot_general")
  if _out_sharding(module) is not None:  # JAX's own, told how to shard: ours is told the same
    names = names[:1]
  return next((f"has its own {n}" for n in names if getattr(module, n) is not None), "")


def _out_sharding(module: nn.Dense | nn.DenseGeneral) -> Any:
  """Returns what ``partial(lax.dot_general, out_sharding=...)`` holds, if a layer has that."""
  held: Any = module.dot_general
  plain = isinstance(held, functools.partial) and held.func is lax.dot_general and not held.args
  return held.keywords["out_sharding"] if plain and {*held.keywords} == {"out_sharding"} else None


def _refuse(precision: Any, *dtypes: Any) -> str:
  if precision not in (None, lax.Precision.DEFAULT):
    return f"has precision {precision}"
  unfit = [dtype.name for dtype in dtypes if dtype.name not in COMPUTE_DTYPES]
  return f"computes in {unfit[0]}" if unfit else ""


def _einsum_sizes(equation: str, lhs: jax.Array, rhs: jax.Array) -> dict[str, int]:
  plan = plan_einsum(equation, lhs.shape, rhs.shape)
  kernel = jax.eval_shape(functools.partial(jnp.einsum, plan.rhs_reduction), rhs)
  side = 0 if plan.swap else 1
  (contract, batch) = (axes[side] for axes in plan.dimension_numbers)
  return _sizes(kernel.shape, contract, batch)


def _sizes(shape: tuple[int, ...], contract: Any, batch: Any) -> dict[str, int]:
  sizes = [math.prod(shape[int(axis)] for axis in axes) for axes in (contract, batch)]
  paired = {int(axis) for axis in (*contract, *batch)}
  features = math.prod(size for axis, size in enumerate(shape) if axis not in paired)
  return {"contracted": sizes[0], "batch": sizes[1], "features": features}


def _tuple(x: Any) -> tuple[int, ...]:
  return tuple(x) if isinstance(x, (tuple, list)) else (x,)
