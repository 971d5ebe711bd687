"""What Linen keeps for a contraction: its state as variables, cast once, and its PRNG keys."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from flax_fp8.linen.boxes import box_as, unbox
from flax_fp8.meta_dtype import to_max_grad
from flax_fp8.ops import check
from flax_fp8.ops.metrics import init_metrics
from flax_fp8.recipes.base import Recipe, Role, TensorState

OVERWRITE_WITH_GRADIENT = "_overwrite_with_gradient"
STOCHASTIC_ROUNDING = "sr_rng"


def read_state(module: nn.Module, recipe: Recipe, x: Any) -> dict[str, TensorState]:
  """Reads a module's state, creating it while the module is being initialised.

  Args:
    module: bound module; its variables are ``{role}_{key}`` of the collection
      ``_overwrite_with_gradient``.
    recipe: declares the keys.
    x: the module's input; what another module with this recipe has read of the same array stands
      for this module's own, and its new value becomes the new value of both.

  Returns:
    For each role the leaves, ready for ``ops.dot_general``; with metrics where there are any.

  Raises:
    TypeError: ``recipe`` is no recipe.
    ValueError: the module is applied without its state.
  """
  state = read_recipe_state(module, recipe)
  state[Role.INPUT.value] = _share(module, recipe, x, state[Role.INPUT.value])
  return {role: leaves | _read_metrics(module, role) for role, leaves in state.items()}


def read_recipe_state(module: nn.Module, recipe: Recipe) -> dict[str, TensorState]:
  """Reads a module's state without metrics; else as ``read_state``."""
  check.recipe(type(module).__name__, recipe)
  return {role.value: _read_all(module, role.value, recipe.init_state(role)) for role in Role}


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
    own = _parameters_beside(module)
    scope.variable(collection, name, lambda: box_as(jnp.asarray(fresh), own))
  return unbox(scope.get_variable(collection, name))


# Layers that contract their parameter "kernel", cast to the dtype of the computation, and do no
# more to it, where the function says so. Subclasses may.
_cast_their_kernel: dict[type[nn.Module], Callable[[Any], bool]] = {}


def casts_its_kernel(layer: type[nn.Module], where: Callable[[Any], bool]) -> None:
  """Declares that all a layer does to its kernel is a cast; in the modules of which it is true."""
  _cast_their_kernel[layer] = where


for _layer in (nn.Dense, nn.DenseGeneral):
  casts_its_kernel(_layer, lambda module: module.promote_dtype is promote_dtype)


def stored_kernel(module: nn.Module, kernel: jax.Array) -> jax.Array | None:
  """Finds the parameter that a kernel is, or is a cast of, in the layer that a module is in.

  Args:
    module: bound module.
    kernel: what the module contracts its input with.

  Returns:
    The kernel itself where a parameter of its dtype and size is there; the parameter of which the
    layer is known to cast its kernel; else None.
  """
  if is_among(_parameters_beside(module), kernel):
    return kernel
  layer: Any = module.parent
  if not _cast_their_kernel.get(type(layer), lambda _: False)(layer):
    return None
  stored: Any = unbox(layer.get_variable("params", "kernel"))
  if stored is None or stored.shape != kernel.shape:
    return None
  return stored if stored.dtype.name in check.COMPUTE_DTYPES else None


def is_lifted(module: nn.Module) -> bool:
  """Tells whether a bound module stands inside a lifted transformation, ``nn.scan`` for one."""
  scope: Any = module.scope
  return bool(scope.root.path)


def is_among(params: Any, kernel: jax.Array) -> bool:
  """Tells whether parameters hold a kernel, judged by its dtype and size."""
  leaves = jax.tree.leaves(params)
  return any(leaf.dtype == kernel.dtype and leaf.size == kernel.size for leaf in leaves)


def _parameters_beside(module: nn.Module) -> list[Any]:
  """Returns the parameters, boxed or not, of the layer that a module is in."""
  layer: Any = module.scope and module.scope.parent
  return [] if layer is None else list(layer.variables().get("params", {}).values())


def _read(module: nn.Module, name: str, fresh: np.ndarray) -> jax.Array:
  if (found := _variable(module, name, fresh)) is None:
    raise ValueError(
      f"{type(module).__name__}: applying the model needs the collection "
      f"{OVERWRITE_WITH_GRADIENT!r}; got variables without {name!r} at "
      f"{'/'.join(module.path)!r}. Pass the whole variables dict, and for a checkpoint that was "
      "trained without FP8 add fresh state with upgrade_variables(model, variables, *inputs)."
    )
  return _cast_once(module, found)


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


# For each apply, what was read for the input that a tracer is, by that tracer and the recipe.
_inputs: weakref.WeakKeyDictionary[Any, dict[tuple[int, Recipe], tuple[Any, TensorState]]]
_inputs = weakref.WeakKeyDictionary()


def _share(module: nn.Module, recipe: Recipe, x: Any, own: TensorState) -> TensorState:
  """Lets layers with one input quantise it by one state, so that XLA does it once.

  They see the same amaxes, so their states are the same unless they were made apart.
  """
  if not isinstance(x, jax.core.Tracer):
    return own
  assert module.scope is not None
  inputs = _inputs.setdefault(module.scope.root, {})
  _, first = inputs.setdefault((id(x), recipe), (x, own))  # holding x keeps its id from reuse
  kinds = lambda state: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
  return jax.tree.map(_instead, first, own) if kinds(first) == kinds(own) else own


@jax.custom_vjp
def _instead(first: jax.Array, own: jax.Array) -> jax.Array:
  """Returns the first; its cotangent, which is its new value, is that of the second alone.

  The first has its own from where it was read.
  """
  del own
  return first


def _instead_fwd(first: jax.Array, own: jax.Array) -> tuple[jax.Array, None]:
  del own
  return first, None


def _instead_bwd(_: None, new: jax.Array) -> tuple[None, jax.Array]:
  return None, new


_instead.defvjp(_instead_fwd, _instead_bwd)
