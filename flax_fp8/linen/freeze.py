"""``freeze_for_inference``: stores kernels in FP8 and makes scales constant.

The dtype and the contracted axes of a kernel are known only when the model runs. So freezing
traces the model once and records each contraction. Then it quantizes each kernel and removes the
parameter, unless the model also reads it in another way. The serving module passes NaN to the
model in place of a removed parameter.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax.core
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from flax_fp8.linen.arguments import fill, require_module, require_variables
from flax_fp8.linen.boxes import unbox
from flax_fp8.linen.containers import like, plain
from flax_fp8.linen.contractions import Call, arguments, blank
from flax_fp8.linen.converted import OwnModules, make_converted
from flax_fp8.linen.frozen import (
  FP8_FROZEN,
  Flat,
  Frozen,
  FrozenLayer,
  Lifted,
  Path,
  is_contraction,
  parameter_of,
  read_roles,
)
from flax_fp8.linen.intercept import intercept_methods
from flax_fp8.linen.lifted import own_axes, own_back, own_last
from flax_fp8.linen.provenance import READ, Found, Origins, mark, origins
from flax_fp8.linen.state import (
  OVERWRITE_WITH_GRADIENT,
  find_state,
  is_among_params,
  parameters_beside,
  require_float32_state,
)
from flax_fp8.ops.frozen import quantize_kernel
from flax_fp8.quantize import QTensor
from flax_fp8.recipes.base import GemmKind, Role, StatefulRecipe
from flax_fp8.recipes.delayed import DelayedScaling


def freeze_for_inference(
  module: nn.Module, variables: Any, *init_args: Any, **init_kwargs: Any
) -> tuple[nn.Module, Any]:
  """Freezes a model for inference: FP8 kernels, constant scales, no FP8 state.

  For each contraction, with the scales that the next training step would use::

      fp8_frozen = {"kernel": quantize(kernel.astype(dtype)), "kernel_scale": ..., "input_...": ...}

  The kernels take one byte per element. The outputs stay the same.

  Args:
    module: the FP8 model. It is converted by ``fp8_linear_layers``, or contains ``Fp8DotGeneral``
      and ``Fp8Einsum``.
    variables: the trained or calibrated variables. Pass ShapeDtypeStructs instead of arrays to get
      the shapes of the result, for example to restore a checkpoint of it.
    *init_args: the arguments of ``module.init`` after the PRNG key; arrays or ShapeDtypeStructs.
    **init_kwargs: the keyword arguments of ``module.init``.

  Returns:
    The serving module and its variables. The module is called like ``module``. The variables are
    ``params`` without the kernels, the collection ``fp8_frozen``, and all other collections
    unchanged. Mappings keep their types.

    These kernels stay in ``params``, and each run quantizes them:

    - kernels computed from parameters by more than a cast and a transpose;
    - parameters that the model also reads in another way, such as a lookup table;
    - parameters shared by layers with different scales.

    Kernels of a recipe with its forward GEMM in high precision also stay in ``params``. A module
    that the model runs by a nested ``apply`` or ``bind`` keeps its variables.

    If ``nn.scan`` or ``nn.vmap`` stacks a kernel, ``fp8_frozen`` stacks it along the same axis. If
    that axis is not the first, ``kernel_scale`` has the rank of the kernel.

  Raises:
    TypeError: ``module`` is not a Linen module, or the state in ``variables`` is not float32.
    ValueError: ``variables`` is not a variables dict or lacks FP8 state, or the model has no FP8
      contraction.

  Numerics:
    Outputs equal those of ``module.apply(variables, ...)``, with the same FP8 values and scales.
    Under ``jax.jit`` they are bit-identical, unless XLA fuses the float32 arithmetic around a GEMM
    differently.

    - Each run traces the model once more, and checks that it multiplies by the frozen parameters.
    - Gradients that the model itself computes are in high precision.
    - Recipes without state scale inputs in each run, as in training.
    - With ``overflow="current"`` the scales are constant too. Larger values saturate.
    - With ``first_step="current"``, an input with an amax history of zeros is scaled by its own
      amax, as in training. Such an input was never seen, or was always zero. Each run then reads it
      once more. If ``variables`` are shapes, the histories are unknown, and every contraction with
      ``first_step="current"`` does this.

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
  require_module("freeze_for_inference", module)
  require_variables("freeze_for_inference", variables)
  require_float32_state("freeze_for_inference", variables)
  given, variables = variables, plain(variables)
  survey = _survey(module, variables, init_args, init_kwargs)
  freeze = functools.partial(_freeze, survey=survey)
  abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(variables))
  made = jax.eval_shape(freeze, variables) if abstract else jax.jit(freeze)(variables)
  layers = _with_first_step(survey.layers, made[FP8_FROZEN])
  rest = {name: value for name, value in variables.items() if name != OVERWRITE_WITH_GRADIENT}
  return make_converted(module, Frozen(layers)), like(given, {**rest, **made})


@dataclasses.dataclass(frozen=True)
class _Survey:
  """The FP8 contractions of a model.

  Attributes:
    layers: the contractions.
    stacks: for the path of each contraction, the lifted axes of its kernel's state. None if they
      are unknown.
    kept: paths of modules with state that a nested ``apply`` or ``bind`` reads.
  """

  layers: tuple[FrozenLayer, ...]
  stacks: Mapping[Path, Lifted | None]
  kept: frozenset[Path]


def _survey(module: nn.Module, variables: Any, args: Any, kwargs: Any) -> _Survey:
  """Traces a model and records its FP8 contractions and the variables that they read."""
  calls: dict[Path, list[Call]] = {}
  in_params: set[Path] = set()
  ranks: dict[Path, int] = {}
  own, nested = OwnModules(), itertools.count()

  def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    module: Any = context.module
    is_own = own.has(module)
    if is_contraction(context):
      rhs, state = jnp.asarray(arguments(module, args, kwargs)["rhs"]), find_state(module)
      args, kwargs = blank((args, kwargs))
      if not is_own:
        mark(next(nested), rhs, *state.values())
      else:
        call = Call.of(module, args, kwargs).without_arrays()
        calls.setdefault(module.path, []).append(call)
        beside = parameters_beside(module)
        ranks.update({(*module.path[:-1], name): jnp.ndim(x) for name, x in beside.items()})
        in_params.update([module.path] if is_among_params() else [])
        keys = (f"{Role.KERNEL.value}_{key}" for key in call.plan.recipe.init_state(Role.KERNEL))
        mark(module.path, rhs, *(state[key] for key in keys if key in state))
    return next_fun(*args, **kwargs)

  def run(variables: Any) -> Any:
    full_args, full_kwargs = fill((args, kwargs))
    kept = flax.core.DenyList(("params", OVERWRITE_WITH_GRADIENT))
    rngs = {"params": jax.random.key(0)}  # the default for all PRNG collections, as in `init`
    apply = make_converted(module).apply
    return apply(variables, *full_args, mutable=kept, rngs=rngs, **full_kwargs)

  with intercept_methods(intercept):
    found = origins(run, variables)
  if not calls:
    raise ValueError(
      "freeze_for_inference: the model must have at least one FP8 contraction; got none in "
      f"{type(module).__name__}. Convert it with fp8_linear_layers, and train or calibrate it."
    )
  params: Flat = flax.traverse_util.flatten_dict(nn.meta.unbox(variables["params"]))
  # If the model itself scans or maps over a parameter, that axis is not a stack of variables.
  depths = {path: jnp.ndim(params[path]) - rank for path, rank in ranks.items() if path in params}
  return _decide(calls, found, params, in_params, depths)


def _decide(
  calls: Mapping[Path, Sequence[Call]],
  found: Found,
  params: Flat,
  in_params: Collection[Path],
  depths: Mapping[Path, int],
) -> _Survey:
  """Decides which kernels are stored: those with a parameter that nothing else reads."""
  of_nested = [values for name, seen in found.items() if isinstance(name, int) for values in seen]
  read = {origin.path for values in of_nested for origin in values if origin}
  kept = frozenset(path[1:-1] for path in read if path[0] == OVERWRITE_WITH_GRADIENT)
  stacks = {path: _stack_of_state(found.get(path, ())) for path in calls}
  kernels = {
    path: _stored_as(calls[path], found.get(path, ()), stacks[path], depths)
    for path in calls
    if path not in kept
  }
  as_they_are = [
    values for path in calls if not kernels.get(path) for values in found.get(path, ())
  ]
  read |= {values[0].path for values in (*as_they_are, *found.get(READ, ())) if values[0]}
  layers: list[FrozenLayer] = []
  for path, (*_, call) in calls.items():
    layer = FrozenLayer(path, call.plan, call.dtype, call.reduction)
    layer = dataclasses.replace(layer, in_params=path in in_params, runs_as_is=path in kept)
    kernel = kernels.get(path)
    if kernel is not None and kernel[0] in params and ("params", *kernel[0]) not in read:
      param = params[kernel[0]]
      known = {"shape": param.shape, "parameter_dtype": param.dtype}
      known |= dict(zip(("parameter", "lifted", "order"), kernel, strict=True))
      layer = dataclasses.replace(layer, **known)
    layers.append(layer)
  return _Survey(tuple(layers), stacks, kept)


def _stack_of_state(found: Collection[Origins]) -> Lifted | None:
  """Returns the lifted axes of a kernel's state, or None if they are unknown."""
  stacks = {origin and origin.lifted for values in found for origin in values[1:]}
  return next(iter(stacks), ()) if len(stacks) <= 1 else None


def _stored_as(
  calls: Sequence[Call],
  found: Collection[Origins],
  stack: Lifted | None,
  depths: Mapping[Path, int],
) -> tuple[Path, Lifted, tuple[int, ...]] | None:
  """Returns the parameter that all calls use as the kernel, as ``parameter_of``, or None."""
  call = calls[-1]
  kernel = parameter_of({values[0] for values in found})
  alike = all(other.takes_kernel_as(call) for other in calls)
  if kernel is None or not alike or call.plan.recipe.is_high_precision(GemmKind.FPROP):
    return None
  if len(kernel[1]) != depths.get(kernel[0], 0):
    return None
  # If the kernel is shared but its scale is not, there is no single FP8 value.
  is_one = stack is not None and {level for level, _ in stack} <= {level for level, _ in kernel[1]}
  return kernel if is_one else None


def _freeze(variables: Any, *, survey: _Survey) -> dict[str, Any]:
  """Quantizes the kernels and keeps the state that forward passes need."""
  flatten, unflatten = flax.traverse_util.flatten_dict, flax.traverse_util.unflatten_dict
  params: Flat = flatten(nn.meta.unbox(variables["params"]))
  state: Flat = flatten(unbox(variables.get(OVERWRITE_WITH_GRADIENT, {})))
  made: dict[Path, Any] = {}
  for layer in survey.layers:
    if layer.runs_as_is:
      continue
    leaves = {path[-1]: leaf for path, leaf in state.items() if path[:-1] == layer.path}
    own = _freeze_state(layer, leaves)
    if layer.parameter is not None:
      kernel, stack = params[layer.parameter], survey.stacks[layer.path] or ()
      own |= _freeze_kernel(layer, kernel, leaves, stack)
    made |= {(*layer.path, name): leaf for name, leaf in own.items()}
  gone = {layer.parameter for layer in survey.layers}
  kept = {path: leaf for path, leaf in params.items() if path not in gone}
  nested = {path: leaf for path, leaf in state.items() if path[:-1] in survey.kept}
  rest = {OVERWRITE_WITH_GRADIENT: unflatten(nested)} if nested else {}
  return {"params": unflatten(kept), FP8_FROZEN: unflatten(made), **rest}


def _freeze_state(layer: FrozenLayer, leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns the part of a layer's state that forward passes need, with the same axes."""
  recipe = layer.recipe
  if not isinstance(recipe, StatefulRecipe) or recipe.is_high_precision(GemmKind.FPROP):
    return {}
  axes = own_axes({name: leaf.shape for name, leaf in leaves.items()})
  state = read_roles(recipe, {name: own_last(leaf, axes[name]) for name, leaf in leaves.items()})
  made: dict[str, jax.Array] = {}
  for role in (Role.INPUT,) if layer.stored else (Role.INPUT, Role.KERNEL):
    freeze = recipe.freeze
    for _ in range(max(leaf.ndim for leaf in state[role.value].values()) - 1):
      freeze = jax.vmap(freeze)
    for key, leaf in freeze(state[role.value]).items():
      name = f"{role.value}_{key}"
      made[name] = own_back(leaf, axes[name])
  return made


def _freeze_kernel(
  layer: FrozenLayer, kernel: jax.Array, leaves: Mapping[str, jax.Array], stack: Lifted
) -> dict[str, jax.Array]:
  """Quantizes one kernel, or all kernels that are stacked in one parameter.

  Args:
    layer: the contraction.
    kernel: the parameter.
    leaves: the layer's state by name.
    stack: lifted axes of the kernel's state.
  """

  def freeze(kernel: jax.Array, leaves: Mapping[str, jax.Array]) -> QTensor:
    kernel = jnp.transpose(kernel, layer.order).astype(layer.dtype)
    if layer.reduction is not None:
      kernel = jnp.einsum(layer.reduction, kernel)
    return quantize_kernel(layer.plan, kernel, read_roles(layer.recipe, leaves))

  axes = dict(stack)

  def over(lifted: Lifted, kernel: jax.Array, leaves: Mapping[str, jax.Array]) -> QTensor:
    if not lifted:
      return freeze(kernel, leaves)
    (level, _), *inner = lifted
    each = functools.partial(over, tuple(inner))
    if level not in axes and level.is_scan:
      # The steps share the state, but each step is quantized without the kernels of the others.
      return jax.lax.map(lambda kernel: each(kernel, leaves), kernel)
    return jax.vmap(each, in_axes=(0, 0 if level in axes else None))(kernel, leaves)

  lead = lambda leaf, axes: jnp.moveaxis(leaf, axes, tuple(range(len(axes))))
  of_state = tuple(axes[level] for level, _ in layer.lifted if level in axes)
  leaves = {k: lead(x, of_state) for k, x in leaves.items() if k.startswith(Role.KERNEL.value)}
  q = over(layer.lifted, lead(kernel, tuple(axis for _, axis in layer.lifted)), leaves)
  return {"kernel": layer.place(q.data), "kernel_scale": layer.place(q.scale)}


def _with_first_step(layers: tuple[FrozenLayer, ...], made: Any) -> tuple[FrozenLayer, ...]:
  """Records which contractions have an amax history of zeros. They compute a scale when served."""
  leaves: Flat = flax.traverse_util.flatten_dict(made)

  def is_first_step(layer: FrozenLayer) -> bool:
    recipe = layer.recipe
    if not isinstance(recipe, DelayedScaling) or recipe.first_step != "current":
      return False
    names = ("input_amax_history", "kernel_amax_history")
    found = [leaves[path] for name in names if (path := (*layer.path, name)) in leaves]
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in found)
    return abstract or any(bool(jnp.any(history == 0)) for history in found)

  return tuple(dataclasses.replace(layer, is_first_step=is_first_step(layer)) for layer in layers)
