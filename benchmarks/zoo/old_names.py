"""Names that JAX had when a model's package was released, and has dropped since.

The packages are used as they are on PyPI. Where one needs such a name to be imported or to run, the
name is put back here; what it computes is JAX's.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp

# Arguments of functions of jax.numpy, by their former names.
RENAMED: dict[str, dict[str, str]] = {
  "clip": {"a_min": "min", "a_max": "max"},  # T5 and its kin, of transformers
  "reshape": {"newshape": "shape"},  # flaxmodels
}


def restore() -> None:
  """Puts the names back."""
  missing: tuple[tuple[Any, str, Any], ...] = (
    (jnp, "DeviceArray", jax.Array),  # annotations of dalle-mini
    (jax.random, "KeyArray", jax.Array),  # annotations of flaim
    (jax.experimental, "PartitionSpec", jax.sharding.PartitionSpec),  # dalle-mini
  )
  for module, name, value in missing:
    if not hasattr(module, name):
      setattr(module, name, value)
  for function, names in RENAMED.items():
    taken = inspect.signature(getattr(jnp, function)).parameters
    if names.keys() - taken.keys():
      setattr(jnp, function, _with_old_names(getattr(jnp, function), names))


def _with_old_names(function: Callable[..., Any], names: Mapping[str, str]) -> Callable[..., Any]:
  """Lets a function take arguments by their former names."""

  def call(*args: Any, **kwargs: Any) -> Any:
    given = {names.get(name, name): value for name, value in kwargs.items()}
    return function(*args, **given)

  parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
  call.__signature__ = inspect.Signature(parameters)
  return call
