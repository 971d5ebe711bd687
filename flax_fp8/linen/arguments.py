"""Checks and fills the modules, variables and arguments that users pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_fp8 import fields


def fill(tree: Any) -> Any:
  """Replaces each ShapeDtypeStruct in a pytree by zeros."""
  is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)
  zeros = lambda x: jnp.zeros(x.shape, x.dtype) if is_shape(x) else x
  return jax.tree.map(zeros, tree, is_leaf=is_shape)


def require_module(caller: str, module: Any) -> None:
  """Raises TypeError if ``module`` is not an instance of a Linen module."""
  if not isinstance(module, nn.Module):
    raise TypeError(
      f"{caller}: module must be an instance of a Linen module; got module={fields.show(module)}. "
      "Pass Model(...), not the class, its apply function or an NNX module."
    )


def require_variables(caller: str, variables: Any) -> None:
  """Raises ValueError if ``variables`` is not a variables dict."""
  if not isinstance(variables, Mapping) or "params" not in variables:
    raise ValueError(
      f"{caller}: variables must be a variables dict with the collection 'params'; got "
      f"{_names(variables)}. "
      "Wrap bare parameters as {'params': params}, or pass the params field of a TrainState."
    )


def _names(variables: Any) -> str:
  if not isinstance(variables, Mapping):
    return fields.show(type(variables))
  return fields.cut(sorted(map(str, variables)))
