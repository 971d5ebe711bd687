"""Inference from a model trained in FP8: kernels are stored as FP8, and no scale moves any more.

What a contraction multiplies is known only while the model runs: the dtype that its kernel is cast
to, the axes that it contracts. So freezing runs the model once, abstractly, and writes down each
contraction. Then each kernel is quantized, and its parameter is gone, unless something else reads
it. The converted module that serves them gives the model NaN for a parameter that is gone.
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
from flax_fp8.linen.converted import make_converted
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
  running_applies,
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
  """Makes a model and variables for inference: FP8 kernels, static scales, no FP8 state.

  Per contraction, with the scales that the next step of training would use::

      fp8_frozen = {"kernel": quantize(kernel.astype(dtype)), "kernel_scale": ..., "input_...": ...}

  Args:
    module: the FP8 model: converted by ``fp8_linear_layers``, or with ``Fp8DotGeneral`` and
      ``Fp8Einsum`` in it.
    variables: its variables, trained or calibrated; arrays, or ShapeDtypeStructs to learn the
      shapes that a checkpoint of the result has.
    *init_args: what ``module.init`` takes after the PRNG key; arrays or ShapeDtypeStructs.
    **init_kwargs: the same by keyword.

  Returns:
    The serving module, called as ``module``; and its variables: ``params`` without the kernels, the
    collection ``fp8_frozen``, and every other collection as it was. Mappings keep their types.

    A kernel that is computed from parameters, other than by a cast and a transpose, leaves these
    where they are, and is quantized in each run. So does one that something else reads too, such as
    a table that is looked up; one that layers share, each with a scale of its own; and one of a
    recipe with its forward GEMM in high precision. A module that the model runs by a nested
    ``apply`` keeps its variables.

    A kernel that ``nn.scan`` or ``nn.vmap`` stacks is stacked along the same axis in
    ``fp8_frozen``. Where that is not the first one, ``kernel_scale`` has the kernel's rank.

  Raises:
    TypeError: ``module`` is no Linen module, or the state in ``variables`` is not float32.
    ValueError: ``variables`` is no variables dict, or lacks FP8 state; or the model contracts
      nothing in FP8.

  Numerics:
    Outputs are those of ``module.apply(variables, ...)``: the same FP8 values and scales. Under jit
    they are the same bits, unless XLA fuses float32 arithmetic around a GEMM in another way. A
    model that differentiates inside has gradients in high precision. Each run checks, by tracing
    the model once more, that it multiplies by the parameters that were frozen. Recipes without
    state scale inputs by themselves, as in training. Under ``overflow="current"`` scales are static
    all the same: what is beyond their range saturates. Under ``first_step="current"`` a history of
    zeros leaves the scale to the tensor to come, as the next step of training does: that of an
    input that was never seen, or was zero whenever it was. Such an input is read once more in each
    run to find its amax. From shapes alone, this holds for every contraction under
    ``first_step="current"``, as their histories are not known.

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
  layers = _with_waits(survey.layers, made[FP8_FROZEN])
  rest = {name: value for name, value in variables.items() if name != OVERWRITE_WITH_GRADIENT}
  return make_converted(module, Frozen(layers)), like(given, {**rest, **made})


@dataclasses.dataclass(frozen=True)
class _Survey:
  """What a model contracts in FP8.

  Attributes:
    layers: its contractions.
    stacks: by the path of a contraction, the axes that lifted transformations made of its kernel's
      state; None where that can't be told.
    kept: paths of modules whose state a nested ``apply`` reads.
  """

  layers: tuple[FrozenLayer, ...]
  stacks: Mapping[Path, Lifted | None]
  kept: frozenset[Path]


def _survey(module: nn.Module, variables: Any, args: Any, kwargs: Any) -> _Survey:
  """Traces a model, and writes down what it contracts in FP8 and which variables it takes."""
  calls: dict[Path, list[Call]] = {}
  in_params: set[Path] = set()
  ranks: dict[Path, int] = {}
  own, nested = running_applies() + 1, itertools.count()

  def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    module: Any = context.module
    if is_contraction(context):
      rhs, state = jnp.asarray(arguments(module, args, kwargs)["rhs"]), find_state(module)
      args, kwargs = blank((args, kwargs))
      if running_applies() > own:
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
    rngs = {"params": jax.random.key(0)}  # for whatever draws numbers, as in `init`
    return module.apply(variables, *full_args, mutable=kept, rngs=rngs, **full_kwargs)

  with intercept_methods(intercept):
    found = origins(run, variables)
  if not calls:
    raise ValueError(
      "freeze_for_inference: the model must contract something in FP8; got none in "
      f"{type(module).__name__}. Convert it with fp8_linear_layers, and train or calibrate it."
    )
  params: Flat = flax.traverse_util.flatten_dict(nn.meta.unbox(variables["params"]))
  # A parameter that the model itself scans or maps over is no stack of variables.
  depths = {path: jnp.ndim(params[path]) - rank for path, rank in ranks.items() if path in params}
  return _decide(calls, found, params, in_params, depths)


def _decide(
  calls: Mapping[Path, Sequence[Call]],
  found: Found,
  params: Flat,
  in_params: Collection[Path],
  depths: Mapping[Path, int],
) -> _Survey:
  """Decides which kernels are stored: those of which nothing reads the parameter itself."""
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
  """Returns the axes that lifted transformations made of a kernel's state; None if unknown."""
  stacks = {origin and origin.lifted for values in found for origin in values[1:]}
  return next(iter(stacks), ()) if len(stacks) <= 1 else None


def _stored_as(
  calls: Sequence[Call],
  found: Collection[Origins],
  stack: Lifted | None,
  depths: Mapping[Path, int],
) -> tuple[Path, Lifted, tuple[int, ...]] | None:
  """Returns the parameter that every call takes alike, as ``parameter_of``; None without one."""
  call = calls[-1]
  kernel = parameter_of({values[0] for values in found})
  alike = all(other.takes_kernel_as(call) for other in calls)
  if kernel is None or not alike or call.plan.recipe.is_high_precision(GemmKind.FPROP):
    return None
  if len(kernel[1]) != depths.get(kernel[0], 0):
    return None
  # A kernel that is shared where its scale is not has no one value in FP8.
  is_one = stack is not None and {level for level, _ in stack} <= {level for level, _ in kernel[1]}
  return kernel if is_one else None


def _freeze(variables: Any, *, survey: _Survey) -> dict[str, Any]:
  """Quantizes the kernels, and keeps of the state what forward passes need."""
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
  """Keeps of a layer's state what forward passes need, laid out as it was."""
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
  """Quantizes a kernel, or all that are stacked in one parameter.

  Args:
    layer: its contraction.
    kernel: the parameter.
    leaves: of the state of the layer, by name.
    stack: axes that lifted transformations made of the kernel's state.
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
      # Its steps share the state, but one does not see the tensors of others.
      return jax.lax.map(lambda kernel: each(kernel, leaves), kernel)
    return jax.vmap(each, in_axes=(0, 0 if level in axes else None))(kernel, leaves)

  lead = lambda leaf, axes: jnp.moveaxis(leaf, axes, tuple(range(len(axes))))
  of_state = tuple(axes[level] for level, _ in layer.lifted if level in axes)
  leaves = {k: lead(x, of_state) for k, x in leaves.items() if k.startswith(Role.KERNEL.value)}
  q = over(layer.lifted, lead(kernel, tuple(axis for _, axis in layer.lifted)), leaves)
  return {"kernel": layer.place(q.data), "kernel_scale": layer.place(q.scale)}


def _with_waits(layers: tuple[FrozenLayer, ...], made: Any) -> tuple[FrozenLayer, ...]:
  """Notes which contractions have a history of zeros, and so a scale of the tensor to come."""
  leaves: Flat = flax.traverse_util.flatten_dict(made)

  def waits(layer: FrozenLayer) -> bool:
    recipe = layer.recipe
    if not isinstance(recipe, DelayedScaling) or recipe.first_step != "current":
      return False
    names = ("input_amax_history", "kernel_amax_history")
    found = [leaves[path] for name in names if (path := (*layer.path, name)) in leaves]
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in found)
    return abstract or any(bool(jnp.any(history == 0)) for history in found)

  return tuple(dataclasses.replace(layer, waits=waits(layer)) for layer in layers)
