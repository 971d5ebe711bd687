"""Scaling recipes: how tensors become FP8, and what has to be remembered for it."""

from flax_fp8.capability import Needs
from flax_fp8.recipes.base import GemmKind, Recipe, Role
from flax_fp8.recipes.delayed import DelayedScaling

__all__ = ["DelayedScaling", "GemmKind", "Needs", "Recipe", "Role"]
