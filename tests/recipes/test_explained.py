"""The GEMMs of each recipe in the compiled program: their number and types for each GPU."""

import functools
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import flax_fp8 as fp8
from harness.models import Mlp, Stack
from harness.names import FLAX
from harness.variants import VARIANTS
from questions.base import array
from questions.layers import explain_step

M, N, K = 512, 256, 384
ALL_FP8 = {"fprop": True, "dgrad": True, "wgrad": True}
# The XLA of JAX 0.12 selects the kernel for block scales by timing, which needs the GPU.
BLACKWELL_SCALES_BLOCKS = jax.__version_info__ < (0, 11)


@functools.cache
def report(recipe, target):
  """Makes the forward and backward pass of one Dense in bfloat16."""
  cls = functools.partial(fp8.Fp8DotGeneral, recipe=recipe)
  layer = nn.Dense(N, use_bias=False, dtype=jnp.bfloat16, dot_general_cls=cls)
  x, g = (jax.ShapeDtypeStruct((M, width), jnp.bfloat16) for width in (K, N))
  variables = jax.eval_shape(layer.init, jax.random.key(0), x)

  def step(variables, x, g):
    out, vjp = jax.vjp(layer.apply, variables, x)
    return out, vjp(g)

  return fp8.explain(step, variables, x, g, target=target)


@pytest.mark.parametrize(
  ("name", "target"),
  [("delayed", "h100"), ("delayed", "b200"), ("current", "h100"), ("rowwise", "h100")],
)
def test_three_fp8_gemms(name, target):
  got = report(fp8.get_recipe(name), target)
  assert {gemm.role.value: gemm.is_fp8 for gemm in got.gemms} == ALL_FP8
  assert got.total_gemms == 3
  assert got.doubts == ()


@pytest.mark.parametrize("target", ["h100", "b200"])
def test_block_is_one_fp8_gemm_a_block_without_a_kernel(target):
  with fp8.use_kernels("off" if target == "h100" else "auto"):
    got = report.__wrapped__(fp8.Float8BlockScaling(), target)
  rows = Counter()
  for gemm in got.gemms:
    assert gemm.is_fp8
    assert any("plain JAX" in note for note in gemm.notes) == (target == "b200")
    rows[frozenset((gemm.extent.m, gemm.extent.n)), gemm.extent.k] += gemm.times
  chunks = {(M, N): K, (M, K): N, (K, N): M}
  assert rows == {(frozenset(size), 128): k // 128 for size, k in chunks.items()}


@pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="the kernels need JAX 0.10.2")
@pytest.mark.parametrize("target", ["h100", "h200"])
def test_block_is_six_kernels_on_hopper(target):
  """Three quantizers and three GEMMs; and casts of the float32 parameter and of its gradient."""
  got = report(fp8.Float8BlockScaling(), target)
  assert (got.fp8_gemms, got.total_gemms, got.launches) == (3, 3, 6 + 2)
  assert {gemm.kernel for gemm in got.gemms} == {"Mosaic GPU"}
  assert {gemm.role.value for gemm in got.gemms} == {"fprop", "dgrad", "wgrad"}
  assert not any(gemm.notes for gemm in got.gemms)
  assert got.doubts == ()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h100", "b200"])
def test_mxfp8_is_fp8_where_matrix_units_scale_blocks(target):
  got = report(fp8.MXFP8BlockScaling(), target)
  scaled = target == "b200" and BLACKWELL_SCALES_BLOCKS
  assert (got.fp8_gemms, got.total_gemms) == (3 if scaled else 0, 3)
  assert all("block scales" in gemm.reason for gemm in got.gemms) or scaled


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "gemm"),
  [("delayed", "fprop"), ("delayed", "dgrad"), ("delayed", "wgrad"), ("rowwise", "wgrad")],
)
def test_a_gemm_in_high_precision_is_bf16_and_the_others_are_fp8(name, gemm):
  got = report(fp8.get_recipe(name, high_precision=(gemm,)), "h100")
  assert {g.role.value: g.is_fp8 for g in got.gemms} == {**ALL_FP8, gemm: False}
  (whole,) = (g for g in got.gemms if not g.is_fp8)
  assert (whole.lhs, whole.rhs, whole.reason) == ("bf16", "bf16", "FP8 was not asked for")


def test_stochastic_rounding_keeps_the_gemms_fp8():
  recipe = fp8.Float8CurrentScaling(grad_rounding="stochastic")
  layer = nn.Dense(N, use_bias=False, dtype=jnp.bfloat16, dot_general_cls=recipe.dot_general_cls)
  x, g = (jax.ShapeDtypeStruct((M, width), jnp.bfloat16) for width in (K, N))
  variables = jax.eval_shape(layer.init, jax.random.key(0), x)

  def step(variables, x, g, seed):
    rngs = {"sr_rng": jax.random.key(seed)}
    out, vjp = jax.vjp(lambda v, x: layer.apply(v, x, rngs=rngs), variables, x)
    return out, vjp(g)

  fp8.assert_fp8(step, variables, x, g, jax.ShapeDtypeStruct((), jnp.int32), target="h100")


def test_scanned_layers_start_no_more_kernels_than_with_flax_fp8_ops():
  kernels = {}
  for name in ("delayed", FLAX):
    stack = Stack(Mlp, (VARIANTS[name],), 8, scan=True)
    figures = explain_step(stack, array(1024, 2048), "h100", max_grad=name == "delayed")
    kernels[name] = figures["kernels"]
  assert kernels["delayed"] < kernels[FLAX]


def test_a_layer_with_delayed_scaling_updates_its_state_in_few_kernels():
  got = report(fp8.DelayedScaling(), "h100")
  small = sum(each.times for each in got.kernels if each.read + each.written < M * N // 2)
  # The maxima of histories, up to three for scales and their products, the new histories; and the
  # last reduction of each tensor's amax. Without preparing and recording together there are 12.
  assert small <= 5 + 3
