"""Names that JAX had when a model's package was released, and has dropped since.

The packages stay as they are on PyPI. What a restored name computes is JAX's.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp

MISSING: tuple[tuple[Any, str, Any], ...] = (
  (jnp, "DeviceArray", jax.Array),  # annotations of dalle-mini
  (jax.random, "KeyArray", jax.Array),  # annotations of flaim
  (jax.experimental, "PartitionSpec", jax.sharding.PartitionSpec),  # dalle-mini
)
# Arguments of functions of jax.numpy by their former names: T5 and others; flaxmodels.
RENAMED = {"clip": {"a_min": "min", "a_max": "max"}, "reshape": {"newshape": "shape"}}


def restore() -> None:
  for module, name, value in MISSING:
    if not hasattr(module, name):
      setattr(module, name, value)
  for function, names in RENAMED.items():
    taken = inspect.signature(getattr(jnp, function)).parameters
    if names.keys() - taken.keys():
      setattr(jnp, function, _with_old_names(getattr(jnp, function), names))


def _with_old_names(function: Callable[..., Any], names: Mapping[str, str]) -> Callable[..., Any]:
  def call(*args: Any, **kwargs: Any) -> Any:
    return function(*args, **{names.get(name, name): value for name, value in kwargs.items()})

  parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
  call.__signature__ = inspect.Signature(parameters)
  return call
