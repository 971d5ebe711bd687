"""Removal of FP8 state from variables, to continue with the same model without FP8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax_fp8.linen.arguments import require_variables
from flax_fp8.linen.containers import with_items
from flax_fp8.linen.state import OVERWRITE_WITH_GRADIENT


def downgrade_variables(variables: Any) -> Any:
  """Removes the FP8 state from variables.

  Use it to continue with the same model without FP8. It computes, at every depth of the tree::

      {name: tree for name, tree in variables.items() if name != "_overwrite_with_gradient"}

  Args:
    variables: variables dict of an FP8 model; leaves may be arrays or ShapeDtypeStructs.

  Returns:
    ``variables`` without FP8 state, and without mappings that held nothing else. All other leaves
    are the ones passed in. Mappings keep their types.

  Raises:
    ValueError: ``variables`` is not a variables dict.

  Numerics:
    No value changes. The optimizer state covers parameters only, so a ``TrainState`` continues with
    ``state.replace(params=downgrade_variables(state.params), apply_fn=...)``.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> x = jnp.ones((2, 4))
    >>> variables = nn.Dense(4, dot_general_cls=fp8.Fp8DotGeneral).init(jax.random.key(0), x)
    >>> variables = fp8.downgrade_variables(variables)
    >>> nn.Dense(4).apply(variables, x).shape
    (2, 4)

  References:
    flax_fp8.upgrade_variables, the inverse.
  """
  require_variables("downgrade_variables", variables)
  return _without_state(variables)


def _without_state(tree: Any) -> Any:
  if not isinstance(tree, Mapping):
    return tree
  kept: dict[str, Any] = {}
  for key, value in tree.items():
    if key == OVERWRITE_WITH_GRADIENT:
      continue
    below = _without_state(value)
    if not isinstance(value, Mapping) or below or not value:
      kept[key] = below
  return with_items(tree, kept)
