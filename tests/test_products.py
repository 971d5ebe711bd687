"""Products of quantised tensors against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_fp8 import products
from flax_fp8.quantize import QTensor

random = np.random.default_rng(0)


def microscaled(*shape):
  """Values and scales of blocks of 32; magnitudes differ, so that a misplaced scale shows."""
  data = jnp.asarray(random.normal(size=shape), jnp.float8_e4m3fn)
  exponents = random.integers(-6, 6, size=(*shape[:-1], shape[-1] // 32))
  return QTensor(data, jnp.asarray(2.0**exponents, jnp.float8_e8m0fnu))


def exact(x):
  scale = np.repeat(np.asarray(x.scale, np.float64), 32, axis=-1)
  return np.asarray(x.data, np.float64) * scale


def product_of(lhs, rhs):
  return products.dot_microscaled(lhs, rhs, jnp.float32)


def in_float64(lhs, rhs):
  return np.einsum("...mk,...nk->...mn", exact(lhs), exact(rhs))


def test_dot_microscaled():
  lhs, rhs = microscaled(2, 5, 96), microscaled(2, 7, 96)
  np.testing.assert_allclose(product_of(lhs, rhs), in_float64(lhs, rhs), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=["lhs", "rhs", "both"])
def test_dot_microscaled_under_vmap(axes):
  """Of JAX's scaled_matmul, both operands or none may be mapped."""
  lhs = microscaled(*[3][: axes[0] == 0], 2, 5, 64)
  rhs = microscaled(*[3][: axes[1] == 0], 2, 7, 64)
  got = jax.vmap(product_of, in_axes=axes)(lhs, rhs)
  np.testing.assert_allclose(got, in_float64(lhs, rhs), rtol=1e-5, atol=1e-4)
  nested = jax.vmap(jax.vmap(product_of, in_axes=axes), in_axes=(0, 0))
  many = [jax.tree.map(lambda x: jnp.stack([x, x]), q) for q in (lhs, rhs)]
  np.testing.assert_array_equal(nested(*many)[1], got)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=["lhs", "rhs", "both"])
def test_dot_microscaled_under_vmap_compiles_for_cuda(axes):
  pytest.importorskip("jax_plugins.xla_cuda13", reason="the CUDA plugin exists for Linux alone")
  import flax_fp8 as fp8

  shape = lambda rows, mapped: (*[3][:mapped], 2, rows)
  spec = lambda rows, mapped: QTensor(
    jax.ShapeDtypeStruct((*shape(rows, mapped), 128), jnp.float8_e4m3fn),
    jax.ShapeDtypeStruct((*shape(rows, mapped), 4), jnp.float8_e8m0fnu),
  )
  args = spec(128, axes[0] == 0), spec(256, axes[1] == 0)
  report = fp8.explain(jax.vmap(product_of, in_axes=axes), *args, target="b200")
  assert [gemm.flops for gemm in report.gemms] == [2 * 3 * 2 * 128 * 256 * 128]
