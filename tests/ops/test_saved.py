"""Packing of single values."""

import jax
import jax.numpy as jnp
import numpy as np

from flax_fp8.ops import saved

TREE = ({"a": jnp.array([1.0]), "b": {"c": jnp.array([2.0])}}, None, jnp.array([3.0]))


def test_single_values_become_one_array():
  packed = saved.pack(TREE)
  assert [leaf.shape for leaf in jax.tree.leaves(packed)] == [(3,)]
  unpacked = saved.unpack(packed)
  assert jax.tree.structure(unpacked) == jax.tree.structure(TREE)
  jax.tree.map(np.testing.assert_array_equal, unpacked, TREE)


def test_other_trees_stay_as_they_are():
  for tree in ((), {"a": jnp.zeros(2), "b": jnp.zeros(1)}):
    assert saved.pack(tree) is tree
    assert saved.unpack(saved.pack(tree)) is tree
