"""FP8 state for variables that come from a model or checkpoint without it, or of another recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_fp8.linen.state import OVERWRITE_WITH_GRADIENT


def upgrade_variables(
  module: nn.Module, variables: Any, *init_args: Any, **init_kwargs: Any
) -> Any:
  """Gives variables the FP8 state that a model has: what is missing is added, the rest dropped.

  Args:
    module: the FP8 model.
    variables: variables dict of the same model without FP8, with the state of some layers, or with
      that of another recipe.
    *init_args: what the model's ``init`` takes after the PRNG key; arrays or ShapeDtypeStructs.
    **init_kwargs: the same by keyword.

  Returns:
    ``variables`` with the state that ``module.init`` makes, its values taken from ``variables``
    where these have a leaf of the same path and shape. Other collections stay as they are. What the
    model has no state for is left out: under a recipe without state, the whole collection.

  Raises:
    ValueError: ``variables`` is no variables dict.

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
    flax.linen.Module.init.
  """
  if not isinstance(variables, Mapping) or "params" not in variables:
    raise ValueError(
      "upgrade_variables: variables must be a variables dict with the collection 'params'; got "
      f"{sorted(variables) if isinstance(variables, Mapping) else type(variables)}. Wrap bare "
      "parameters as {'params': params}."
    )
  fresh = _fresh_state(module, init_args, init_kwargs)
  frozen = isinstance(variables, flax.core.FrozenDict)
  new: dict[str, Any] = flax.core.unfreeze(variables) if frozen else dict(variables)
  old = new.pop(OVERWRITE_WITH_GRADIENT, {})
  if fresh:
    new[OVERWRITE_WITH_GRADIENT] = _take(old, fresh)
  return flax.core.freeze(new) if frozen else new


def _fresh_state(module: nn.Module, args: Any, kwargs: Any) -> Any:
  """Initialises the model under jit and keeps the state alone, so that no parameter is computed."""
  is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)

  def init() -> Any:
    fill = lambda x: jnp.zeros(x.shape, x.dtype) if is_shape(x) else x
    full_args, full_kwargs = jax.tree.map(fill, (args, kwargs), is_leaf=is_shape)
    made = module.init(jax.random.key(0), *full_args, **full_kwargs)
    return flax.core.unfreeze(made).get(OVERWRITE_WITH_GRADIENT, {})

  return jax.jit(init)()


def _take(old: Any, fresh: Any) -> Any:
  """Fills the fresh state with the old one's values, where a leaf has the same path and shape."""
  if isinstance(fresh, Mapping):
    inner = old if isinstance(old, Mapping) else {}
    return {key: _take(inner.get(key), value) for key, value in fresh.items()}
  same = getattr(old, "shape", None) == fresh.shape
  return old if same else fresh
