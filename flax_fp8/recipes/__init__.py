"""Scaling recipes: how tensors are quantized to FP8, and the state that this needs."""

from flax_fp8.capability import Needs
from flax_fp8.recipes.base import GemmKind, Recipe, Role
from flax_fp8.recipes.block import Float8BlockScaling
from flax_fp8.recipes.current import Float8CurrentScaling
from flax_fp8.recipes.delayed import DelayedScaling
from flax_fp8.recipes.mxfp8 import MXFP8BlockScaling
from flax_fp8.recipes.registry import RECIPES, get_recipe
from flax_fp8.recipes.rowwise import Float8RowwiseScaling

__all__ = [
  "RECIPES",
  "DelayedScaling",
  "Float8BlockScaling",
  "Float8CurrentScaling",
  "Float8RowwiseScaling",
  "GemmKind",
  "MXFP8BlockScaling",
  "Needs",
  "Recipe",
  "Role",
  "get_recipe",
]
