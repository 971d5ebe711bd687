"""Computing several items together equals computing each of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_fp8.together import together


def fun(tree, factor):
  return {"sum": jnp.sum(tree["a"]) * factor, "roll": jnp.roll(tree["a"], 1) / factor}


def items(*shapes):
  random = np.random.default_rng(0)
  trees = [{"a": jnp.asarray(random.normal(size=shape), jnp.float32)} for shape in shapes]
  return trees, [jnp.float32(3 + i) for i in range(len(shapes))]


@pytest.mark.parametrize("shapes", [(), ((4,),), ((4,), (4,), (4,)), ((4,), (5,))], ids=str)
def test_the_results_are_those_of_separate_calls(shapes):
  trees, factors = items(*shapes)
  got = together(fun, trees, factors)
  assert len(got) == len(shapes)
  for each, tree, factor in zip(got, trees, factors, strict=True):
    jax.tree.map(np.testing.assert_array_equal, each, fun(tree, factor))


def test_alike_items_are_computed_at_once():
  calls = []

  def counted(tree, factor):
    calls.append(tree["a"].shape)
    return fun(tree, factor)

  together(counted, *items((4,), (4,)))
  together(counted, *items((4,), (5,)))
  assert calls == [(4,), (4,), (5,)]
