"""The contraction compared with float64 in every compute dtype, and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from flax_fp8 import meta_dtype, ops
from tests import oracle

DIMS = (((1,), (0,)), ((), ()))
BATCHED = (((2,), (1,)), ((0,), (0,)))
NAMES = {"input": "float8_e4m3fn", "kernel": "float8_e4m3fn", "output_grad": "float8_e5m2"}
RECIPE = fp8.DelayedScaling(amax_history_len=3)


def operands(shape, other, out, dtype="float32", seed=0):
  random = np.random.default_rng(seed)
  return [jnp.asarray(random.normal(size=s), dtype) for s in (shape, other, out)]


def warm_state(recipe=RECIPE, **amaxes):
  """Makes state with the given amaxes in its histories."""
  state = ops.init_state(recipe)
  for role, amax in amaxes.items():
    state[role]["amax_history"] = state[role]["amax_history"].at[-1].set(amax)
  return state


def forward_backward(x, w, g, dims=DIMS, state=None, recipe=RECIPE, **options):
  """Returns the output, both gradients and the new state."""
  state = warm_state(recipe) if state is None else state
  f = lambda x, w, s: ops.dot_general(x, w, dims, recipe=recipe, state=s, **options)
  out, vjp = jax.vjp(f, x, w, state)
  return (out, *vjp(g))


def truth(x, w, g, scales):
  """Computes the three GEMMs of the plain case in float64, with operands from the oracle."""
  tensors = zip((x, w, g), NAMES.items(), strict=True)
  qx, qw, qg = (oracle.qdq(np.float32(t), np.float32(scales[r]), n) for t, (r, n) in tensors)
  return qx @ qw, qg @ qw.T, qx.T @ qg


SCALES = {role: np.float32(2.0) / np.float32(oracle.magnitudes(n)[-1]) for role, n in NAMES.items()}


@pytest.mark.parametrize(
  ("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2**-8), ("float16", 2**-11)]
)
def test_three_gemms_equal_the_oracle(dtype, tolerance):
  """The only rounding that the oracle lacks is the final rounding to the dtype."""
  x, w, g = operands((8, 16), (16, 4), (8, 4), dtype)
  state = warm_state(input=2.0, kernel=2.0, output_grad=2.0)
  out, dx, dw, _ = jax.jit(forward_backward)(x, w, g, state=state)
  for got, want in zip((out, dx, dw), truth(x, w, g, SCALES), strict=True):
    assert got.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(np.float64(got), want, rtol=tolerance, atol=1e-6)


@pytest.mark.slow
def test_batched_equals_one_by_one():
  x, w, g = operands((3, 8, 16), (3, 16, 4), (3, 8, 4))
  state = warm_state(input=4.0, kernel=4.0, output_grad=4.0)
  out, dx, dw, _ = forward_backward(x, w, g, BATCHED, state)
  for i in range(3):
    one = forward_backward(x[i], w[i], g[i], DIMS, state)
    for got, want in zip((out, dx, dw), one[:3], strict=True):
      np.testing.assert_allclose(got[i], want, rtol=1e-6)


def test_new_state():
  x, w, g = operands((8, 16), (16, 4), (8, 4))
  state = warm_state(input=3.0)
  new = forward_backward(x, w, g, state=state)[3]
  for role, tensor in zip(NAMES, (x, w, g), strict=True):
    history = np.asarray(state[role]["amax_history"])
    want = oracle.roll(history, oracle.amax(tensor))
    np.testing.assert_array_equal(new[role]["amax_history"], want.astype(np.float32))
    scale = oracle.scale(history, 1.0, NAMES[role])
    assert float(new[role]["scale"][0]) == pytest.approx(scale, rel=3e-7)


@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_max_grad_state_stays_max_grad(run):
  x, w, g = operands((8, 16), (16, 4), (8, 4))
  plain = forward_backward(x, w, g)[3]
  cast = jax.tree.map(meta_dtype.to_max_grad, warm_state())
  new = run(lambda s: forward_backward(x, w, g, state=s)[3])(cast)
  assert all(meta_dtype.is_max_grad(leaf) for leaf in jax.tree.leaves(new))
  jax.tree.map(np.testing.assert_array_equal, jax.tree.map(meta_dtype.to_float32, new), plain)


def test_residuals_are_fp8():
  """FP8 copies are the only residuals of an operand's size."""
  x, w, _ = operands((64, 128), (128, 32), (64, 32), "bfloat16")
  f = lambda x, w: ops.dot_general(x, w, DIMS, recipe=RECIPE, state=warm_state())
  _, vjp = jax.vjp(f, x, w)
  kept = [leaf for leaf in jax.tree.leaves(vjp) if getattr(leaf, "size", 0) > 1024]
  assert [leaf.dtype.name for leaf in kept] == ["float8_e4m3fn_of_bfloat16"] * 2


def test_gemms_of_the_lowered_program():
  """Operand formats, accumulation and output dtype of the three GEMMs.

  With so few rows, no algorithm is explicit, so all platforms have the same GEMM.
  """
  x, w, g = operands((8, 32), (32, 8), (8, 8), "float32")
  jaxpr = jax.make_jaxpr(forward_backward)(x, w, g)
  gemms = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "dot_general"]
  inner = [
    sub for e in jaxpr.jaxpr.eqns for sub in jax.tree.leaves(e.params) if hasattr(sub, "eqns")
  ]
  gemms += [e for sub in inner for e in sub.eqns if e.primitive.name == "dot_general"]
  formats = [tuple(v.aval.dtype.name for v in e.invars) for e in gemms]
  e4m3, e5m2 = "float8_e4m3fn", "float8_e5m2"
  assert formats == [(e4m3, e4m3), (e5m2, e4m3), (e5m2, e4m3)]
  precisions = [str(e.params["precision"][0]) for e in gemms]
  assert precisions == ["DEFAULT", "HIGHEST", "HIGHEST"]
  assert {e.outvars[0].aval.dtype.name for e in gemms} == {"float32"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_in_nothing_out(dtype):
  sizes = (0, 4, 2), (3, 0, 2), (3, 4, 0)
  inputs = [operands((m, k), (k, n), (m, n), dtype) for m, k, n in sizes]
  found = jax.jit(lambda inputs: [forward_backward(*each) for each in inputs])(inputs)
  for (m, k, n), (out, dx, dw, new) in zip(sizes, found, strict=True):
    assert (out.shape, dx.shape, dw.shape) == ((m, n), (m, k), (k, n))
    assert not np.any(out)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(new))


def test_mixed_dtypes_promote_and_gradients_keep_theirs():
  x, w, g = operands((8, 16), (16, 4), (8, 4))
  out, dx, dw, _ = forward_backward(x.astype(jnp.bfloat16), w, g)
  assert (out.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)


def test_preferred_element_type():
  x, w, g = operands((8, 16), (16, 4), (8, 4), "bfloat16")
  out = forward_backward(x, w, g.astype(jnp.float32), preferred_element_type=jnp.float32)[0]
  assert out.dtype == jnp.float32
