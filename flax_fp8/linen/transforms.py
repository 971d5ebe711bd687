"""``nn.scan`` and ``nn.vmap`` in which FP8 state goes where the parameters go.

A lifted transformation hides every collection that it is not told of. State that is hidden can't be
read, and what is forgotten once is easily forgotten again, so here it need not be named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from flax.core.scope import in_filter, union_filters

from flax_fp8.linen.state import OVERWRITE_WITH_GRADIENT, STOCHASTIC_ROUNDING


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
  axes = dict(variable_axes or {})
  if not any(in_filter(each, OVERWRITE_WITH_GRADIENT) for each in axes):
    axes = _follow_params(axes)
  return nn.vmap(target, axes, _split(split_rngs), *args, **kwargs)


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
