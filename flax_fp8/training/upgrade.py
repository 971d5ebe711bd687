"""Adds FP8 state to variables that have none, or that have the state of another recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_fp8.linen.arguments import fill, require_module, require_variables
from flax_fp8.linen.boxes import has_boxes, is_box, rebox, unbox
from flax_fp8.linen.containers import like
from flax_fp8.linen.state import OVERWRITE_WITH_GRADIENT
from flax_fp8.meta_dtype import to_float32
from flax_fp8.recipes.delayed import resize_history
from flax_fp8.training.downgrade import downgrade_variables
from flax_fp8.training.paths import compare, leaves_by_path
from flax_fp8.training.state import partition_for_grad_overwrite

HISTORY = "_amax_history"


def upgrade_variables(
  module: nn.Module, variables: Any, *init_args: Any, **init_kwargs: Any
) -> Any:
  """Gives variables exactly the FP8 state of a model: adds missing state and drops other state.

  Use it to start FP8 training from a checkpoint of a model without FP8, or to change the recipe.

  Args:
    module: the FP8 model.
    variables: variables dict of the same model without FP8, with the state of only some layers, or
      with the state of another recipe.
    *init_args: arguments of the model's ``init`` after the PRNG key; arrays or ShapeDtypeStructs.
    **init_kwargs: keyword arguments of the model's ``init``.

  Returns:
    ``variables`` with the state of ``module.init``. A leaf keeps its value from ``variables`` if it
    has the same path and shape there. An amax history is resized if only its length differs. If
    ``variables`` has boxed leaves, state is boxed as in ``module.init``. Other collections are
    unchanged. State that the model does not have is dropped. For a recipe without state, this
    drops the whole collection.

  Raises:
    TypeError: ``module`` is not a Linen module.
    ValueError: ``variables`` is not a variables dict, or its parameters do not have the paths and
      shapes of ``module.init``.

  Numerics:
    A shorter history keeps the newest amaxes. A longer history is filled with zeros as its oldest
    entries; an amax of zero means not recorded. State is float32. State that was cast to another
    dtype with the parameters is cast back to float32. A rounded scale is still usable. A scale
    that the cast made zero or infinite becomes 1. An amax that the cast made infinite becomes 0.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> x = jnp.ones((2, 4))
    >>> variables = nn.Dense(4).init(jax.random.key(0), x)
    >>> layer = nn.Dense(4, dot_general_cls=fp8.Fp8DotGeneral)
    >>> variables = fp8.upgrade_variables(layer, variables, x)
    >>> layer.apply(variables, x).shape
    (2, 4)

  References:
    flax.linen.Module.init; flax_fp8.downgrade_variables, the inverse.
  """
  require_module("upgrade_variables", module)
  require_variables("upgrade_variables", variables)
  init = _initializer(module, init_args, init_kwargs)
  _check_parameters(variables, jax.eval_shape(init))
  # jit with only the state as output, so that no parameter is computed.
  fresh = jax.jit(lambda: init().get(OVERWRITE_WITH_GRADIENT, {}))()
  new = downgrade_variables(variables)
  if not fresh:
    return new
  state = _take(unbox(variables.get(OVERWRITE_WITH_GRADIENT)), unbox(fresh))
  state = {OVERWRITE_WITH_GRADIENT: rebox(state, fresh) if has_boxes(variables) else state}
  return like(variables, {**new, **state})


def _initializer(module: nn.Module, args: Any, kwargs: Any) -> Any:
  """Returns a function without arguments that initializes all variables; it is traced once."""

  def init() -> Any:
    full_args, full_kwargs = fill((args, kwargs))
    return flax.core.unfreeze(module.init(jax.random.key(0), *full_args, **full_kwargs))

  return jax.jit(init)


def _check_parameters(variables: Any, made: Any) -> None:
  difference = compare(_parameters(variables), _parameters(made), describe=_shape)
  if difference:
    raise ValueError(
      "upgrade_variables: variables must have the parameters of the module; got "
      f"{difference}. Pass the model of the variables with only dot_general_cls changed, and "
      "inputs of its shapes."
    )


def _parameters(variables: Any) -> dict[str, Any]:
  """Returns the parameters by path; a box of metadata counts as one leaf."""
  _, params = partition_for_grad_overwrite(variables.get("params", {}))
  return leaves_by_path(params, is_leaf=is_box)


def _shape(leaf: Any) -> tuple[int, ...]:
  """Returns the shape of a leaf, or of the single leaf in a box."""
  return jnp.shape(unbox(leaf))


def _take(old: Any, fresh: Any) -> Any:
  """Replaces fresh state by old state where both describe the same tensor."""
  if not isinstance(old, Mapping):
    return fresh
  return {
    key: _take(old.get(key), value) if isinstance(value, Mapping) else _take_leaf(key, old, fresh)
    for key, value in fresh.items()
  }


def _take_leaf(key: str, old: Mapping[str, Any], fresh: Mapping[str, jax.Array]) -> jax.Array:
  leaf, shape = _float32(key, old.get(key)), fresh[key].shape
  if getattr(leaf, "shape", None) == shape:
    return leaf if _scale_shape(key, old) == _scale_shape(key, fresh) else fresh[key]
  axis = _resized_axis(key, old, fresh)
  return fresh[key] if axis is None else resize_history(leaf, shape[axis], axis)


def _float32(key: str, leaf: Any) -> Any:
  """Casts a leaf of state to float32, and resets values that an earlier cast made invalid."""
  leaf = to_float32(leaf)
  if not hasattr(leaf, "dtype") or leaf.dtype == jnp.float32:
    return leaf
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
  leaf = jnp.asarray(leaf, jnp.float32)
  is_scale = key.endswith("_scale")
  lost = ~jnp.isfinite(leaf) | (is_scale & (leaf <= 0))
  return jnp.where(lost, jnp.float32(is_scale), leaf)


def _scale_shape(key: str, leaves: Mapping[str, Any]) -> tuple[int, ...] | None:
  """Returns the shape of the scale beside a history, to find the axis with the slots."""
  scale = key.removesuffix(HISTORY) + "_scale"
  return getattr(leaves.get(scale), "shape", None) if key.endswith(HISTORY) else None


def _resized_axis(key: str, old: Mapping[str, Any], fresh: Mapping[str, jax.Array]) -> int | None:
  """Returns the axis with the slots if the history differs only in this axis, else None.

  The scale has size 1 along this axis. Other axes come from mapped or scanned modules.
  """
  if not key.endswith(HISTORY):
    return None
  scale = key.removesuffix(HISTORY) + "_scale"
  leaves = [tree.get(name) for tree in (old, fresh) for name in (key, scale)]
  was, was_scale, now, now_scale = (getattr(leaf, "shape", None) for leaf in leaves)
  if was is None or now is None or was_scale != now_scale or len(was) != len(now):
    return None
  differing = [axis for axis, sizes in enumerate(zip(was, now, strict=True)) if len({*sizes}) > 1]
  slots = [axis for axis in differing if now_scale and now_scale[axis] == 1]
  return slots[0] if len(slots) == len(differing) == 1 else None
