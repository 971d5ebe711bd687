"""Paths of leaves, and texts of differences."""

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import flax_fp8 as fp8
from flax_fp8.training.paths import compare, few, leaves_by_path


def test_keys_fields_and_indices():
  params = {"Dense_0": {"kernel": jnp.ones(2)}}
  variables = flax.core.freeze({"params": params, fp8.OVERWRITE_WITH_GRADIENT: 1.0})
  tx = optax.chain(optax.clip(1.0), optax.adam(1e-3))
  state = fp8.TrainState.create(apply_fn=jnp.sin, params=variables, tx=tx)
  assert sorted(leaves_by_path(state)) == [
    "opt_state/1/0/count",
    "opt_state/1/0/mu/Dense_0/kernel",
    "opt_state/1/0/nu/Dense_0/kernel",
    "params/_overwrite_with_gradient",
    "params/params/Dense_0/kernel",
    "step",
  ]


def test_a_box_may_be_a_leaf():
  box = nn.Partitioned(jnp.ones(2), ("x",))
  assert list(leaves_by_path({"a": box})) == ["a/value"]
  assert leaves_by_path({"a": box}, is_leaf=lambda x: x is box) == {"a": box}


@pytest.mark.parametrize("got", [{}, {"a": 1.0, "b": 2.0}, {"c": 3.0}])
def test_difference(got):
  want = {"a": 1.0, "b": 0.0}
  difference = compare(got, want, describe=float)
  assert set(difference.missing) == want.keys() - got.keys()
  assert set(difference.extra) == got.keys() - want.keys()
  assert difference.other == (("b 2.0 for 0.0",) if "b" in got else ())
  assert difference
  assert not compare(want, want)


def test_words():
  shapes = compare(jax.tree.map(jnp.ones, {"a": 2, "c": 3}), {"a": jnp.ones(3), "b": 0.0})
  assert str(shapes) == "missing: ['b'], extra: ['c'], others: ['a (2,) for (3,)']"
  assert few("abc") == "['a', 'b', 'c']"
  assert few("abcdefgh") == "['a', 'b', 'c', 'd', 'e'] ... and 3 more"
