"""FP8 einsum: exact for values that FP8 represents, for every form of equation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from flax_fp8 import ops
from tests.test_contraction import EQUATIONS, integers

RECIPE = fp8.DelayedScaling(amax_history_len=2)


# That others are planned as one of these, tests/test_contraction.py tests.
DIFFERENT = (
  *("mk,kn->mn", "mk,kn->nm", "ebk,ekn->ebn", "bhqd,bhkd->bhqk", "BSEM,EMH->EBSH"),
  *("...mk,...kn->...mn", "...,...->...", "mkl,lkn->mn", "amk,kn->mn", "mk,kna->mn", "mk,kn->"),
  *("iik,kn->in", "m,n->mn", ",k->k", "bmk,bkn->bmn"),
)


@pytest.mark.parametrize("equation", DIFFERENT)
def test_small_integers_are_exact(equation):
  """E4M3 and E5M2 represent them exactly, so values and gradients equal ``jnp.einsum``."""
  shapes = EQUATIONS[equation]
  lhs, rhs = integers(shapes[0]), integers(shapes[1], 1)
  state = ops.init_state(RECIPE)
  ours = lambda x, y: ops.einsum(equation, x, y, recipe=RECIPE, state=state)
  theirs = lambda x, y: jnp.einsum(equation, x, y)
  g = integers(jax.eval_shape(theirs, lhs, rhs).shape, 2)

  @jax.jit
  def run(lhs, rhs, g):
    (got, got_vjp), (out, vjp) = (jax.vjp(each, lhs, rhs) for each in (ours, theirs))
    return (got, *got_vjp(g)), (out, *vjp(g))

  for mine, want in zip(*run(lhs, rhs, g), strict=True):
    np.testing.assert_array_equal(mine, want)


def test_left_is_always_the_input():
  """This holds for any order of output labels. Flax swaps the two for transposed outputs."""
  lhs, rhs = jnp.full((2, 3), 5.0), jnp.full((3, 4), 7.0)
  for equation in ("mk,kn->mn", "mk,kn->nm"):
    loss = lambda s, e=equation: jnp.sum(ops.einsum(e, lhs, rhs, recipe=RECIPE, state=s))
    new = jax.grad(loss)(ops.init_state(RECIPE))
    assert float(new["input"]["amax_history"][0]) == 5.0
    assert float(new["kernel"]["amax_history"][0]) == 7.0


def test_dtype_of_the_result():
  x = jnp.ones((2, 2), jnp.bfloat16)
  call = lambda **options: ops.einsum(
    "ij,jk", x, x, recipe=RECIPE, state=ops.init_state(RECIPE), **options
  )
  assert call().dtype == jnp.bfloat16
  assert call(preferred_element_type=jnp.float32).dtype == jnp.float32
