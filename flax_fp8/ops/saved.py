"""Names of what a contraction saves for its backward pass, for policies of ``jax.checkpoint``."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

INPUT = "fp8_input"
KERNEL = "fp8_kernel"
SCALARS = "fp8_scalars"
OUTPUT = "fp8_output"
BATCHED_OUTPUT = "fp8_batched_output"

Tree = TypeVar("Tree")


def name(tree: Tree, as_: str) -> Tree:
  """Names every array of a pytree."""
  named: Any = jax.tree.map(lambda leaf: checkpoint_name(leaf, as_), tree)
  return named
