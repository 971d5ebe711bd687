"""Calibration: exact values, recorded amaxes, and separate entries in JAX's caches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_fp8 import ops
from flax_fp8.ops.calibration import Calibration, calibrating
from tests.recipes import cases

X, W, C = cases.normal(0, 4, 8), cases.normal(1, 8, 2), 1e-9 * cases.normal(2, 4, 2)
DELAYED = cases.RECIPES["delayed"]


@pytest.mark.parametrize("name", ["delayed", "stochastic"])
def test_computes_in_the_dtype_of_the_operands(name):
  """Stochastic rounding needs no key during calibration."""
  with calibrating(Calibration()):
    got = cases.step(cases.RECIPES[name], X, W, C, key=None)
  for value, want in zip(got[:3], cases.plain(X, W, C, cases.DIMS), strict=True):
    np.testing.assert_allclose(value, want, rtol=1e-5)


def test_records_and_finalizes():
  with calibrating(Calibration()):
    state = cases.step(DELAYED, X, W, C)[3]
  with calibrating(Calibration(finalizes=True)):
    final = cases.step(DELAYED, X, W, C, state)[3]
  for role, tensor, top in (("input", X, 448), ("kernel", W, 448), ("output_grad", C, 57344)):
    assert float(state[role]["amax_history"][0]) == np.abs(tensor).max()
    assert float(state[role]["scale"][0]) == 1
    np.testing.assert_allclose(final[role]["scale"], [np.abs(tensor).max() / top], rtol=1e-6)
    cases.equal(final[role]["amax_history"], state[role]["amax_history"])


def test_percentile_clips():
  x = np.array([[3.0, -1.0, 2.0, -100.0]], np.float32)
  np.testing.assert_array_equal(Calibration(percentile=50).clip(x), [[2.5, -1, 2, -2.5]])
  assert Calibration().clip(x) is x
  assert Calibration(percentile=50).clip(np.zeros((0, 2))).shape == (0, 2)
  assert np.all(np.isnan(Calibration(percentile=50).clip(np.array([1.0, np.nan]))))


def body(carry, w):
  state = ops.init_state(DELAYED)
  return ops.dot_general(carry, w, cases.DIMS, recipe=DELAYED, state=state), None


@pytest.mark.parametrize("run", [jax.jit, jax.checkpoint], ids=["jit", "remat"])
def test_caches_tell_the_programs_apart(run):
  stack = jnp.stack([W @ W.T] * 2)
  program = run(lambda x: jax.lax.scan(body, x, stack)[0])
  before = program(X)
  with calibrating(Calibration()):
    exact = program(X)
  np.testing.assert_allclose(exact, X @ stack[0] @ stack[0], rtol=1e-4, atol=1e-4)
  cases.equal(program(X), before)
  assert np.any(before != exact)
