"""Looks up recipes by name, for command lines and configuration files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from flax_fp8 import fields as _fields
from flax_fp8.recipes.base import Recipe
from flax_fp8.recipes.block import Float8BlockScaling
from flax_fp8.recipes.current import Float8CurrentScaling
from flax_fp8.recipes.delayed import DelayedScaling
from flax_fp8.recipes.mxfp8 import MXFP8BlockScaling
from flax_fp8.recipes.rowwise import Float8RowwiseScaling

RECIPES: Mapping[str, type[Recipe]] = MappingProxyType(
  {
    "delayed": DelayedScaling,
    "current": Float8CurrentScaling,
    "rowwise": Float8RowwiseScaling,
    "block": Float8BlockScaling,
    "mxfp8": MXFP8BlockScaling,
  }
)


def get_recipe(name: str, **fields: Any) -> Recipe:
  """Makes a recipe by its name.

  ``RECIPES[name](**fields)``

  Args:
    name: "delayed", "current", "rowwise", "block" or "mxfp8".
    **fields: fields of the recipe's class.

  Returns:
    The recipe.

  Raises:
    ValueError: there is no recipe with this name, or the value of a field is not allowed.
    TypeError: the class does not have a given field, or the value of a field has the wrong type.

  Example:
    >>> import flax_fp8 as fp8
    >>> fp8.get_recipe("delayed", margin=1) == fp8.DelayedScaling(margin=1)
    True

  References:
    Transformer Engine, transformer_engine.common.recipe.
  """
  _fields.choice("get_recipe", "name", name, tuple(RECIPES))
  recipe = RECIPES[name]
  known = [field.name for field in dataclasses.fields(recipe)]
  if unknown := sorted(fields.keys() - {*known}):
    raise TypeError(
      f"get_recipe: {recipe.__name__} has the fields {known}; got {unknown}. Omit them, or choose "
      "another recipe."
    )
  return recipe(**fields)
