"""GEMMs that compute in the dtype of their operands."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from flax_fp8 import ops
from tests.recipes import cases
from tests.recipes.cases import RECIPES, normal

GEMMS = ("fprop", "dgrad", "wgrad")
SUBSETS = [s for size in (1, 2) for s in itertools.combinations(GEMMS, size)]
# The GEMMs that take each tensor.
TAKEN_BY = {
  "input": {"fprop", "wgrad"},
  "kernel": {"fprop", "dgrad"},
  "output_grad": {"dgrad", "wgrad"},
}
X, W, C = normal(0, 8, 40), normal(1, 40, 12), normal(2, 8, 12)
by_class = pytest.mark.parametrize("name", cases.ONE_OF_EACH_CLASS)


def used_state(recipe):
  """Makes state with a history, so an update changes both scale and history."""
  return jax.tree.map(lambda leaf: leaf + 1.5 * (leaf.size > 1), ops.init_state(recipe))


@by_class
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_named_gemms_are_plain_and_others_are_as_before(name, dtype):
  """Equal bit for bit for each choice of GEMMs. A tensor without an FP8 GEMM keeps its state."""
  x, w, c = (jnp.asarray(t, dtype) for t in (X, W, C))
  recipes = {s: dataclasses.replace(RECIPES[name], high_precision=s) for s in ((), *SUBSETS)}

  @cases.quickly
  def run(x, w, c, state):
    out, vjp = jax.vjp(lambda x, w: jax.lax.dot_general(x, w, cases.DIMS), x, w)
    return {s: cases.step(r, x, w, c, state) for s, r in recipes.items()}, (out, *vjp(c))

  state = used_state(RECIPES[name])
  steps, plain = run(x, w, c, state)
  whole = steps.pop(())
  for i in range(3):
    assert not np.array_equal(whole[i], plain[i])
  for subset, got in steps.items():
    for gemm, value, as_before, in_plain in zip(GEMMS, got, whole, plain, strict=False):
      cases.equal(value, in_plain if gemm in subset else as_before)
    for role, leaves in got[3].items():
      cases.equal(leaves, state[role] if TAKEN_BY[role] <= set(subset) else whole[3][role])


def test_operands_of_two_dtypes_meet_in_the_wider():
  """This happens in a layer with float32 parameters and bfloat16 inputs."""
  recipe = fp8.Float8CurrentScaling(high_precision=("fprop", "wgrad"))
  x = jnp.asarray(X, jnp.bfloat16)
  out, _, dw, _ = cases.compiled(recipe, x, W, C)
  cases.equal(out, jax.jit(jnp.matmul)(x.astype(jnp.float32), W))
  cases.equal(dw, jax.jit(lambda x, c: (c.T @ x).T)(x.astype(jnp.float32), C))


def test_a_layer_keeps_the_state_of_a_tensor_that_is_not_quantized():
  recipe = fp8.DelayedScaling(amax_history_len=4, high_precision=("dgrad", "wgrad"))
  layer = fp8.Fp8DotGeneral(recipe=recipe)
  variables = jax.jit(layer.init, static_argnums=3)(jax.random.key(0), X, W, cases.DIMS)
  loss = lambda v: jnp.sum(jnp.sin(layer.apply(v, X, W, cases.DIMS)))
  state = cases.quickly(jax.grad(loss))(variables)[fp8.OVERWRITE_WITH_GRADIENT]
  assert float(state["input_amax_history"][0]) == np.abs(X).max()
  cases.equal(state["output_grad_amax_history"], jnp.zeros(4))
