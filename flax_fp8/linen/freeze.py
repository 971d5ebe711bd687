"""Inference from a model trained in FP8: kernels are stored as FP8, and no scale moves any more.

What a contraction multiplies is known only while the model runs: the dtype that its kernel is cast
to, the axes that it contracts. So freezing runs the model once, abstractly, and writes down each
contraction; then each kernel is quantized, and its parameter is gone. The converted module that
serves them gives the model NaN for the parameter, which no contraction reads.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.core
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from flax_fp8.linen.arguments import fill, require_variables
from flax_fp8.linen.boxes import unbox
from flax_fp8.linen.contractions import Call, FP8Contraction
from flax_fp8.linen.converted import make_converted
from flax_fp8.linen.frozen import FP8_FROZEN, Flat, Frozen, FrozenLayer, Path, read_roles
from flax_fp8.linen.provenance import Origin, mark, origins
from flax_fp8.linen.state import OVERWRITE_WITH_GRADIENT
from flax_fp8.ops.frozen import quantize_kernel
from flax_fp8.recipes.base import GemmKind, Role, StatefulRecipe
from flax_fp8.recipes.delayed import DelayedScaling


def freeze_for_inference(
  module: nn.Module, variables: Any, *init_args: Any, **init_kwargs: Any
) -> tuple[nn.Module, dict[str, Any]]:
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
    collection ``fp8_frozen``, and every other collection as it was. A kernel stays a parameter, and
    is quantised in each run, where it is not multiplied as it is stored but made of parameters; or
    where the recipe has its forward GEMM in high precision.

  Raises:
    TypeError: ``module`` is no Linen module.
    ValueError: ``variables`` is no variables dict, or lacks FP8 state; the model contracts nothing
      in FP8; a tensor under ``first_step="current"`` was never seen.

  Numerics:
    Outputs are those of ``module.apply(variables, ...)``, bit for bit under jit; but a model that
    differentiates inside has gradients in high precision. Each run checks, by tracing the model
    once more, that it multiplies by the parameters that were frozen. Recipes without
    state scale inputs by themselves, as in training. Under ``overflow="current"`` scales are static
    all the same: what is beyond their range saturates.

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
  if not abstract:
    _require_seen(layers, made)
  rest = {name: value for name, value in variables.items() if name != OVERWRITE_WITH_GRADIENT}
  return make_converted(module, Frozen(layers)), {**rest, **made}


def _check_arguments(module: Any, variables: Any) -> None:
  if not isinstance(module, nn.Module):
    raise TypeError(
      f"freeze_for_inference: module must be an instance of a Linen module; got {module!r}. Pass "
      "the model that was trained."
    )
  require_variables("freeze_for_inference", variables)


def _survey(module: nn.Module, variables: Any, args: Any, kwargs: Any) -> tuple[FrozenLayer, ...]:
  """Traces a model, and writes down what it contracts in FP8 and which parameters it takes."""
  calls: dict[Path, list[Call]] = {}

  def intercept(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    module: Any = context.module
    if isinstance(context.module, FP8Contraction) and context.method_name == "__call__":
      call = Call.of(module, args, kwargs)
      calls.setdefault(module.path, []).append(call)
      mark(call.rhs, module.path)
    return next_fun(*args, **kwargs)

  def run(variables: Any) -> Any:
    full_args, full_kwargs = fill((args, kwargs))
    kept = flax.core.DenyList(("params", OVERWRITE_WITH_GRADIENT))
    return module.apply(variables, *full_args, mutable=kept, **full_kwargs)

  with nn.intercept_methods(intercept):
    kernels = origins(run, flax.core.unfreeze(variables))
  if not calls:
    raise ValueError(
      "freeze_for_inference: the model must contract something in FP8; got none in "
      f"{type(module).__name__}. Convert it with fp8_linear_layers, and train or calibrate it."
    )
  params = flax.traverse_util.flatten_dict(nn.meta.unbox(variables["params"]))
  return tuple(_describe(path, calls[path], kernels.get(path), params) for path in calls)


def _describe(
  path: Path, calls: list[Call], origin: Origin | None, params: Mapping[Path, Any]
) -> FrozenLayer:
  """Describes a contraction; its kernel is stored where every call takes one parameter alike."""
  call = calls[-1]
  layer = FrozenLayer(path, call.plan, call.dtype, call.reduction)
  alike = all(other.takes_kernel_as(call) for other in calls)
  if origin is None or not alike or call.plan.recipe.is_high_precision(GemmKind.FPROP):
    return layer
  param = params[origin.path]
  return dataclasses.replace(
    layer,
    parameter=origin.path,
    shape=param.shape,
    parameter_dtype=param.dtype,
    stacked=origin.stacked,
  )


def _freeze(variables: Any, *, layers: tuple[FrozenLayer, ...]) -> dict[str, Any]:
  """Quantises the kernels, and keeps of the state what forward passes need."""
  params: Flat = flax.traverse_util.flatten_dict(nn.meta.unbox(variables["params"]))
  state: Flat = flax.traverse_util.flatten_dict(unbox(variables.get(OVERWRITE_WITH_GRADIENT, {})))
  made: dict[Path, Any] = {}
  for layer in layers:
    kernel = None if layer.parameter is None else params[layer.parameter]
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
    made: dict[str, jax.Array] = {}
    if isinstance(layer.recipe, StatefulRecipe):
      for role in (Role.INPUT,) if layer.stored else (Role.INPUT, Role.KERNEL):
        own = layer.recipe.freeze(state[role.value])
        made |= {f"{role.value}_{key}": leaf for key, leaf in own.items()}
    if kernel is None:
      return made
    kernel = kernel.astype(layer.dtype)
    if layer.reduction is not None:
      kernel = jnp.einsum(layer.reduction, kernel)
    q = quantize_kernel(layer.plan, kernel, state)
    return {"kernel": q.data, "kernel_scale": q.scale, **made}

  # Lifted axes lead, of the kernel and of the state; one that the state lacks is shared.
  depth = {name: leaf.ndim - 1 for name, leaf in leaves.items()}
  for level in range(max([layer.stacked, *depth.values()])):
    axes = {name: 0 if own > level else None for name, own in depth.items()}
    freeze = jax.vmap(freeze, in_axes=(0 if layer.stacked > level else None, axes))
  return freeze(kernel, leaves)


def _require_seen(layers: tuple[FrozenLayer, ...], made: Any) -> None:
  """Raises ValueError where a scale would have been that of the first tensor to come."""
  leaves: Flat = flax.traverse_util.flatten_dict(made[FP8_FROZEN])
  for layer in layers:
    history = leaves.get((*layer.path, "input_amax_history"))
    recipe = layer.recipe
    waits = isinstance(recipe, DelayedScaling) and recipe.first_step == "current"
    if waits and history is not None and not jnp.all(history > 0):
      raise ValueError(
        "freeze_for_inference: under first_step='current' each tensor must have been seen; got an "
        f"empty history of the input of {'/'.join(layer.path)!r}. Train a step, or "
        "calibrate(module, variables, batches) before freezing."
      )
