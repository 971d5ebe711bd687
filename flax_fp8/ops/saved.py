"""Names of what a contraction saves for its backward pass, for policies of ``jax.checkpoint``.

What a GEMM multiplies at once has no name that a policy would ask for. Where a policy saves what is
also used, ``jax.checkpoint`` passes it through ``lax.reduce_precision``, which takes E4M3 for a
format with infinities: values beyond 240 become NaN, subnormals zero.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

from flax_fp8.recipes.base import Role

INPUT = "fp8_input"
KERNEL = "fp8_kernel"
SCALARS = "fp8_scalars"
OUTPUT = "fp8_output"
BATCHED_OUTPUT = "fp8_batched_output"

# What no policy of ``jax.checkpoint`` names: kernels as the forward GEMM takes them.
ONCE = "fp8_once"

OF_ROLE = {Role.INPUT: INPUT, Role.KERNEL: KERNEL}
# All that is made of kernels alone, and so once for several passes with the same variables.
OF_KERNELS = (KERNEL, SCALARS, ONCE)

Tree = TypeVar("Tree")


def name(tree: Tree, as_: str) -> Tree:
  """Names every array of a pytree."""
  named: Any = jax.tree.map(lambda leaf: checkpoint_name(leaf, as_), tree)
  return named
