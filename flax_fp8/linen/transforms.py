"""``nn.scan``, ``nn.vmap`` and ``nn.cond`` that know of FP8 state.

A lifted transformation hides every collection that it is not told of. State that is hidden can't be
read, and what is forgotten once is easily forgotten again, so here it need not be named. And a
branch that was not taken must leave no amax behind, though under ``vmap`` it runs all the same.
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
  """Scans a module or function as ``nn.scan``, its FP8 state treated as its parameters.

  ``nn.scan(target, variable_axes | {"_overwrite_with_gradient": variable_axes["params"]}, ...)``;
  or, where ``variable_broadcast`` or ``variable_carry`` names the parameters, this one for state
  too. A step has its own key for stochastic rounding.

  Args:
    target: as for ``nn.scan``.
    variable_axes: as for ``nn.scan``. Where ``_overwrite_with_gradient`` is named, here or in the
      two that follow, all is left as it is.
    variable_broadcast: as for ``nn.scan``.
    variable_carry: as for ``nn.scan``.
    split_rngs: as for ``nn.scan``; ``sr_rng`` is split unless it is named.
    *args: the others of ``nn.scan``, in their order.
    **kwargs: the same by name.

  Returns:
    What ``nn.scan`` returns.

  Raises:
    TypeError: ``target`` is no module or function; ``variable_axes`` or ``split_rngs`` no mapping.

  Numerics:
    State that is broadcast meets all steps: differentiate with ``flax_fp8.value_and_grad``, so that
    it becomes the maximum over them.

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
  """Maps a module or function as ``nn.vmap``, its FP8 state treated as its parameters.

  ``nn.vmap(target, variable_axes | {"_overwrite_with_gradient": variable_axes["params"]}, ...)``;
  each copy has its own key for stochastic rounding.

  Args:
    target: as for ``nn.vmap``.
    variable_axes: as for ``nn.vmap``. Where ``_overwrite_with_gradient`` is named, it is left as it
      is.
    split_rngs: as for ``nn.vmap``; ``sr_rng`` is split unless it is named.
    *args: the others of ``nn.vmap``, in their order.
    **kwargs: the same by name.

  Returns:
    What ``nn.vmap`` returns.

  Raises:
    TypeError: ``target`` is no module or function; ``variable_axes`` or ``split_rngs`` no mapping.

  Numerics:
    Experts with parameters of their own have state of their own; what shares parameters shares
    state, whose amax is the largest of all copies.

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
  """Takes one of two branches as ``nn.cond``; the other leaves the FP8 state alone.

  ``true_fun(mdl, *operands) if pred else false_fun(mdl, *operands)``. Under ``vmap`` JAX runs both
  branches and selects, so that with ``nn.cond`` the amaxes of what was not taken, a pipeline's
  bubbles say, enter the histories. Here they do not. And where variables are made, in ``init``,
  both branches make theirs.

  Args:
    pred: bool scalar.
    true_fun: takes ``mdl`` and the operands.
    false_fun: the same; its outputs have the same structure, shapes and dtypes.
    mdl: the module whose variables, or whose submodules' variables, the branches use.
    *operands: arrays.
    **kwargs: ``variables`` and ``rngs`` of ``nn.cond``.

  Returns:
    What the branch returns.

  Raises:
    TypeError: a branch is no function, ``mdl`` no bound module, ``pred`` no scalar.

  Numerics:
    A branch not taken is a path that did not come: state that no taken branch uses keeps its value
    under ``flax_fp8.value_and_grad``.

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
  """Raises TypeError for arguments that no lifted transformation takes."""
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
      f"cond: mdl must be a bound module; got mdl={fields.show(mdl)}. Pass the module whose "
      "variables the branches use, made inside of the one that calls cond, before the operands."
    )
  try:
    is_scalar = jax.typeof(pred).shape == ()
  except TypeError:
    is_scalar = False
  if not is_scalar:
    raise TypeError(
      f"cond: pred must be a bool scalar; got pred={fields.show(pred)}. Take jnp.all or jnp.any, "
      "or map cond over the array with fp8.vmap."
    )


def _where(taken: Any, fun: Callable[..., Any]) -> Callable[..., Any]:
  """Runs a function whose state gets no cotangent where it is not taken."""
  silence = lambda state: jax.tree.map(
    lambda leaf: _silence(to_max_grad(cast_once(leaf)), taken), state
  )
  return nn.map_variables(fun, OVERWRITE_WITH_GRADIENT, trans_in_fn=silence)


@jax.custom_vjp
def _silence(leaf: jax.Array, taken: jax.Array) -> jax.Array:
  """Returns state as it is; its cotangent is that of a path that did not come, unless taken."""
  del taken
  return leaf


def _silence_fwd(leaf: jax.Array, taken: jax.Array) -> tuple[jax.Array, jax.Array]:
  return leaf, taken


def _silence_bwd(taken: jax.Array, new: jax.Array) -> tuple[jax.Array, None]:
  return to_max_grad(jnp.where(taken, to_float32(new), -jnp.inf)), None


_silence.defvjp(_silence_fwd, _silence_bwd)


def _follow_params(axes: Mapping[Any, Any]) -> dict[Any, Any]:
  """Gives state the axis of the parameters, where these have one."""
  followed = dict(axes)
  for each, axis in axes.items():
    if in_filter(each, "params"):
      followed[OVERWRITE_WITH_GRADIENT] = axis
  return followed


def _split(rngs: Mapping[Any, bool] | None) -> dict[Any, bool]:
  """Splits the keys of stochastic rounding, unless something is said of them."""
  given = dict(rngs or {})
  is_named = any(in_filter(each, STOCHASTIC_ROUNDING) for each in given)
  return given if is_named else {**given, STOCHASTIC_ROUNDING: True}
