"""The conversion that serves a frozen model: contractions read kernels in FP8.

The model finds NaN in place of the removed parameters. No contraction reads them, and any other
use shows up as NaN. While the model runs, the FP8 kernels are stored in ``params`` beside the
modules that contract, and the scales in place of the state. So lifted transformations slice them
like the original variables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Generator, Mapping
from typing import Any, TypeAlias

import flax.core
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from flax_fp8.linen.containers import plain
from flax_fp8.linen.contractions import Call, FP8Contraction
from flax_fp8.linen.converted import OwnModules, Run, make_converted, take_in
from flax_fp8.linen.intercept import intercept_methods
from flax_fp8.linen.provenance import Level, Origin, mark, origins
from flax_fp8.linen.state import OVERWRITE_WITH_GRADIENT, find_state
from flax_fp8.meta_dtype import to_float32
from flax_fp8.ops import check
from flax_fp8.ops.frozen import contract_as_is, contract_frozen, quantize_kernel
from flax_fp8.ops.plan import Plan
from flax_fp8.quantize import QTensor
from flax_fp8.recipes.base import GemmKind, Recipe, Role, StatefulRecipe, TensorState
from flax_fp8.recipes.delayed import DelayedScaling

FP8_FROZEN = "fp8_frozen"
_KERNEL = frozenset({"kernel", "kernel_scale"})

Path: TypeAlias = tuple[str, ...]
Flat: TypeAlias = dict[Path, Any]
Lifted: TypeAlias = tuple[tuple[Level, int], ...]


@dataclasses.dataclass(frozen=True)
class FrozenLayer:
  """One contraction of a frozen model.

  Attributes:
    path: path of the module that contracts.
    plan: the plan of the contraction.
    dtype: dtype of the kernel before quantization.
    reduction: einsum equation applied to the kernel before the contraction, if any.
    parameter: path of the kernel's parameter. None if no parameter is stored in FP8 for it, so that
      the kernel is quantized in each run.
    shape: shape of the parameter.
    parameter_dtype: dtype of the parameter.
    lifted: lifted axes of the parameter with their scan or vmap, in order.
    order: permutation from the parameter's other axes to those of the kernel.
    in_params: whether the model stores its state among the parameters.
    is_first_step: whether an input or kernel without a nonzero amax is scaled by its own amax.
    runs_as_is: whether the state is kept, because a nested ``apply`` or ``bind`` reads it too.
  """

  path: Path
  plan: Plan
  dtype: Any
  reduction: str | None = None
  parameter: Path | None = None
  shape: tuple[int, ...] = ()
  parameter_dtype: Any = None
  lifted: Lifted = ()
  order: tuple[int, ...] = ()
  in_params: bool = False
  is_first_step: bool = False
  runs_as_is: bool = False

  @property
  def recipe(self) -> Recipe:
    """The recipe in training."""
    return self.plan.recipe

  @property
  def stored(self) -> bool:
    """Whether the kernel is stored in FP8."""
    return self.parameter is not None

  @property
  def serving_recipe(self) -> Recipe:
    """The recipe that reads frozen state."""
    recipe = self.recipe.frozen if isinstance(self.recipe, StatefulRecipe) else self.recipe
    if isinstance(recipe, DelayedScaling) and not self.is_first_step:
      return dataclasses.replace(recipe, first_step="stored")
    return recipe

  @property
  def lifted_leads(self) -> bool:
    """Whether the lifted axes are the first axes of the parameter."""
    return _axes(self.lifted) == [*range(len(self.lifted))]

  def place(self, leaf: jax.Array) -> jax.Array:
    """Arranges the data or scales of a kernel so that lifted transformations slice them correctly.

    If the lifted axes are not the first axes of the parameter, the user's axis number is correct
    only for an array with the rank of the parameter.

    Args:
      leaf: data or scales with the lifted axes first, in the order of ``lifted``.

    Returns:
      ``leaf`` if ``lifted_leads``. Otherwise a reshape with the parameter's rank and the lifted
      axes in the positions that they have in the parameter.
    """
    if self.lifted_leads:
      return leaf
    count = len(self.lifted)
    rank = len(self.shape) - count
    sizes = (1,) * rank + leaf.shape[count:]
    merged = len(sizes) - rank + 1
    rest = (math.prod(sizes[:merged]), *sizes[merged:])
    leaf = leaf.reshape(*leaf.shape[:count], *rest)
    return jnp.moveaxis(leaf, range(count), _axes(self.lifted))


@dataclasses.dataclass(frozen=True)
class Frozen:
  """Serves a model from frozen variables.

  Attributes:
    layers: the contractions.
  """

  layers: tuple[FrozenLayer, ...]

  def enter(self, variables: Any) -> dict[str, Any]:
    """Moves the frozen leaves among the parameters, and adds NaN for each removed kernel."""
    given = take_in(plain(variables), FP8_FROZEN)
    frozen = flax.traverse_util.flatten_dict(given.pop(FP8_FROZEN, {}))
    params: Flat = flax.traverse_util.flatten_dict(nn.meta.unbox(given.get("params", {})))
    state: Flat = flax.traverse_util.flatten_dict(given.pop(OVERWRITE_WITH_GRADIENT, {}))
    # No contraction reads these values. Any other use returns NaN and is noticed. With
    # jax_debug_nans, even a cast of NaN raises, so the values are large instead.
    config: Any = jax.config
    absent = 2.0**15 if config.jax_debug_nans else jnp.nan
    params |= {
      layer.parameter: jnp.full(layer.shape, absent, layer.parameter_dtype)
      for layer in self.layers
      if layer.parameter is not None
    }
    stored = {layer.path for layer in self.layers if layer.stored}
    in_params = {layer.path for layer in self.layers if layer.in_params}
    for path, leaf in frozen.items():
      *module, name = path
      _refuse_cast(path, leaf)
      if path[:-1] in stored and name in _KERNEL:
        params[*module, FP8_FROZEN, name] = leaf
      elif path[:-1] in in_params:
        params[*module, OVERWRITE_WITH_GRADIENT, name] = leaf
      else:
        state[path] = leaf
    given["params"] = flax.traverse_util.unflatten_dict(params)
    if state:
      given[OVERWRITE_WITH_GRADIENT] = flax.traverse_util.unflatten_dict(state)
    return given

  def leave(self, variables: Any) -> dict[str, Any]:
    """Removes the leaves that ``enter`` added."""
    given = dict(variables)
    own = {layer.path for layer in self.layers if not layer.runs_as_is}
    put = {layer.parameter for layer in self.layers}
    put |= {(*path, key) for path in own for key in (FP8_FROZEN, OVERWRITE_WITH_GRADIENT)}
    if "params" in given:
      params = flax.traverse_util.flatten_dict(given["params"])
      kept = {path: x for path, x in params.items() if path not in put and path[:-1] not in put}
      given["params"] = flax.traverse_util.unflatten_dict(kept)
    state = flax.traverse_util.flatten_dict(given.pop(OVERWRITE_WITH_GRADIENT, {}))
    if kept := {path: x for path, x in state.items() if path[:-1] not in own}:
      given[OVERWRITE_WITH_GRADIENT] = flax.traverse_util.unflatten_dict(kept)
    return given

  def initialized(self, variables: Any) -> dict[str, Any]:
    """Keeps other collections, such as a cache. Only freezing creates frozen variables."""
    gone = ("params", OVERWRITE_WITH_GRADIENT)
    return {name: value for name, value in variables.items() if name not in gone}

  @contextlib.contextmanager
  def during(self, run: Run) -> Generator[None]:
    """Makes contractions read the frozen variables."""
    if run.variables is None:  # in `init`
      yield
      return
    layers = {layer.path: layer for layer in self.layers}
    if run.method != "bind":
      _check_kernels(layers, run)
    own = OwnModules()

    def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
      is_own = own.has(context.module)
      if not is_own or not is_contraction(context):
        return next_fun(*args, **kwargs)
      layer = layers.get(context.module.path)
      if layer is not None and layer.runs_as_is:
        return next_fun(*args, **kwargs)
      return _serve(context.module, layers, Call.of(context.module, args, kwargs))

    with intercept_methods(intercept):
      yield


def _refuse_cast(path: Path, leaf: Any) -> None:
  """Raises TypeError if an FP8 kernel or a scale was cast to another dtype."""
  dtype = jnp.result_type(leaf)
  if dtype.itemsize > 1 and (path[-1] == "kernel" or dtype != jnp.float32):
    raise TypeError(
      f"freeze_for_inference: FP8 kernels must stay FP8, and their scales float32; got "
      f"{'/'.join(path)!r} of dtype {dtype}. Pass the variables that freeze_for_inference "
      f"returned, and do not cast the collection {FP8_FROZEN!r}."
    )


def is_contraction(context: Any) -> bool:
  """Returns whether a method call is the ``__call__`` of an FP8 contraction module."""
  return isinstance(context.module, FP8Contraction) and context.method_name == "__call__"


def _check_kernels(layers: Mapping[Path, FrozenLayer], run: Run) -> None:
  """Raises ValueError if a run multiplies by anything other than the frozen parameters.

  The check traces the model once more, with contractions that return zeros.
  """
  own = OwnModules()

  def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    module: Any = context.module
    is_own = own.has(module)
    if not is_own or not is_contraction(context):
      return next_fun(*args, **kwargs)
    call, layer = Call.of(module, args, kwargs), layers.get(module.path)
    mark(module.path, call.rhs)
    if layer is not None and layer.stored and not call.takes_kernel_as(layer):
      _refuse_kernel(module.path)
    return call.finish(jnp.zeros(call.plan.fprop.gemm.shape, call.plan.fprop.dtype))

  def apply(variables: Any) -> Any:
    kept = flax.core.DenyList(("params", OVERWRITE_WITH_GRADIENT))
    how = {"rngs": run.rngs, "method": run.method, "mutable": kept}
    return make_converted(run.module).apply(variables, *run.args, **how, **run.kwargs)

  with intercept_methods(intercept):
    found = origins(apply, run.variables)
  for path, layer in layers.items():
    kernels = {values[0] for values in found.get(path, ())}
    if not layer.stored or not kernels:
      continue
    parameter, lifted, order = parameter_of(kernels) or (None, (), ())
    stored = layer.parameter, _axes(layer.lifted), layer.order
    if (parameter, _axes(lifted), order) != stored:
      _refuse_kernel(path)


def _axes(lifted: Lifted) -> list[int]:
  return [axis for _, axis in lifted]


def parameter_of(
  kernels: Collection[Origin | None],
) -> tuple[Path, Lifted, tuple[int, ...]] | None:
  """Returns path, lifted axes and axis order of the one parameter that all kernels are, or None."""
  origin = next(iter(kernels)) if len(kernels) == 1 else None
  if origin is None or origin.casts > 1 or origin.path[0] != "params":
    return None
  return origin.path[1:], tuple(sorted(origin.lifted, key=lambda pair: pair[1])), origin.order


def _refuse_kernel(path: Path) -> None:
  raise ValueError(
    "freeze_for_inference: the served model must use the kernels that were frozen; got another "
    f"kernel at {'/'.join(path)!r}. Freeze it with the same arguments, flags and method as in "
    "serving."
  )


def _serve(module: Any, layers: Mapping[Path, FrozenLayer], call: Call) -> jax.Array:
  """Contracts an input with a frozen kernel."""
  check.device("freeze_for_inference", module.recipe, getattr(module, "emulate", True))
  if (layer := layers.get(module.path)) is None:
    raise ValueError(
      "freeze_for_inference: the served model must call the contractions that were frozen; got "
      f"another contraction at {'/'.join(module.path)!r}, besides {len(layers)}. Freeze it with "
      "arguments that run the whole model."
    )
  if layer.recipe.is_high_precision(GemmKind.FPROP):
    return call.finish(contract_as_is(call.plan, call.input, call.kernel))
  scope = module.scope.push(FP8_FROZEN, reuse=True)
  leaves = dict(scope.variables().get("params", {}))
  plan = dataclasses.replace(call.plan, recipe=layer.serving_recipe, calibration=None)
  found = {name: to_float32(leaf) for name, leaf in find_state(module).items()}
  state = read_roles(plan.recipe, found)
  if layer.stored and not leaves.keys() >= _KERNEL:
    raise ValueError(
      f"freeze_for_inference: the frozen model needs the collection {FP8_FROZEN!r}; got variables "
      f"without the kernel of {'/'.join(module.path)!r}. Pass the variables that "
      "freeze_for_inference returned."
    )
  kernel = (
    _stored_kernel(layer, plan, call, leaves)
    if layer.stored
    else quantize_kernel(plan, call.kernel, state)
  )
  return call.finish(contract_frozen(plan, call.input, kernel, state))


def _stored_kernel(
  layer: FrozenLayer, plan: Plan, call: Call, leaves: Mapping[str, jax.Array]
) -> QTensor:
  """Reads a stored kernel in the layout of ``quantize_kernel``."""
  stored = QTensor(leaves["kernel"], leaves["kernel_scale"])
  if layer.lifted_leads:
    return stored
  state: Any = {Role.KERNEL.value: plan.recipe.init_state(Role.KERNEL)}
  layout = jax.eval_shape(lambda kernel: quantize_kernel(plan, kernel, state), call.kernel)
  return jax.tree.map(lambda leaf, like: leaf.reshape(like.shape), stored, layout)


def read_roles(recipe: Recipe, leaves: Mapping[str, jax.Array]) -> dict[str, TensorState]:
  """Groups the variables of a module by role. Omits roles with missing variables."""
  state: dict[str, TensorState] = {}
  for role in Role:
    names = {key: f"{role.value}_{key}" for key in recipe.init_state(role)}
    if set(names.values()) <= leaves.keys():
      state[role.value] = {key: leaves[name] for key, name in names.items()}
  return state
