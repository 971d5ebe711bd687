"""Arguments of a model of which arrays may be known by their shapes alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def fill(tree: Any) -> Any:
  """Puts zeros where a pytree has a ShapeDtypeStruct; all else stays as it is."""
  is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)
  zeros = lambda x: jnp.zeros(x.shape, x.dtype) if is_shape(x) else x
  return jax.tree.map(zeros, tree, is_leaf=is_shape)
