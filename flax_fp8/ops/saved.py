"""Names and packs the values that a contraction saves for its backward pass.

Policies of ``jax.checkpoint`` know the names.

If a policy saves a value that the forward pass also uses, ``jax.checkpoint`` applies
``lax.reduce_precision`` to it. For plain E4M3 arrays this turns values beyond 240 into NaN and
subnormals into zero. The operands of the forward GEMM therefore have no name that a policy uses.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from flax_fp8.recipes.base import Role
from flax_fp8.sharding import explicit_sharding
from flax_fp8.varying import varying_axes

INPUT = "fp8_input"
KERNEL = "fp8_kernel"
SCALARS = "fp8_scalars"
OUTPUT = "fp8_output"
BATCHED_OUTPUT = "fp8_batched_output"

# Only for ``training.once``, not for policies of ``jax.checkpoint``.
ONCE = "fp8_once"

OF_ROLE = {Role.INPUT: INPUT, Role.KERNEL: KERNEL}
# Values that may depend only on kernels and their state, and are then equal in several passes.
OF_KERNELS = (KERNEL, SCALARS, ONCE)

Tree = TypeVar("Tree")


def name(tree: Tree, as_: str) -> Tree:
  """Names every array of a pytree."""
  named: Any = jax.tree.map(lambda leaf: checkpoint_name(leaf, as_), tree)
  return named


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=("values",), meta_fields=("structure",)
)
@dataclasses.dataclass(frozen=True)
class Packed:
  """The single values of a pytree as one array, so that a loop over layers stacks one array.

  Attributes:
    values: float32 vector.
    structure: structure of the pytree, whose leaves have shape ``(1,)``.
  """

  values: jax.Array
  structure: Any


def pack(tree: Any) -> Any:
  """Packs a pytree.

  Returns it as it is if it has a leaf that is not a single value, if its leaves vary along
  different mesh axes, or on a mesh with explicit axes.
  """
  leaves, structure = jax.tree.flatten(tree)
  varying = {varying_axes(leaf) for leaf in leaves}
  if len(varying) != 1 or any(leaf.size != 1 or explicit_sharding(leaf) for leaf in leaves):
    return tree
  return Packed(jnp.concatenate([leaf.reshape(1) for leaf in leaves]), structure)


def unpack(tree: Any) -> Any:
  """Inverts ``pack``. All leaves of a packed pytree have shape ``(1,)``."""
  if not isinstance(tree, Packed):
    return tree
  count = tree.structure.num_leaves
  parts = [lax.slice_in_dim(tree.values, index, index + 1) for index in range(count)]
  return jax.tree.unflatten(tree.structure, parts)
