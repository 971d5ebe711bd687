"""``nn.scan``, ``nn.vmap`` and ``nn.cond`` with support for FP8 state.

Linen's lifted transformations hide every collection that is not named in their arguments. The
functions here lift the FP8 state together with the parameters, so it need not be named. ``cond``
also keeps the amaxes of a branch that is not taken out of the state, even under ``vmap``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import in_filter, union_filters
from jax import lax

from flax_fp8 import fields
from flax_fp8.linen.state import OVERWRITE_WITH_GRADIENT, STOCHASTIC_ROUNDING
from flax_fp8.meta_dtype import to_float32, to_max_grad
from flax_fp8.state_cast import cast_once


def scan(
  target: Any,
  variable_axes: Mapping[Any, Any] | None = None,
  variable_broadcast: Any = False,
  variable_carry: Any = False,
  split_rngs: Mapping[Any, bool] | None = None,
  *args: Any,
  **kwargs: Any,
) -> Any:
  """``nn.scan`` that lifts FP8 state in the same way as the parameters.

  ``nn.scan(target, variable_axes | {"_overwrite_with_gradient": variable_axes["params"]}, ...)``

  If ``variable_broadcast`` or ``variable_carry`` names the parameters, the state is added there
  instead. Each step has its own key for stochastic rounding.

  Args:
    target: as in ``nn.scan``.
    variable_axes: as in ``nn.scan``. If this or one of the next two arguments names
      ``_overwrite_with_gradient``, all three are passed on unchanged.
    variable_broadcast: as in ``nn.scan``.
    variable_carry: as in ``nn.scan``.
    split_rngs: as in ``nn.scan``. ``sr_rng`` is split unless it is named.
    *args: further arguments of ``nn.scan``.
    **kwargs: further keyword arguments of ``nn.scan``.

  Returns:
    The result of ``nn.scan``.

  Raises:
    TypeError: ``target`` is not a module or function, or ``variable_axes`` or ``split_rngs`` is not
      a mapping.

  Numerics:
    All steps share broadcast state. Differentiate with ``flax_fp8.value_and_grad`` to get the
    maximum over the steps as the new state.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> class Layer(nn.Module):
    ...   @nn.compact
    ...   def __call__(self, x, _):
    ...     return nn.Dense(8, dot_general_cls=fp8.Fp8DotGeneral)(x), None
    >>> layers = fp8.scan(Layer, {"params": 0}, split_rngs={"params": True}, length=3)()
    >>> variables = layers.init(jax.random.key(0), jnp.ones((2, 8)), None)
    >>> variables["_overwrite_with_gradient"]["Dense_0"]["Fp8DotGeneral_0"]["input_scale"].shape
    (3, 1)

  References:
    flax.linen.scan.
  """
  _check("scan", target, variable_axes, split_rngs)
  axes, broadcast, carry = dict(variable_axes or {}), variable_broadcast, variable_carry
  named = [*axes, broadcast, carry]
  if not any(in_filter(each, OVERWRITE_WITH_GRADIENT) for each in named):
    if in_filter(broadcast, "params"):
      broadcast = union_filters(broadcast, OVERWRITE_WITH_GRADIENT)
    elif in_filter(carry, "params"):
      carry = union_filters(carry, OVERWRITE_WITH_GRADIENT)
    else:
      axes = _follow_params(axes)
  return nn.scan(target, axes, broadcast, carry, _split(split_rngs), *args, **kwargs)


def vmap(
  target: Any,
  variable_axes: Mapping[Any, Any] | None = None,
  split_rngs: Mapping[Any, bool] | None = None,
  *args: Any,
  **kwargs: Any,
) -> Any:
  """``nn.vmap`` that lifts FP8 state in the same way as the parameters.

  ``nn.vmap(target, variable_axes | {"_overwrite_with_gradient": variable_axes["params"]}, ...)``

  Each copy has its own key for stochastic rounding.

  Args:
    target: as in ``nn.vmap``.
    variable_axes: as in ``nn.vmap``. If it names ``_overwrite_with_gradient``, it is passed on
      unchanged.
    split_rngs: as in ``nn.vmap``. ``sr_rng`` is split unless it is named.
    *args: further arguments of ``nn.vmap``.
    **kwargs: further keyword arguments of ``nn.vmap``.

  Returns:
    The result of ``nn.vmap``.

  Raises:
    TypeError: ``target`` is not a module or function, or ``variable_axes`` or ``split_rngs`` is not
      a mapping.

  Numerics:
    Experts with separate parameters have separate state. Copies with shared parameters share state.
    The recorded amax is then the maximum over all copies.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> class Expert(nn.Module):
    ...   @nn.compact
    ...   def __call__(self, x):
    ...     return nn.Dense(8, dot_general_cls=fp8.Fp8DotGeneral)(x)
    >>> experts = fp8.vmap(Expert, {"params": 0}, {"params": True})()
    >>> variables = experts.init(jax.random.key(0), jnp.ones((4, 2, 8)))
    >>> variables["_overwrite_with_gradient"]["Dense_0"]["Fp8DotGeneral_0"]["input_scale"].shape
    (4, 1)

  References:
    flax.linen.vmap.
  """
  _check("vmap", target, variable_axes, split_rngs)
  axes = dict(variable_axes or {})
  if not any(in_filter(each, OVERWRITE_WITH_GRADIENT) for each in axes):
    axes = _follow_params(axes)
  return nn.vmap(target, axes, _split(split_rngs), *args, **kwargs)


def cond(
  pred: Any,
  true_fun: Callable[..., Any],
  false_fun: Callable[..., Any],
  mdl: nn.Module,
  *operands: Any,
  **kwargs: Any,
) -> Any:
  """``nn.cond`` in which only the taken branch updates the FP8 state.

  ``true_fun(mdl, *operands) if pred else false_fun(mdl, *operands)``

  Under ``vmap``, JAX runs both branches and selects a result. With ``nn.cond``, the amaxes of the
  other branch would then enter the histories, for example those of pipeline bubbles. Here they do
  not. In ``init``, both branches create their variables.

  Args:
    pred: bool scalar.
    true_fun: a function of ``mdl`` and the operands.
    false_fun: the same. Its outputs must have the same structure, shapes and dtypes.
    mdl: the bound module that holds the variables of both branches, directly or in submodules.
    *operands: arrays.
    **kwargs: ``variables`` and ``rngs`` of ``nn.cond``.

  Returns:
    The result of the taken branch.

  Raises:
    TypeError: a branch is not a function, ``mdl`` is not a bound module, or ``pred`` is not a
      scalar.

  Numerics:
    State that no taken branch uses keeps its value under ``flax_fp8.value_and_grad``.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> class Stage(nn.Module):
    ...   @nn.compact
    ...   def __call__(self, busy, x):
    ...     dense = nn.Dense(8, dot_general_cls=fp8.Fp8DotGeneral)
    ...     return fp8.cond(busy, lambda dense, x: dense(x), lambda dense, x: x, dense, x)
    >>> stages = fp8.vmap(Stage, {"params": 0}, {"params": True})()
    >>> busy, x = jnp.array([True, False]), jnp.full((2, 4, 8), 3.0)
    >>> variables = stages.init(jax.random.key(0), busy, x)
    >>> loss = lambda variables: jnp.sum(stages.apply(variables, busy, x) ** 2)
    >>> state = jax.jit(fp8.grad(loss))(variables)["_overwrite_with_gradient"]["Dense_0"]
    >>> print(state["Fp8DotGeneral_0"]["input_amax_history"][:, 0])
    [3. 0.]

  References:
    flax.linen.cond.
  """
  _check_cond(pred, mdl, true_fun=true_fun, false_fun=false_fun)
  if mdl.is_mutable_collection(OVERWRITE_WITH_GRADIENT):
    taken, other = true_fun(mdl, *operands), false_fun(mdl, *operands)
    return lax.cond(pred, lambda: taken, lambda: other)
  branches = _where(pred, true_fun), _where(jnp.logical_not(pred), false_fun)
  return nn.cond(pred, *branches, mdl, *operands, **kwargs)


def _check(owner: str, target: Any, variable_axes: Any, split_rngs: Any) -> None:
  """Raises TypeError for invalid arguments of a lifted transformation."""
  if not callable(target) and not isinstance(target, nn.Module):
    raise TypeError(
      f"{owner}: target must be a module class, a module or a function; got "
      f"target={fields.show(target)}. Pass the class, such as nn.Dense."
    )
  of = {"variable_axes": "collections to axes", "split_rngs": "PRNG collections to bools"}
  for (field, what), value in zip(of.items(), (variable_axes, split_rngs), strict=True):
    if value is not None and not isinstance(value, Mapping):
      raise TypeError(
        f"{owner}: {field} must be a mapping from {what}; got {field}={fields.show(value)}. Write "
        f"{field}={{'params': {0 if field == 'variable_axes' else True}}}."
      )


def _check_cond(pred: Any, mdl: Any, **branches: Any) -> None:
  for field, branch in branches.items():
    fields.function("cond", field, branch, "Pass a function of mdl and the operands.")
  if not isinstance(mdl, nn.Module) or mdl.scope is None:
    raise TypeError(
      f"cond: mdl must be a bound module; got mdl={fields.show(mdl)}. Before the operands, pass "
      "the module that the branches use, created inside the module that calls cond."
    )
  try:
    is_scalar = jax.typeof(pred).shape == ()
  except TypeError:
    is_scalar = False
  if not is_scalar:
    raise TypeError(
      f"cond: pred must be a bool scalar; got pred={fields.show(pred)}. Reduce it with jnp.all or "
      "jnp.any, or map cond over the array with fp8.vmap."
    )


def _where(taken: Any, fun: Callable[..., Any]) -> Callable[..., Any]:
  """Runs a branch. Its state gets no cotangent if the branch is not taken."""
  mask = lambda state: jax.tree.map(
    lambda leaf: _mask_cotangent(to_max_grad(cast_once(leaf)), taken), state
  )
  return nn.map_variables(fun, OVERWRITE_WITH_GRADIENT, trans_in_fn=mask)


@jax.custom_vjp
def _mask_cotangent(leaf: jax.Array, taken: jax.Array) -> jax.Array:
  """Returns state unchanged. If the branch is not taken, the cotangent is that of unused state."""
  del taken
  return leaf


def _mask_cotangent_fwd(leaf: jax.Array, taken: jax.Array) -> tuple[jax.Array, jax.Array]:
  return leaf, taken


def _mask_cotangent_bwd(taken: jax.Array, new: jax.Array) -> tuple[jax.Array, None]:
  return to_max_grad(jnp.where(taken, to_float32(new), -jnp.inf)), None


_mask_cotangent.defvjp(_mask_cotangent_fwd, _mask_cotangent_bwd)


def _follow_params(axes: Mapping[Any, Any]) -> dict[Any, Any]:
  """Adds the state with the axis of the parameters, if they have one."""
  followed = dict(axes)
  for each, axis in axes.items():
    if in_filter(each, "params"):
      followed[OVERWRITE_WITH_GRADIENT] = axis
  return followed


def _split(rngs: Mapping[Any, bool] | None) -> dict[Any, bool]:
  """Splits the keys of stochastic rounding, unless ``rngs`` names them."""
  given = dict(rngs or {})
  is_named = any(in_filter(each, STOCHASTIC_ROUNDING) for each in given)
  return given if is_named else {**given, STOCHASTIC_ROUNDING: True}
