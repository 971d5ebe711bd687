"""Products of quantised tensors against float64."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from flax_fp8 import contraction, products
from flax_fp8.explain.compile import compile_program
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


GEMM = contraction.forward_gemm((((1,), (0,)), ((), ())), (16, 32), (32, 48), kernel=1)


def per_tensor(lhs, rhs):
  return products.dot_per_tensor(lhs, rhs, GEMM, jnp.bfloat16, fast_accumulation=False)


def scaled(*shape, n_scales=None):
  """Scales that bfloat16 does not have."""
  scale = random.uniform(0.001, 0.1, [n_scales] if n_scales else []).astype(np.float32)
  data = jnp.asarray(random.normal(size=shape) * 100, jnp.float8_e4m3fn)
  return QTensor(data, jnp.asarray(scale))


def test_the_scales_inside_a_gemm_and_outside_of_it(monkeypatch):
  """The second as a GPU computes it, here without an FP8 GEMM: values rounded to bfloat16."""
  lhs, rhs = scaled(16, 32), scaled(32, 48)
  whole = [np.asarray(q.data, np.float64) * np.float64(q.scale) for q in (lhs, rhs)]
  want = whole[0] @ whole[1]
  np.testing.assert_allclose(np.float64(per_tensor(lhs, rhs)), want, rtol=2**-8, atol=1e-5)
  chosen = lambda *operands, cuda, default: cuda(*operands)
  monkeypatch.setattr(products.lax, "platform_dependent", chosen)
  error = np.float64(per_tensor(lhs, rhs)) - want
  assert 0 < np.sqrt(np.mean(error**2) / np.mean(want**2)) < 2**-7


@pytest.mark.parametrize("inner", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("scales", [None, 4], ids=["one scale", "scales"])
def test_dot_per_tensor_under_vmap(scales, inner):
  """A mapped scale is for one product of several, and is applied to it alone."""
  lhs, rhs = scaled(4, 16, 32, n_scales=scales), scaled(4, 32, 48, n_scales=scales)
  axes = QTensor(0, None if scales is None else 0)
  of = per_tensor
  if inner:
    alone = jax.vmap(per_tensor, (QTensor(0, None), QTensor(None, None)))
    of = lambda lhs, rhs: alone(QTensor(lhs.data[None], lhs.scale), rhs)
  got = jax.jit(jax.vmap(of, (axes, axes)))(lhs, rhs)
  for i in range(4):
    one = [QTensor(q.data[i], q.scale if scales is None else q.scale[i]) for q in (lhs, rhs)]
    np.testing.assert_array_equal(got[i].reshape(16, 48), per_tensor(*one))


def compiled_for_h100(fn, *args):
  pytest.importorskip("jax_plugins.xla_cuda13", reason="the CUDA plugin exists for Linux alone")
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
  return compile_program(fn, shapes, target="h100", mesh=None, timeout=300).hlo


def test_a_gpu_gets_one_fp8_gemm_with_exact_scales():
  """It writes bfloat16, and no kernel rounds a scale."""
  hlo = compiled_for_h100(per_tensor, scaled(16, 32), scaled(32, 48))
  assert hlo.count('custom_call_target="__cublas$lt$matmul$f8"') == 1
  assert "bf16[16,48]" in hlo
  assert "f32[16,48]" not in hlo
  assert "bf16[]" not in hlo


@pytest.mark.parametrize(
  "recipe",
  [
    fp8.DelayedScaling(),
    fp8.DelayedScaling(interval=2, first_step="current"),
    fp8.Float8CurrentScaling(),
  ],
  ids=["delayed", "interval", "current"],
)
def test_no_scale_of_a_layer_is_rounded(recipe):
  """A reshape between its two casts would be enough for XLA to keep the rounding."""
  layer = nn.Dense(64, dtype=jnp.bfloat16, dot_general_cls=recipe.dot_general_cls)
  x = jax.ShapeDtypeStruct((32, 48), jnp.bfloat16)
  variables = jax.eval_shape(layer.init, jax.random.key(0), x)
  loss = lambda variables, x: jnp.mean(jnp.sin(layer.apply(variables, x).astype(jnp.float32)))
  hlo = compiled_for_h100(fp8.value_and_grad(loss, argnums=(0, 1)), variables, x)
  assert hlo.count('custom_call_target="__cublas$lt$matmul$f8"') == 3
  assert not re.search(r"= bf16\[1?\]\S* convert\(", hlo)


def test_a_gpu_gets_fp8_gemms_of_experts():
  """With a scale for all of them, or one for each."""
  for scales in (None, 4):
    axes = QTensor(0, None if scales is None else 0)
    args = scaled(4, 16, 32, n_scales=scales), scaled(4, 32, 48, n_scales=scales)
    hlo = compiled_for_h100(jax.vmap(per_tensor, (axes, axes)), *args)
    assert hlo.count('custom_call_target="__cublas$lt$matmul$f8"') == 1, scales


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
  shape = lambda rows, mapped: (*[3][:mapped], 2, rows)
  spec = lambda rows, mapped: QTensor(
    jax.ShapeDtypeStruct((*shape(rows, mapped), 128), jnp.float8_e4m3fn),
    jax.ShapeDtypeStruct((*shape(rows, mapped), 4), jnp.float8_e8m0fnu),
  )
  args = spec(128, axes[0] == 0), spec(256, axes[1] == 0)
  report = fp8.explain(jax.vmap(product_of, in_axes=axes), *args, target="b200")
  assert [gemm.flops for gemm in report.gemms] == [2 * 3 * 2 * 128 * 256 * 128]
