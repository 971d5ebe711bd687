"""Contraction functions against Flax's functions of the same names, bit for bit in float32."""

import flax.linen.fp8_ops as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_fp8 import fp8_ops

F32, E4M3 = jnp.float32, jnp.float8_e4m3fn
DIMS = {
  "plain": (((1,), (0,)), ((), ()), (4, 8), (8, 6)),
  "batched": (((2,), (1,)), ((0,), (0,)), (3, 4, 8), (3, 8, 6)),
  "two contracted": (((2, 1), (0, 1)), ((), ()), (4, 5, 8), (8, 5, 6)),
}
CASES = pytest.mark.parametrize(("contract", "batch", "lhs", "rhs"), DIMS.values(), ids=DIMS)


def arrays(*shapes):
  random = np.random.default_rng(0)
  return [jnp.asarray(random.normal(size=s), F32) for s in shapes]


def same(call):
  jax.tree.map(np.testing.assert_array_equal, call(fp8_ops), call(reference))


def state():
  histories = [jnp.array([3.0, 1.0, 2.0]) * k for k in (1, 2, 0.5)]
  names = ("lhs", "rhs", "grad")
  scales = {f"{n}_scale": jnp.array([0.5]) for n in names}
  return scales | {f"{n}_amax_history": h for n, h in zip(names, histories, strict=True)}


@CASES
def test_fp8_scaled_dot_general(contract, batch, lhs, rhs):
  x, w = arrays(lhs, rhs)

  def step(m):
    f = lambda x, w, s: m.fp8_scaled_dot_general(
      x, w, (contract, batch), preferred_element_type=F32, **s
    )
    out, vjp = jax.vjp(f, x, w, state())
    return out, vjp(jnp.cos(out))

  same(lambda m: jax.jit(lambda: step(m))())


@CASES
def test_quantized_dot(contract, batch, lhs, rhs):
  x, w = arrays(lhs, rhs)

  def step(m):
    q, k = x.astype(E4M3), w.astype(E4M3)
    s, h = jnp.array([0.5]), jnp.array([3.0, 1.0])
    f = lambda x, w, s, h: m.quantized_dot(x, q, s * 2, w, k, s * 3, s, h, (contract, batch), F32)
    out, vjp = jax.vjp(f, x, w, s, h)
    return out, vjp(jnp.cos(out))

  same(lambda m: jax.jit(lambda: step(m))())


@CASES
def test_transposes(contract, batch, lhs, rhs):
  x, w = arrays(lhs, rhs)
  out, vjp = jax.vjp(lambda x, w: jax.lax.dot_general(x, w, (contract, batch)), x, w)
  g = jnp.cos(out)
  how = {"dimension_numbers": (contract, batch), "precision": None, "preferred_element_type": F32}
  want = vjp(g)
  got_x = fp8_ops.dot_general_transpose_lhs(g, x, w, **how)
  got_w = fp8_ops.dot_general_transpose_rhs(g, x, w, **how)
  np.testing.assert_allclose(got_x, want[0], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(got_w, want[1], rtol=1e-5, atol=1e-6)


@CASES
def test_dot_general_with_precision(contract, batch, lhs, rhs):
  x, w = arrays(lhs, rhs)
  f = lambda m: jax.value_and_grad(
    lambda x, w: jnp.sum(jnp.sin(m.dot_general_with_precision(x, w, (contract, batch)))), (0, 1)
  )(x, w)
  same(f)


@pytest.mark.parametrize("name", ["fp8_scaled_dot_general", "dot_general_with_precision"])
def test_a_precision_is_ignored_with_a_warning(name):
  x, w = arrays((4, 8), (8, 6))
  options = state() if name.startswith("fp8") else {}
  with pytest.warns(UserWarning, match=f"{name}: .*ignored"):
    getattr(fp8_ops, name)(x, w, (((1,), (0,)), ((), ())), precision="highest", **options)
