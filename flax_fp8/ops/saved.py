"""Names of what a contraction saves for its backward pass, for policies of ``jax.checkpoint``.

What a GEMM multiplies at once has no name that a policy would ask for. Where a policy saves what is
also used, ``jax.checkpoint`` passes it through ``lax.reduce_precision``, which takes E4M3 for a
format with infinities: values beyond 240 become NaN, subnormals zero.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

INPUT = "fp8_input"
KERNEL = "fp8_kernel"
SCALARS = "fp8_scalars"
OUTPUT = "fp8_output"
BATCHED_OUTPUT = "fp8_batched_output"

# What no policy of ``jax.checkpoint`` names: see ``kernels_once``.
_ONCE = "fp8_once"
ALL_OF_KERNELS = (KERNEL, SCALARS, _ONCE)

Tree = TypeVar("Tree")


def name(tree: Tree, as_: str) -> Tree:
  """Names every array of a pytree."""
  named: Any = jax.tree.map(lambda leaf: checkpoint_name(leaf, as_), tree)
  return named


# Part of the key of JAX's compilation caches.
_kernels_once: Any = jax.make_user_context(False)


def kernels_once() -> Any:
  """Makes the context in which all that is made of a kernel has a name, kept in FP8 if stored.

  For a program that computes what has these names apart from all else, once for several passes.
  """
  return _kernels_once(True)


def are_kernels_once() -> bool:
  """Tells whether that context is around."""
  return _kernels_once.value


def name_once(tree: Tree) -> Tree:
  """Names every array of a pytree in that context."""
  return name(tree, _ONCE) if are_kernels_once() else tree
