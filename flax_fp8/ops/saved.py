"""Names of what a contraction saves for its backward pass, for policies of ``jax.checkpoint``.

A policy that saves a value that is also used at once makes ``jax.checkpoint`` pass it through
``lax.reduce_precision``. For plain E4M3 arrays that makes NaN of values beyond 240 and zero of
subnormals. So what the forward GEMM multiplies has no name that a policy would ask for.
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

# For ``training.once``, and no policy of ``jax.checkpoint``.
KERNEL_FORWARD = "fp8_kernel_forward"

OF_ROLE = {Role.INPUT: INPUT, Role.KERNEL: KERNEL}
# What may hang on kernels and their state alone, and is then the same for several passes.
OF_KERNELS = (KERNEL, KERNEL_FORWARD, SCALARS)

Tree = TypeVar("Tree")


def name(tree: Tree, as_: str) -> Tree:
  """Names every array of a pytree."""
  named: Any = jax.tree.map(lambda leaf: checkpoint_name(leaf, as_), tree)
  return named
