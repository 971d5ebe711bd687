"""Inference from a model trained in FP8: kernels are stored as FP8, and no scale moves any more.

What a contraction multiplies is known only while the model runs: the dtype that its kernel is cast
to, the axes that it contracts. So freezing runs the model once, abstractly, and writes down each
contraction; then each kernel is quantised, and its parameter is gone. The twin that serves them
gives the model zeros for the parameter, which no contraction reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Generator, Mapping
from typing import Any, TypeAlias

import flax.core
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from flax_fp8.linen.arguments import fill
from flax_fp8.linen.dot_general import Fp8DotGeneral, Fp8Einsum
from flax_fp8.linen.flax_modules import Fp8DirectDotGeneralOp, Fp8DotGeneralBase
from flax_fp8.linen.flax_modules import Fp8Einsum as FlaxFp8Einsum
from flax_fp8.linen.state import OVERWRITE_WITH_GRADIENT
from flax_fp8.linen.twin import Run, make_twin
from flax_fp8.ops import check
from flax_fp8.ops.frozen import Contraction
from flax_fp8.quantize import QTensor
from flax_fp8.recipes.base import GemmKind, Recipe, Role, TensorState

FP8_FROZEN = "fp8_frozen"

Path: TypeAlias = tuple[str, ...]

_CONTRACTIONS = (Fp8DotGeneral, Fp8Einsum, Fp8DirectDotGeneralOp, FlaxFp8Einsum)
_LAYERS = (nn.Dense, nn.DenseGeneral, nn.Einsum)


@dataclasses.dataclass(frozen=True)
class FrozenLayer:
  """One contraction of a frozen model.

  Attributes:
    path: of the module that contracts.
    contraction: what it contracts.
    recipe: how its operands are scaled.
    input_shape: of one input.
    dtype: in which the kernel is multiplied, but for FP8.
    parameter: path of the kernel among the parameters; None where the kernel is no parameter as it
      is stored, and so is quantised in each run.
    shape: of the parameter.
    parameter_dtype: of the parameter.
    stacked: leading axes of it that lifted transformations made.
  """

  path: Path
  contraction: Contraction
  recipe: Recipe
  input_shape: tuple[int, ...]
  dtype: Any
  parameter: Path | None
  shape: tuple[int, ...] = ()
  parameter_dtype: Any = None
  stacked: int = 0

  @property
  def stored(self) -> bool:
    """Tells whether the kernel is stored in FP8."""
    return self.parameter is not None


def freeze_for_inference(
  module: nn.Module, variables: Any, *init_args: Any, **init_kwargs: Any
) -> tuple[nn.Module, dict[str, Any]]:
  """Makes a model and variables for inference: FP8 kernels, static scales, no FP8 state.

  Per contraction, with the scales that the next step of training would use::

      fp8_frozen = {"kernel": quantize(kernel.astype(dtype)), "kernel_scale": ..., "input_...": ...}

  Args:
    module: the FP8 model: a twin of ``fp8_linear_layers``, or one with ``Fp8DotGeneral`` and
      ``Fp8Einsum`` in it.
    variables: its variables, trained or calibrated; arrays, or ShapeDtypeStructs to learn the
      shapes that a checkpoint of the result has.
    *init_args: what ``module.init`` takes after the PRNG key; arrays or ShapeDtypeStructs.
    **init_kwargs: the same by keyword.

  Returns:
    The serving module, called as ``module``; and its variables: ``params`` without the kernels, the
    collection ``fp8_frozen``, and every other collection as it was. A kernel stays a parameter, and
    is quantised in each run, where it is not multiplied as it is stored but made of parameters; or
    where the recipe has its forward GEMM in high precision.

  Raises:
    TypeError: ``module`` is no Linen module.
    ValueError: ``variables`` is no variables dict, or lacks FP8 state; the model contracts nothing
      in FP8; a tensor under ``first_step="current"`` was never seen.

  Numerics:
    Outputs are those of ``module.apply(variables, ...)``, bit for bit under jit. Recipes without
    state scale inputs by themselves, as in training.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> layer = nn.Dense(32, dot_general_cls=fp8.Fp8DotGeneral)
    >>> x = jnp.ones((4, 16))
    >>> variables = layer.init(jax.random.key(0), x)
    >>> served, frozen = fp8.freeze_for_inference(layer, variables, x)
    >>> frozen["fp8_frozen"]["Fp8DotGeneral_0"]["kernel"].dtype
    dtype(float8_e4m3fn)
    >>> bool((served.apply(frozen, x) == layer.apply(variables, x)).all())
    True

  References:
    Micikevicius et al., FP8 Formats for Deep Learning, https://arxiv.org/abs/2209.05433, section 5.
  """
  _check_arguments(module, variables)
  layers = _survey(module, variables, init_args, init_kwargs)
  freeze = functools.partial(_freeze, layers=layers)
  abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(variables))
  made = jax.eval_shape(freeze, variables) if abstract else jax.jit(freeze)(variables)
  rest = {name: value for name, value in variables.items() if name != OVERWRITE_WITH_GRADIENT}
  return make_twin(module, Frozen(layers)), {**rest, **made}


def _check_arguments(module: Any, variables: Any) -> None:
  if not isinstance(module, nn.Module):
    raise TypeError(
      f"freeze_for_inference: module must be an instance of a Linen module; got {module!r}. Pass "
      "the model that was trained."
    )
  if not isinstance(variables, Mapping) or "params" not in variables:
    raise ValueError(
      "freeze_for_inference: variables must be a variables dict with the collection 'params'; got "
      f"{sorted(variables) if isinstance(variables, Mapping) else type(variables)}. Pass the "
      "variables of the FP8 model, as of TrainState.params."
    )


def _survey(module: nn.Module, variables: Any, args: Any, kwargs: Any) -> tuple[FrozenLayer, ...]:
  """Runs a model abstractly, and writes down what it contracts in FP8."""
  found: dict[Path, FrozenLayer] = {}
  params = flax.traverse_util.flatten_dict(nn.meta.unbox(variables["params"]))

  def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    if isinstance(context.module, _CONTRACTIONS) and context.method_name == "__call__":
      call = _Call.of(context.module, args, kwargs)
      found[context.module.path] = _describe(context.module, call, params)
    return next_fun(*args, **kwargs)

  def run(variables: Any) -> Any:
    full_args, full_kwargs = fill((args, kwargs))
    kept = flax.core.DenyList(("params", OVERWRITE_WITH_GRADIENT))
    return module.apply(variables, *full_args, mutable=kept, **full_kwargs)

  with nn.intercept_methods(intercept):
    jax.eval_shape(run, variables)
  if not found:
    raise ValueError(
      "freeze_for_inference: the model must contract something in FP8; got none in "
      f"{type(module).__name__}. Convert it with fp8_linear_layers, and train or calibrate it."
    )
  return tuple(found.values())


def _describe(module: Any, call: _Call, params: Mapping[Path, Any]) -> FrozenLayer:
  """Describes a contraction, and finds the parameter that is its kernel."""
  name = _parameter_name(module, call.rhs)
  path = None if name is None else (*module.path[:-1], name)
  param = None if path is None else params.get(path)
  shape: tuple[int, ...] = () if param is None else param.shape
  stacked = len(shape) - call.rhs.ndim
  fits = param is not None and stacked >= 0 and shape[stacked:] == call.rhs.shape
  is_fp8 = not module.recipe.is_high_precision(GemmKind.FPROP)
  layer = FrozenLayer(
    path=module.path,
    contraction=call.contraction,
    recipe=module.recipe,
    input_shape=call.lhs.shape,
    dtype=call.rhs.dtype,
    parameter=None,
  )
  if not (fits and is_fp8):
    return layer
  dtype = getattr(param, "dtype", None)
  return dataclasses.replace(
    layer, parameter=path, shape=shape, parameter_dtype=dtype, stacked=stacked
  )


def _parameter_name(module: Any, kernel: jax.Array) -> str | None:
  """Names the parameter of the parent that a kernel is: a layer's own, or the very same array."""
  if isinstance(module.parent, _LAYERS):
    return "kernel"
  parent = module.scope.parent
  own = {} if parent is None else parent.variables().get("params", {})
  return next((name for name, value in own.items() if nn.meta.unbox(value) is kernel), None)


@dataclasses.dataclass(frozen=True)
class _Call:
  """One call of a module that contracts, the same for both kinds of them."""

  lhs: jax.Array
  rhs: jax.Array
  contraction: Contraction
  dtype: Any

  @classmethod
  def of(cls, module: Any, args: Any, kwargs: Any) -> _Call:
    """Reads the arguments of a call."""
    signature = inspect.signature(type(module).__call__).bind(module, *args, **kwargs)
    given = signature.arguments
    lhs, rhs = jnp.asarray(given["lhs"]), jnp.asarray(given["rhs"])
    equation = given.get("equation", given.get("eqn"))
    contraction = (
      Contraction.of_dot_general(lhs, rhs, given["dimension_numbers"])
      if equation is None
      else Contraction.of_einsum(lhs, rhs, equation)
    )
    preferred = given.get("preferred_element_type")
    if isinstance(module, Fp8DotGeneralBase):
      preferred = preferred or rhs.dtype
    dtype = check.result_dtype(type(module).__name__, lhs, rhs, preferred)
    return cls(lhs, rhs, contraction, dtype)


def _freeze(variables: Any, *, layers: tuple[FrozenLayer, ...]) -> dict[str, Any]:
  """Quantises the kernels, and keeps of the state what forward passes need."""
  params = flax.traverse_util.flatten_dict(nn.meta.unbox(variables["params"]))
  state = flax.traverse_util.flatten_dict(variables.get(OVERWRITE_WITH_GRADIENT, {}))
  made: dict[Path, Any] = {}
  for layer in layers:
    kernel = params.get(layer.parameter) if layer.stored else None
    of_layer = {path[-1]: leaf for path, leaf in state.items() if path[:-1] == layer.path}
    leaves = _freeze_layer(layer, kernel, of_layer)
    made |= {(*layer.path, name): leaf for name, leaf in leaves.items()}
  gone = {layer.parameter for layer in layers}
  kept = {path: leaf for path, leaf in params.items() if path not in gone}
  unflatten = flax.traverse_util.unflatten_dict
  return {"params": unflatten(kept), FP8_FROZEN: unflatten(made)}


def _freeze_layer(
  layer: FrozenLayer, kernel: jax.Array | None, leaves: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
  """Freezes one layer, or as many as are stacked."""
  if layer.recipe.is_high_precision(GemmKind.FPROP):
    return {}

  def freeze(kernel: jax.Array | None, leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    state = read_roles(layer.recipe, leaves)
    roles = (Role.INPUT,) if layer.stored else (Role.INPUT, Role.KERNEL)
    made = {
      f"{role.value}_{key}": leaf
      for role in roles
      for key, leaf in layer.recipe.freeze(state[role.value], role).items()
    }
    if kernel is None:
      return made
    q = layer.contraction.quantize_kernel(
      kernel.astype(layer.dtype), layer.input_shape, recipe=layer.recipe, state=state
    )
    return {"kernel": q.data, "kernel_scale": q.scale, **made}

  stacked = leaves and next(iter(leaves.values())).ndim - 1
  for _ in range(max(layer.stacked, stacked or 0)):
    freeze = jax.vmap(freeze)
  return freeze(kernel, leaves)


@dataclasses.dataclass(frozen=True)
class Frozen:
  """Serves a model from frozen variables.

  Attributes:
    layers: its contractions.
  """

  layers: tuple[FrozenLayer, ...]

  def enter(self, variables: Any) -> dict[str, Any]:
    """Puts what is frozen among the parameters, and NaN where a kernel was."""
    given = dict(variables)
    frozen = flax.traverse_util.flatten_dict(given.pop(FP8_FROZEN, {}))
    params = flax.traverse_util.flatten_dict(nn.meta.unbox(given.get("params", {})))
    # No contraction reads them. Whatever else does is seen.
    gone = {
      layer.parameter: jnp.full(layer.shape, jnp.nan, layer.parameter_dtype)
      for layer in self.layers
      if layer.parameter is not None
    }
    inside = {(*path[:-1], FP8_FROZEN, path[-1]): leaf for path, leaf in frozen.items()}
    given["params"] = flax.traverse_util.unflatten_dict({**params, **gone, **inside})
    return given

  def leave(self, variables: Any) -> dict[str, Any]:
    """Takes out of the parameters what ``enter`` put there."""
    given = dict(variables)
    params = flax.traverse_util.flatten_dict(given.get("params", {}))
    gone = {layer.parameter for layer in self.layers}
    kept = {path: x for path, x in params.items() if path not in gone and FP8_FROZEN not in path}
    if "params" in given:
      given["params"] = flax.traverse_util.unflatten_dict(kept)
    return given

  @contextlib.contextmanager
  def during(self, run: Run) -> Generator[None]:
    """Lets contractions read what is frozen."""
    if run.variables is None:
      raise ValueError(
        "freeze_for_inference: a frozen model has no parameters to initialise; got a call of init. "
        "Make its variables with freeze_for_inference(module, variables, *init_args)."
      )
    layers = {layer.path: layer for layer in self.layers}

    def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
      if not isinstance(context.module, _CONTRACTIONS) or context.method_name != "__call__":
        return next_fun(*args, **kwargs)
      return _serve(context.module, layers, _Call.of(context.module, args, kwargs))

    with nn.intercept_methods(intercept):
      yield


def _serve(module: Any, layers: Mapping[Path, FrozenLayer], call: _Call) -> jax.Array:
  """Contracts an input with a frozen kernel."""
  check.device("freeze_for_inference", module.recipe, getattr(module, "emulate", True))
  if (layer := layers.get(module.path)) is None:
    raise ValueError(
      "freeze_for_inference: a frozen model contracts what it did when it was frozen; got another "
      f"contraction at {'/'.join(module.path)!r}, besides {len(layers)}. Freeze it with arguments "
      "that reach all of the model."
    )
  if layer.recipe.is_high_precision(GemmKind.FPROP):
    return call.contraction.contract_as_is(call.lhs, call.rhs, dtype=call.dtype)
  scope = module.scope.push(FP8_FROZEN, reuse=True)
  leaves = dict(scope.variables().get("params", {}))
  if layer.stored and "kernel" not in leaves:
    raise ValueError(
      f"freeze_for_inference: the frozen model needs the collection {FP8_FROZEN!r}; got variables "
      f"without the kernel of {'/'.join(module.path)!r}. Pass what freeze_for_inference returned."
    )
  recipe, state = layer.recipe.frozen, read_roles(layer.recipe.frozen, leaves)
  kernel = (
    QTensor(leaves["kernel"], leaves["kernel_scale"])
    if layer.stored
    else call.contraction.quantize_kernel(call.rhs, call.lhs.shape, recipe=recipe, state=state)
  )
  return call.contraction.contract(
    call.lhs, kernel, call.rhs, recipe=recipe, state=state, dtype=call.dtype
  )


def read_roles(recipe: Recipe, leaves: Mapping[str, jax.Array]) -> dict[str, TensorState]:
  """Groups variables of a module by role; roles of which some are missing are left out."""
  state: dict[str, TensorState] = {}
  for role in Role:
    names = {key: f"{role.value}_{key}" for key in recipe.init_state(role)}
    if set(names.values()) <= leaves.keys():
      state[role.value] = {key: leaves[name] for key, name in names.items()}
  return state
