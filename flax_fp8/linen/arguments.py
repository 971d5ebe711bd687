"""What users pass with a model: arguments, known by shapes alone if need be, and variables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def fill(tree: Any) -> Any:
  """Puts zeros where a pytree has a ShapeDtypeStruct; all else stays as it is."""
  is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)
  zeros = lambda x: jnp.zeros(x.shape, x.dtype) if is_shape(x) else x
  return jax.tree.map(zeros, tree, is_leaf=is_shape)


def require_variables(caller: str, variables: Any) -> None:
  """Raises ValueError where ``variables`` is no variables dict."""
  if not isinstance(variables, Mapping) or "params" not in variables:
    raise ValueError(
      f"{caller}: variables must be a variables dict with the collection 'params'; got "
      f"{sorted(map(str, variables)) if isinstance(variables, Mapping) else type(variables)}. "
      "Wrap bare parameters as {'params': params}; of a TrainState pass what its params hold."
    )
