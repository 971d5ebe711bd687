"""The Linen variables and PRNG keys of a contraction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.linen.module as linen_module
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl

from flax_fp8.linen.boxes import box_as, unbox
from flax_fp8.linen.containers import leaves_with_path
from flax_fp8.meta_dtype import require_float32
from flax_fp8.ops import check
from flax_fp8.ops.metrics import init_metrics
from flax_fp8.recipes.base import Recipe, Role, TensorState

OVERWRITE_WITH_GRADIENT = "_overwrite_with_gradient"
STOCHASTIC_ROUNDING = "sr_rng"


def is_state(path: Sequence[Any]) -> bool:
  """Returns whether a leaf is FP8 state, from its path in ``containers.leaves_with_path``."""
  return any(getattr(entry, "key", None) == OVERWRITE_WITH_GRADIENT for entry in path)


def require_float32_state(caller: str, tree: Any) -> None:
  """Raises TypeError if FP8 state in a tree is not float32, as after a cast of all variables."""
  for path, leaf in leaves_with_path(tree):
    if is_state(path) and type(leaf) is not float:
      require_float32(caller, jax.tree_util.keystr(path), leaf)


def read_state(module: nn.Module, recipe: Recipe) -> dict[str, TensorState]:
  """Reads a module's state, or creates it during initialization.

  Args:
    module: bound module. Its variables are ``{role}_{key}`` in the collection
      ``_overwrite_with_gradient``.
    recipe: defines the keys.

  Returns:
    For each role, the leaves that ``ops.dot_general`` takes, including metrics if there are any.

  Raises:
    TypeError: ``recipe`` is not a recipe, or the state is not float32.
    ValueError: the module is applied without its state.
  """
  state = read_recipe_state(module, recipe)
  return {role: leaves | _read_metrics(module, role) for role, leaves in state.items()}


def read_recipe_state(module: nn.Module, recipe: Recipe) -> dict[str, TensorState]:
  """Reads a module's state as ``read_state`` does, without metrics."""
  check.recipe(type(module).__name__, recipe)
  _refuse_weight_norm(module)
  return {role.value: _read_all(module, role.value, recipe.init_state(role)) for role in Role}


def _refuse_weight_norm(module: nn.Module) -> None:
  """Raises ValueError inside an ``nn.WeightNorm`` that normalizes FP8 state.

  The default filter ``"kernel"`` also matches ``kernel_scale``. The wrapped layer has no reference
  to its ``nn.WeightNorm``, so this function searches the running modules.
  """
  for running in getattr(getattr(linen_module, "_context", None), "module_stack", ()):
    if not isinstance(running, nn.WeightNorm):
      continue
    layer, chosen = running.layer_instance.name, running.variable_filter
    state = [f"{layer}/{module.name}/{role.value}_scale" for role in Role]
    if not chosen or any(name in path for path in state for name in chosen):
      raise ValueError(
        "nn.WeightNorm: variable_filter must not match FP8 state; got variable_filter="
        f"{chosen!r}, which matches the scales and histories of {'/'.join(module.path)!r}. "
        f"Pass variable_filter={{'{layer}/kernel'}}."
      )


# Part of the key of JAX's compilation caches, because a module may trace a compiled function.
_declaring: Any = jax.make_user_context(False)


def declaring_metrics() -> Any:
  """Returns a context in which modules also create their metrics during initialization."""
  return _declaring(True)


def _read_metrics(module: nn.Module, role: str) -> TensorState:
  fresh = init_metrics()
  scope, collection = _location(module)
  if _declaring.value and not scope.is_mutable_collection(collection):
    raise ValueError(
      f"add_metrics: every FP8 contraction needs the collection {OVERWRITE_WITH_GRADIENT!r} for "
      f"its metrics; got none at {'/'.join(module.path)!r}. Add the collection to the "
      "variable_axes of nn.scan or nn.vmap, beside 'params'."
    )
  there = (scope.has_variable(collection, f"{role}_{key}") for key in fresh)
  return _read_all(module, role, fresh) if _declaring.value or any(there) else {}


def _read_all(module: nn.Module, role: str, fresh: Mapping[str, np.ndarray]) -> TensorState:
  return {key: _read(module, f"{role}_{key}", value) for key, value in fresh.items()}


def read_key(module: nn.Module, recipe: Recipe) -> jax.Array | None:
  """Returns the PRNG key of one contraction, for stochastic rounding.

  Args:
    module: bound module. Its keys come from the collection ``sr_rng``.
    recipe: the recipe, which may use stochastic rounding.

  Returns:
    A new key for this call. None if the recipe needs no key, or if no key was passed to ``apply``.
  """
  wanted = recipe.rounds_by_key and module.has_rng(STOCHASTIC_ROUNDING)
  return module.make_rng(STOCHASTIC_ROUNDING) if wanted else None


# Whether state is stored among the parameters. There it follows them through every lifted
# transformation.
_among_params: Any = jax.make_user_context(False)


def among_params() -> Any:
  """Returns a context in which state is stored in ``params``, under the collection's name."""
  return _among_params(True)


def is_among_params() -> bool:
  """Returns whether state is currently stored in ``params``."""
  return _among_params.value


def find_state(module: nn.Module) -> dict[str, Any]:
  """Returns the existing state variables of a module, by name, without boxes."""
  scope, collection = _location(module)
  return unbox(dict(scope.variables().get(collection, {})))


# A leaf beside state that is stored among the parameters. No arithmetic accepts its dtype. So a
# function that changes all parameters, as in ``nn.map_variables``, fails before it changes state.
GUARD = "guard"
GUARD_DTYPE = "key<fp8 state>"


def _no_key(*_: Any, **__: Any) -> Any:
  raise TypeError(f"{GUARD_DTYPE} is the dtype of a guard, not of PRNG keys.")


_GUARD_IMPL = define_prng_impl(
  key_shape=(1,),
  seed=_no_key,
  split=_no_key,
  random_bits=_no_key,
  fold_in=_no_key,
  name="fp8_state",
  tag="fp8 state",
)


def state_guard(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the guard of a module's state, with the same lifted axes."""
  shape = min((unbox(leaf).shape for leaf in leaves.values()), key=math.prod)
  data = jnp.zeros((*shape, 1), jnp.uint32)
  return {GUARD: jax.random.wrap_key_data(data, impl=_GUARD_IMPL)}


def _location(module: nn.Module) -> tuple[Any, str]:
  """Returns the scope and the collection of a module's state."""
  scope: Any = module.scope
  if _among_params.value:
    return scope.push(OVERWRITE_WITH_GRADIENT, reuse=True), "params"
  return scope, OVERWRITE_WITH_GRADIENT


def _variable(module: nn.Module, name: str, fresh: np.ndarray) -> Any | None:
  """Returns the value of a state variable. Creates the variable if the collection is mutable.

  A new variable is boxed if a parameter of the surrounding layer is boxed.

  Args:
    module: bound module.
    name: name of the variable.
    fresh: initial value.

  Returns:
    The array without its box. None if the variable does not exist and cannot be created.
  """
  scope, collection = _location(module)
  if not scope.has_variable(collection, name):
    if not scope.is_mutable_collection(collection):
      return None
    own = _parameters_beside(module).values()
    scope.variable(collection, name, lambda: box_as(jnp.asarray(fresh), own))
    if _among_params.value and not scope.has_variable(collection, GUARD):
      scope.variable(collection, GUARD, lambda: state_guard({name: fresh})[GUARD])
  return unbox(scope.get_variable(collection, name))


def parameters_beside(module: nn.Module) -> dict[str, Any]:
  """Returns the array parameters of the layer that contains a module, without boxes."""
  own = {name: unbox(x) for name, x in _parameters_beside(module).items()}
  return {name: x for name, x in own.items() if hasattr(x, "ndim")}


def _parameters_beside(module: nn.Module) -> Mapping[str, Any]:
  layer: Any = module.scope and module.scope.parent
  return {} if layer is None else layer.variables().get("params", {})


def _read(module: nn.Module, name: str, fresh: np.ndarray) -> jax.Array:
  if (found := _variable(module, name, fresh)) is None:
    raise ValueError(
      f"{type(module).__name__}: applying the model needs the collection "
      f"{OVERWRITE_WITH_GRADIENT!r}; got variables without {name!r} at "
      f"{'/'.join(module.path)!r}. Pass the whole variables dict. If the checkpoint was trained "
      "without FP8, add state with upgrade_variables(model, variables, *inputs)."
    )
  require_float32(type(module).__name__, repr("/".join((*module.path, name))), found)
  return found
