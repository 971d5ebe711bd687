"""GEMMs on the card: that they are FP8, and what they compute."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from flax_fp8 import contraction, products
from flax_fp8.quantize import QTensor

RECIPES = {
  "delayed": fp8.DelayedScaling(amax_history_len=4),
  "delayed, E4M3": fp8.DelayedScaling(amax_history_len=4, fp8_format=fp8.Format.E4M3),
  "current": fp8.Float8CurrentScaling(),
  "rowwise": fp8.Float8RowwiseScaling(),
}
# Fast accumulation keeps about 14 bits of each sum; results are bfloat16.
TOLERANCE = {"rtol": 2**-7, "atol": 2**-7}
E4M3 = jnp.float8_e4m3fn


def layer(recipe, dtype=jnp.bfloat16):
  cls = recipe and recipe.dot_general_cls
  return nn.Dense(256, use_bias=False, dtype=dtype, param_dtype=dtype, dot_general_cls=cls)


def without_ties(x):
  """Gives each row a largest value whose digits are all ones.

  The inverse of a scale differs in its last bit from device to device. That shows where
  ``x / scale`` is halfway between two FP8 values. In bfloat16 this is common, but it never happens
  with such an amax.
  """
  return x.at[..., 0].set(8 * (1 - jnp.finfo(x.dtype).eps / 2).astype(x.dtype))


def arguments(recipe, tokens=512, width=128, dtype=jnp.bfloat16):
  random = np.random.default_rng(0)
  x, grad = (
    without_ties(jnp.asarray(random.normal(size=(tokens, n)), dtype)) for n in (width, 256)
  )
  variables = layer(recipe, dtype).init(jax.random.key(0), x)
  kernel = without_ties(variables["params"]["kernel"])
  return {**variables, "params": {"kernel": kernel}}, x, grad


def step(recipe, variables, x, grad):
  out, pull_back = jax.vjp(layer(recipe, x.dtype).apply, variables, x)
  return out, pull_back(grad)


def test_the_card_multiplies_fp8():
  assert fp8.capability() == (True, fp8.capability()[1])


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_gemm_is_fp8(recipe):
  """With XLA's default flags too."""
  report = fp8.explain(functools.partial(step, recipe), *arguments(recipe))
  assert not report.described
  assert (report.fp8_gemms, report.total_gemms) == (3, 3)
  assert {gemm.kernel for gemm in report.gemms} == {"cuBLASLt FP8"}


def test_the_baseline_is_bfloat16():
  report = fp8.explain(functools.partial(step, None), *arguments(None))
  assert {gemm.lhs for gemm in report.gemms} == {"bf16"}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_card_computes_what_the_cpu_emulates(recipe, dtype):
  """Three steps, so that delayed scales come from histories."""
  given = arguments(recipe, dtype=dtype)
  found = []
  for device in (jax.devices("cpu")[0], jax.devices()[0]):
    with jax.default_device(device):
      variables, x, grad = jax.device_put(given, device)
      for _ in range(3):
        out, (grads, dx) = jax.jit(functools.partial(step, recipe))(variables, x, grad)
        variables = {**variables, **{k: v for k, v in grads.items() if k != "params"}}
      found.append(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (out, dx, grads)))
  largest = lambda leaf: np.abs(leaf).max() or 1.0
  relative = lambda tree: jax.tree.map(lambda a, b: a / largest(b), tree, found[0])
  compare = functools.partial(np.testing.assert_allclose, **TOLERANCE)
  jax.tree.map(compare, relative(found[1]), relative(found[0]))


SIZES = {"small": (256, 512, 128), "large": (2048, 4096, 1024)}


def product(shape, dtype, fast):
  """A product on the card, and that of float64; scales that bfloat16 does not have."""
  m, k, n = shape
  random = np.random.default_rng(1)
  gemm = contraction.forward_gemm((((1,), (0,)), ((), ())), (m, k), (k, n), kernel=1)
  lhs, rhs = (
    QTensor(jnp.asarray(random.normal(size=size) * 50, E4M3), jnp.float32(scale))
    for size, scale in (((m, k), 0.0123456), ((k, n), 0.0345678))
  )
  multiply = functools.partial(
    products.dot_per_tensor, gemm=gemm, dtype=dtype, fast_accumulation=fast, shared=0
  )
  want = np.asarray(lhs.data, np.float64) @ np.asarray(rhs.data, np.float64)
  want *= np.float64(lhs.scale) * np.float64(rhs.scale)
  return np.asarray(jax.jit(multiply)(lhs, rhs), np.float64), want


@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_product_is_that_of_float64(dtype, fast, shape):
  """Were the scales rounded to bfloat16, the mean ratio would show it."""
  got, want = product(shape, dtype, fast)
  np.testing.assert_allclose(got, want, rtol=2**-7, atol=2**-7 * np.abs(want).max())
  assert abs(np.vdot(got, want) / np.vdot(want, want) - 1) < 5e-4


def test_full_accumulation_is_nearer_to_float64_than_fast():
  errors = {}
  for fast in (True, False):
    got, want = product(SIZES["large"], jnp.float32, fast)
    errors[fast] = np.sqrt(np.mean((got - want) ** 2))
  assert errors[False] < errors[True]
