"""Names the values that a contraction saves, for policies of ``jax.checkpoint``.

If a policy saves a value that the forward pass also uses, ``jax.checkpoint`` applies
``lax.reduce_precision`` to it. For plain E4M3 arrays this turns values beyond 240 into NaN and
subnormals into zero. The operands of the forward GEMM therefore have no name that a policy uses.
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

# Only for ``training.once``, not for policies of ``jax.checkpoint``.
KERNEL_FORWARD = "fp8_kernel_forward"

OF_ROLE = {Role.INPUT: INPUT, Role.KERNEL: KERNEL}
# Values that may depend only on kernels and their state, and are then equal in several passes.
OF_KERNELS = (KERNEL, KERNEL_FORWARD, SCALARS)

Tree = TypeVar("Tree")


def name(tree: Tree, as_: str) -> Tree:
  """Names every array of a pytree."""
  named: Any = jax.tree.map(lambda leaf: checkpoint_name(leaf, as_), tree)
  return named
