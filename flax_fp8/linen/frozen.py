"""The conversion that serves a frozen model: its contractions read kernels in FP8.

The parameters that these kernels were are gone. The model finds NaN there, which no contraction
reads; whatever else does is seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Mapping
from typing import Any, TypeAlias

import flax.core
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from flax_fp8.linen.contractions import Call, FP8Contraction
from flax_fp8.linen.converted import Run
from flax_fp8.linen.provenance import mark, origins
from flax_fp8.ops import check
from flax_fp8.ops.frozen import contract_as_is, contract_frozen, quantize_kernel
from flax_fp8.ops.plan import Plan
from flax_fp8.quantize import QTensor
from flax_fp8.recipes.base import GemmKind, Recipe, Role, StatefulRecipe, TensorState

FP8_FROZEN = "fp8_frozen"

Path: TypeAlias = tuple[str, ...]
Flat: TypeAlias = dict[Path, Any]


@dataclasses.dataclass(frozen=True)
class FrozenLayer:
  """One contraction of a frozen model.

  Attributes:
    path: of the module that contracts.
    plan: of the contraction.
    dtype: in which the kernel is multiplied, but for FP8.
    reduction: einsum equation for what precedes the contraction of a kernel, if anything.
    parameter: path of the kernel among the parameters; None where the kernel is no parameter as it
      is stored, and so is quantized in each run.
    shape: of the parameter.
    parameter_dtype: of the parameter.
    stacked: leading axes of it that lifted transformations made.
  """

  path: Path
  plan: Plan
  dtype: Any
  reduction: str | None = None
  parameter: Path | None = None
  shape: tuple[int, ...] = ()
  parameter_dtype: Any = None
  stacked: int = 0

  @property
  def recipe(self) -> Recipe:
    """How its operands are scaled in training."""
    return self.plan.recipe

  @property
  def stored(self) -> bool:
    """Tells whether the kernel is stored in FP8."""
    return self.parameter is not None


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
    if run.method != "bind":
      _check_kernels(layers, run)

    def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
      if not isinstance(context.module, FP8Contraction) or context.method_name != "__call__":
        return next_fun(*args, **kwargs)
      return _serve(context.module, layers, Call.of(context.module, args, kwargs))

    with nn.intercept_methods(intercept):
      yield


def _check_kernels(layers: Mapping[Path, FrozenLayer], run: Run) -> None:
  """Raises ValueError where a run multiplies by something else than the parameters that are frozen.

  It traces the model another time, for which contractions give zeros.
  """

  def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    module: Any = context.module
    if not isinstance(context.module, FP8Contraction) or context.method_name != "__call__":
      return next_fun(*args, **kwargs)
    call, layer = Call.of(module, args, kwargs), layers.get(module.path)
    mark(call.rhs, module.path)
    if layer is not None and layer.stored and not call.takes_kernel_as(layer):
      _refuse_kernel(module.path)
    return call.finish(jnp.zeros(call.plan.fprop.gemm.shape, call.plan.fprop.dtype))

  def apply(variables: Any) -> Any:
    how = {"rngs": run.rngs, "method": run.method, "mutable": flax.core.DenyList("params")}
    return run.module.apply(variables, *run.args, **how, **run.kwargs)

  with nn.intercept_methods(intercept):
    found = origins(apply, run.variables)
  for path, origin in found.items():
    layer = layers.get(path)
    if layer is None or not layer.stored:
      continue
    if origin is None or (origin.path, origin.stacked) != (layer.parameter, layer.stacked):
      _refuse_kernel(path)


def _refuse_kernel(path: Path) -> None:
  raise ValueError(
    "freeze_for_inference: a frozen model multiplies by the parameters that it did when it was "
    f"frozen; got another kernel at {'/'.join(path)!r}. Freeze it with the arguments, flags and "
    "method that it is served with."
  )


def _serve(module: Any, layers: Mapping[Path, FrozenLayer], call: Call) -> jax.Array:
  """Contracts an input with a frozen kernel."""
  check.device("freeze_for_inference", module.recipe, getattr(module, "emulate", True))
  if (layer := layers.get(module.path)) is None:
    raise ValueError(
      "freeze_for_inference: a frozen model contracts what it did when it was frozen; got another "
      f"contraction at {'/'.join(module.path)!r}, besides {len(layers)}. Freeze it with arguments "
      "that reach all of the model."
    )
  if layer.recipe.is_high_precision(GemmKind.FPROP):
    return call.finish(contract_as_is(call.plan, call.input, call.kernel))
  scope = module.scope.push(FP8_FROZEN, reuse=True)
  leaves = dict(scope.variables().get("params", {}))
  if layer.stored and "kernel" not in leaves:
    raise ValueError(
      f"freeze_for_inference: the frozen model needs the collection {FP8_FROZEN!r}; got variables "
      f"without the kernel of {'/'.join(module.path)!r}. Pass what freeze_for_inference returned."
    )
  plan = dataclasses.replace(call.plan, recipe=frozen_recipe(layer.recipe), calibration=None)
  state = read_roles(plan.recipe, leaves)
  kernel = (
    QTensor(leaves["kernel"], leaves["kernel_scale"])
    if layer.stored
    else quantize_kernel(plan, call.kernel, state)
  )
  return call.finish(contract_frozen(plan, call.input, kernel, state))


def frozen_recipe(recipe: Recipe) -> Recipe:
  """Returns the recipe that serves what another has trained."""
  return recipe.frozen if isinstance(recipe, StatefulRecipe) else recipe


def read_roles(recipe: Recipe, leaves: Mapping[str, jax.Array]) -> dict[str, TensorState]:
  """Groups variables of a module by role; roles of which some are missing are left out."""
  state: dict[str, TensorState] = {}
  for role in Role:
    names = {key: f"{role.value}_{key}" for key in recipe.init_state(role)}
    if set(names.values()) <= leaves.keys():
      state[role.value] = {key: leaves[name] for key, name in names.items()}
  return state
