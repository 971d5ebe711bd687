"""What Linen keeps for a contraction: its state as variables, cast once, and its PRNG keys."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Generator
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from flax_fp8.meta_dtype import to_max_grad
from flax_fp8.ops import check
from flax_fp8.recipes.base import Recipe, Role, TensorState

OVERWRITE_WITH_GRADIENT = "_overwrite_with_gradient"
STOCHASTIC_ROUNDING = "sr_rng"


def read_state(module: nn.Module, recipe: Recipe) -> dict[str, TensorState]:
  """Reads a module's state, creating it while the module is being initialised.

  Args:
    module: bound module; its variables are ``{role}_{key}`` of the collection
      ``_overwrite_with_gradient``.
    recipe: declares the keys.

  Returns:
    For each role the leaves, ready for ``ops.dot_general``.

  Raises:
    TypeError: ``recipe`` is no recipe.
    ValueError: the module is applied without its state.
  """
  check.recipe(type(module).__name__, recipe)
  return {
    role.value: {
      key: _read(module, f"{role.value}_{key}", value)
      for key, value in recipe.init_state(role).items()
    }
    for role in Role
  }


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
_among_params: ContextVar[bool] = ContextVar("among_params", default=False)


@contextlib.contextmanager
def among_params() -> Generator[None]:
  """While inside, a module's state is at ``_overwrite_with_gradient`` below it in ``params``."""
  token = _among_params.set(True)
  try:
    yield
  finally:
    _among_params.reset(token)


def variable(module: nn.Module, name: str, fresh: np.ndarray) -> Any | None:
  """Returns a variable of a module's state, creating it where that is allowed.

  Args:
    module: bound module.
    name: of the variable.
    fresh: its first value.

  Returns:
    Linen's variable; None where there is none and none may be made.
  """
  scope: Any = module.scope
  collection = OVERWRITE_WITH_GRADIENT
  if _among_params.get():
    scope, collection = scope.push(OVERWRITE_WITH_GRADIENT, reuse=True), "params"
  if not (scope.has_variable(collection, name) or scope.is_mutable_collection(collection)):
    return None
  return scope.variable(collection, name, lambda: jnp.asarray(fresh))


def _read(module: nn.Module, name: str, fresh: np.ndarray) -> jax.Array:
  if (found := variable(module, name, fresh)) is None:
    raise ValueError(
      f"{type(module).__name__}: applying the model needs the collection "
      f"{OVERWRITE_WITH_GRADIENT!r}; got variables without {name!r} at "
      f"{'/'.join(module.path)!r}. Pass the whole variables dict, and for a checkpoint that was "
      "trained without FP8 add fresh state with upgrade_variables(model, variables, *inputs)."
    )
  return _cast_once(module, found.value)


# For each apply (its root scope), the float32 tracers that were cast and what they were cast to.
_casts: weakref.WeakKeyDictionary[Any, dict[int, tuple[Any, jax.Array]]]
_casts = weakref.WeakKeyDictionary()


def _cast_once(module: nn.Module, value: Any) -> Any:
  """Casts a traced value to fp32_max_grad, the same value always to the same cast.

  A layer that is called several times in one apply reads the same tracer each time. If each call
  made its own cast, the cotangents would meet behind the casts, in float32, and be summed.
  """
  if not isinstance(value, jax.core.Tracer):
    return value
  assert module.scope is not None
  casts = _casts.setdefault(module.scope.root, {})
  if id(value) not in casts:
    casts[id(value)] = (value, to_max_grad(value))  # holding the tracer keeps its id from reuse
  return casts[id(value)][1]
