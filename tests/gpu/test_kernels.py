"""The kernels of block scaling on a Hopper card compute what plain JAX computes on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from flax_fp8.formats import E4M3, E5M2
from flax_fp8.kernels.block_gemm import BlockScaledGemm
from flax_fp8.kernels.block_quantize import BlockQuantize

IS_HOPPER = getattr(jax.devices()[0], "compute_capability", "") == "9.0"
pytestmark = pytest.mark.skipif(not IS_HOPPER, reason="the kernels are for Hopper")


def on_cpu(fun, *args):
  """Computes on the CPU, where divisions are correctly rounded."""
  cpu = jax.devices("cpu")[0]
  return jax.jit(fun)(*jax.device_put(args, cpu))


def bits(x):
  x = np.asarray(x)
  return x.view({1: np.uint8, 4: np.uint32}[x.itemsize])


@pytest.mark.parametrize("tiles", [False, True], ids=["strips", "tiles"])
@pytest.mark.parametrize("float8", [E4M3, E5M2], ids=lambda float8: float8.name)
@pytest.mark.parametrize("sizes", [(1, 512, 384), (3, 200, 136), (2, 7, 129)], ids=str)
def test_quantized_values_are_the_bits_of_plain_jax(sizes, float8, tiles):
  random = np.random.default_rng(0)
  x = random.normal(size=sizes) * np.exp2(random.integers(-12, 6, sizes))
  x[0, :4, :128], x[-1, -1, -1] = 0, 448.0
  quantizer = BlockQuantize(format=float8.name, tiles=tiles, power_of_two=True)
  x = jnp.asarray(x, jnp.bfloat16)
  for got, want in zip(jax.jit(quantizer.run)(x), on_cpu(quantizer.plain, x), strict=True):
    np.testing.assert_array_equal(bits(got), bits(want))


@pytest.mark.parametrize("tiles", [False, True], ids=["strips", "tiles"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_value_reaches_its_scale(bad, tiles):
  x = jnp.ones((1, 256, 256), jnp.bfloat16).at[0, 5, 200].set(bad)
  quantizer = BlockQuantize(format=E4M3.name, tiles=tiles, power_of_two=True)
  q, scale, _, _ = jax.jit(quantizer.run)(x)
  is_bad = np.isnan(np.asarray(scale[0]))  # blocks of K first
  assert is_bad.sum() == 1
  assert is_bad[1, 0 if tiles else 5]
  assert np.isnan(np.asarray(q[0, 5, 128:], np.float32)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("by_rows", [False, True], ids=["by blocks", "by rows"])
@pytest.mark.parametrize(
  "sizes", [(1, 512, 384, 1024), (3, 200, 136, 640), (1, 9, 33, 128)], ids=str
)
def test_products_are_near_float64(sizes, by_rows, dtype):
  batch, m, n, k = sizes
  random = np.random.default_rng(1)
  a, b = (random.normal(size=(batch, rows, k)).astype(E4M3.dtype) for rows in (m, n))
  groups = n if by_rows else -(-n // 128)
  scale = lambda lines: np.exp2(random.integers(-8, 1, (batch, k // 128, lines))).astype(np.float32)
  a_scale, b_scale = scale(m), scale(groups)
  (got,) = jax.jit(BlockScaledGemm(out_dtype=dtype).run)(a, b, a_scale, b_scale)
  wide = lambda x, s: np.float64(x.astype(np.float32)) * np.repeat(s.swapaxes(1, 2), 128, 2)
  b_rows = b_scale if by_rows else np.repeat(b_scale, 128, 2)[:, :, :n]
  left, right = wide(a, a_scale), wide(b, b_rows).swapaxes(1, 2)
  # Tensor cores add the 128 products of a block with about 14 bits.
  tolerance = 2.0**-12 * (np.abs(left) @ np.abs(right))
  if dtype == "bfloat16":
    tolerance += 2.0**-8 * np.abs(left @ right)
  assert np.all(np.abs(np.asarray(got, np.float64) - left @ right) <= tolerance)


def test_a_layer_uses_the_kernels():
  recipe = fp8.Float8BlockScaling()
  x, w = (jnp.ones(shape, jnp.bfloat16) for shape in ((1024, 512), (512, 256)))
  state, dims = fp8.ops.init_state(recipe), (((1,), (0,)), ((), ()))
  product = lambda x, w: fp8.ops.dot_general(x, w, dims, recipe=recipe, state=state)

  def step(x, w):
    out, pull_back = jax.vjp(product, x, w)
    return out, pull_back(out)

  report = fp8.explain(jax.jit(step), x, w)
  assert {gemm.kernel for gemm in report.gemms} == {"Mosaic GPU"}
  assert len(report.gemms) == 3
  out, (x_grad, w_grad) = jax.jit(step)(x, w)
  np.testing.assert_array_equal(np.asarray(out, np.float32), 512)
  np.testing.assert_array_equal(np.asarray(x_grad, np.float32), 512 * 256)
  np.testing.assert_array_equal(np.asarray(w_grad, np.float32), 512 * 1024)
