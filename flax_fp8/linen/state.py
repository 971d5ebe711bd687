"""What Linen keeps for a contraction: its state as variables, cast once, and its PRNG keys."""

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
  """Tells by its path, as of ``containers.leaves_with_path``, whether a leaf is FP8 state."""
  return any(getattr(entry, "key", None) == OVERWRITE_WITH_GRADIENT for entry in path)


def require_float32_state(caller: str, tree: Any) -> None:
  """Raises TypeError where FP8 state in a tree was cast with the parameters beside it."""
  for path, leaf in leaves_with_path(tree):
    if is_state(path) and type(leaf) is not float:
      require_float32(caller, jax.tree_util.keystr(path), leaf)


def read_state(module: nn.Module, recipe: Recipe) -> dict[str, TensorState]:
  """Reads a module's state, creating it while the module is being initialized.

  Args:
    module: bound module; its variables are ``{role}_{key}`` of the collection
      ``_overwrite_with_gradient``.
    recipe: declares the keys.

  Returns:
    For each role the leaves, ready for ``ops.dot_general``; with metrics where there are any.

  Raises:
    TypeError: ``recipe`` is no recipe, or the state is not float32.
    ValueError: the module is applied without its state.
  """
  state = read_recipe_state(module, recipe)
  return {role: leaves | _read_metrics(module, role) for role, leaves in state.items()}


def read_recipe_state(module: nn.Module, recipe: Recipe) -> dict[str, TensorState]:
  """Reads a module's state without metrics; else as ``read_state``."""
  check.recipe(type(module).__name__, recipe)
  _refuse_weight_norm(module)
  return {role.value: _read_all(module, role.value, recipe.init_state(role)) for role in Role}


def _refuse_weight_norm(module: nn.Module) -> None:
  """Raises ValueError inside an ``nn.WeightNorm`` that takes FP8 state for weights.

  By default it does, as its filter ``"kernel"`` is part of ``kernel_scale``. The layer that it
  calls is cut off from it, so it is looked for among the modules whose methods run.
  """
  for running in getattr(getattr(linen_module, "_context", None), "module_stack", ()):
    if not isinstance(running, nn.WeightNorm):
      continue
    layer, chosen = running.layer_instance.name, running.variable_filter
    state = [f"{layer}/{module.name}/{role.value}_scale" for role in Role]
    if not chosen or any(name in path for path in state for name in chosen):
      raise ValueError(
        "nn.WeightNorm: its variable_filter must leave FP8 state alone; got variable_filter="
        f"{chosen!r}, which takes the scales and histories of {'/'.join(module.path)!r} for "
        f"weights. Pass variable_filter={{'{layer}/kernel'}}."
      )


# Part of the key of JAX's compilation caches, should a module trace a compiled function.
_declaring: Any = jax.make_user_context(False)


def declaring_metrics() -> Any:
  """Makes the context in which modules that are being initialised create their metrics too."""
  return _declaring(True)


def _read_metrics(module: nn.Module, role: str) -> TensorState:
  fresh = init_metrics()
  scope, collection = _home(module)
  if _declaring.value and not scope.is_mutable_collection(collection):
    raise ValueError(
      f"add_metrics: every FP8 contraction needs the collection {OVERWRITE_WITH_GRADIENT!r} for "
      f"its metrics; got none at {'/'.join(module.path)!r}. Map it: name it in the variable_axes "
      "of nn.scan or nn.vmap, beside 'params'."
    )
  there = (scope.has_variable(collection, f"{role}_{key}") for key in fresh)
  return _read_all(module, role, fresh) if _declaring.value or any(there) else {}


def _read_all(module: nn.Module, role: str, fresh: Mapping[str, np.ndarray]) -> TensorState:
  return {key: _read(module, f"{role}_{key}", value) for key, value in fresh.items()}


def read_key(module: nn.Module, recipe: Recipe) -> jax.Array | None:
  """Makes the PRNG key of one contraction, where the recipe rounds by one and there is one.

  Args:
    module: bound module; its keys are of the collection ``sr_rng``.
    recipe: says whether it rounds stochastically.

  Returns:
    A key of this call's own; None where none is asked for, or none was passed.
  """
  wanted = recipe.rounds_by_key and module.has_rng(STOCHASTIC_ROUNDING)
  return module.make_rng(STOCHASTIC_ROUNDING) if wanted else None


# Whether state is among the parameters, and so follows them through every lifted transformation.
_among_params: Any = jax.make_user_context(False)


def among_params() -> Any:
  """Makes the context in which state is below its module in ``params``, under the usual name."""
  return _among_params(True)


def is_among_params() -> bool:
  """Tells whether state is below its module in ``params`` here."""
  return _among_params.value


def find_state(module: nn.Module) -> dict[str, Any]:
  """Returns the variables of a module's state that there are, by name, without boxes."""
  scope, collection = _home(module)
  return unbox(dict(scope.variables().get(collection, {})))


# Beside state that is among the parameters: a leaf of a dtype that no arithmetic takes. A function
# that computes with all parameters, as of ``nn.map_variables``, fails and leaves the state alone.
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
  """Makes the guard of a module's state, with the axes of lifted transformations that it has."""
  shape = min((unbox(leaf).shape for leaf in leaves.values()), key=math.prod)
  data = jnp.zeros((*shape, 1), jnp.uint32)
  return {GUARD: jax.random.wrap_key_data(data, impl=_GUARD_IMPL)}


def _home(module: nn.Module) -> tuple[Any, str]:
  """Returns the scope and the collection of a module's state."""
  scope: Any = module.scope
  if _among_params.value:
    return scope.push(OVERWRITE_WITH_GRADIENT, reuse=True), "params"
  return scope, OVERWRITE_WITH_GRADIENT


def _variable(module: nn.Module, name: str, fresh: np.ndarray) -> Any | None:
  """Returns what a variable of a module's state holds, creating it where that is allowed.

  Where parameters of the layer that the module is in are boxed, the variable is boxed too.

  Args:
    module: bound module.
    name: of the variable.
    fresh: its first value.

  Returns:
    An array, without its box; None where there is none and none may be made.
  """
  scope, collection = _home(module)
  if not scope.has_variable(collection, name):
    if not scope.is_mutable_collection(collection):
      return None
    own = _parameters_beside(module).values()
    scope.variable(collection, name, lambda: box_as(jnp.asarray(fresh), own))
    if _among_params.value and not scope.has_variable(collection, GUARD):
      scope.variable(collection, GUARD, lambda: state_guard({name: fresh})[GUARD])
  return unbox(scope.get_variable(collection, name))


def parameters_beside(module: nn.Module) -> dict[str, Any]:
  """Returns the arrays among the parameters of the layer that a module is in, without boxes."""
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
      f"{'/'.join(module.path)!r}. Pass the whole variables dict, and for a checkpoint that was "
      "trained without FP8 add fresh state with upgrade_variables(model, variables, *inputs)."
    )
  require_float32(type(module).__name__, repr("/".join((*module.path, name))), found)
  return found
