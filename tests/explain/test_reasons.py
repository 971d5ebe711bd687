"""Each cause of a GEMM that is not FP8 gives its own reason."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import flax_fp8 as fp8
from flax_fp8.explain import deviceless
from tests.explain.programs import BF16, spec

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
MATRIX = spec(256, 256)
BOTH = "bf16 bf16"


def quantize(x, dtype=E4M3):
  return jnp.clip(x.astype(jnp.float32) / 2, -448, 448).astype(dtype)


def product(lhs, rhs):
  return lax.dot_general(lhs, rhs, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def values(x):
  """Returns FP8 values in BF16, the operands of a GEMM that XLA can convert to FP8."""
  return quantize(x).astype(BF16)


FALLBACKS = {
  "not_asked": (product, (MATRIX, MATRIX), "FP8 was not asked for"),
  "left_high": (
    lambda a, b: product(jnp.tanh(a), values(b)),
    (MATRIX, MATRIX),
    "the left operand is bf16, made by tanh: both must be FP8",
  ),
  "right_high": (
    lambda a, kernel: product(values(a), kernel),
    (MATRIX, MATRIX),
    "the right operand is bf16, the argument kernel: both must be FP8",
  ),
  "both_e5m2": (
    lambda a, b: product(quantize(a, E5M2), quantize(b, E5M2)),
    (MATRIX, MATRIX),
    "both operands are f8e5m2: cuBLASLt wants at least one f8e4m3fn",
  ),
  "fnuz": (
    lambda a, b: product(quantize(a, jnp.float8_e4m3fnuz), quantize(b, jnp.float8_e4m3fnuz)),
    (MATRIX, MATRIX),
    "f8e4m3fnuz is not a format of NVIDIA's matrix units: use f8e4m3fn or f8e5m2",
  ),
  "ieee_e4m3": (
    lambda a, b: product(quantize(a, jnp.float8_e4m3), quantize(b, jnp.float8_e4m3)),
    (MATRIX, MATRIX),
    "f8e4m3 is not a format of NVIDIA's matrix units",
  ),
  "row_scales": (
    lambda a, b, scale: product(values(a) * scale, values(b)),
    (MATRIX, MATRIX, spec(256, 1)),
    "the left operand is scaled by 256 numbers before the GEMM, and XLA takes one: scale the",
  ),
  "changed": (
    lambda a, b: product(values(a), jnp.tanh(values(b))),
    (MATRIX, MATRIX),
    "the right operand was FP8, but tanh changed it in bf16: quantize after that",
  ),
  "vector": (
    lambda a, b: product(quantize(a), quantize(b)[:, None]),
    (MATRIX, spec(256)),
    "a product with a vector does not use matrix units: exclude it from FP8",
  ),
  "ragged": (
    lax.ragged_dot,
    (MATRIX, spec(2, 256, 128), spec(2, dtype=jnp.int32)),
    "multiplies bf16 by bf16, and does not come from a dot_general",
  ),
}


@pytest.mark.parametrize(("fn", "args", "expected"), FALLBACKS.values(), ids=FALLBACKS)
def test_fall_back(fn, args, expected):
  report = fp8.explain(fn, *args, target="h100")
  (gemm,) = report.gemms
  assert not gemm.is_fp8
  assert expected in gemm.reason
  assert report.fp8_gemms == 0
  assert expected in re.sub(r"\s+", " ", str(report))


def test_a_gpu_without_fp8_units():
  report = fp8.explain(
    lambda a, b: product(quantize(a), quantize(b)), MATRIX, MATRIX, target="a100"
  )
  assert "the GPU has no FP8 matrix units" in report.gemms[0].reason


def test_an_unknown_reason():
  """Without the version of the toolkit, XLA assumes that cuBLASLt has no FP8."""
  h100 = fp8.GpuTarget.named("h100")
  description = h100.description.replace("runtime_version { major: 13 }", "")
  target = fp8.GpuTarget(
    name="old",
    description=description,
    peak_flops=h100.peak_flops,
    memory_bandwidth=1e12,
    link_bandwidth=1e11,
    memory_bytes=1,
  )
  report = fp8.explain(
    lambda a, b: product(quantize(a), quantize(b)), MATRIX, MATRIX, target=target
  )
  assert "--xla_gpu_enable_triton_gemm=false" in report.gemms[0].reason


def test_a_product_that_names_no_algorithm_is_left_to_triton(monkeypatch):
  """Compiles as on a GPU with the default flags of XLA."""
  options = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": True}
  monkeypatch.setattr(deviceless, "OPTIONS", options)
  scaled = lambda a, b, s: product(values(quantize(a)) * s, values(quantize(b)))
  report = fp8.explain(scaled, MATRIX, MATRIX, spec(), target="h100")
  assert not report.fp8_gemms
  assert "names no FP8 algorithm" in report.gemms[0].reason


TAKEN = {
  "plain": (lambda a, b: product(quantize(a), quantize(b)), (MATRIX, MATRIX)),
  "scalar_scales": (
    lambda a, b, s: product(values(a) * s, values(b)),
    (MATRIX, MATRIX, spec()),
  ),
  "two_contracting": (
    lambda a, b: lax.dot_general(
      quantize(a), quantize(b), (((1, 2), (0, 1)), ((), ())), preferred_element_type=jnp.float32
    ),
    (spec(256, 16, 32), spec(16, 32, 128)),
  ),
  "two_batches": (
    lambda a, b: lax.dot_general(
      quantize(a), quantize(b), (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=BF16
    ),
    (spec(4, 2, 64, 32), spec(4, 2, 32, 64)),
  ),
}


@pytest.mark.parametrize(("fn", "args"), TAKEN.values(), ids=TAKEN)
@pytest.mark.parametrize("target", ["h100", "b200"])
def test_operations_that_keep_fp8(fn, args, target):
  report = fp8.explain(fn, *args, target=target)
  assert [gemm.is_fp8 for gemm in report.gemms] == [True]
  assert report.gemms[0].reason == ""


def scaled(lhs, rhs):
  """MXFP8 with JAX's own function."""
  one = lambda x: jnp.ones((*x.shape[:2], x.shape[2] // 32), jnp.float8_e8m0fnu)
  return jax.nn.scaled_matmul(
    lhs.astype(E4M3), rhs.astype(E4M3), one(lhs), one(rhs), preferred_element_type=BF16
  )


# In JAX 0.12, XLA makes this choice by timing on a GPU.
CHOOSES_BLOCK_SCALES = jax.__version_info__ < (0, 11)


@pytest.mark.parametrize("target", ["h100", "b200"])
def test_scales_of_blocks(target):
  (gemm,) = fp8.explain(scaled, spec(2, 256, 128), spec(2, 128, 128), target=target).gemms
  assert (gemm.extent.batch, gemm.extent.k) == (2, 128)
  assert {gemm.extent.m, gemm.extent.n} == {256, 128}
  assert gemm.is_fp8 == (target == "b200" and CHOOSES_BLOCK_SCALES)
  if gemm.is_fp8:
    assert gemm.kernel == "cuDNN block-scaled"
  else:
    assert "has block scales, and XLA chose no kernel that applies them" in gemm.reason


def test_sizes_that_are_no_multiples_of_16_are_padded():
  fn = lambda a, b: product(quantize(a), quantize(b))
  (gemm,) = fp8.explain(fn, spec(100, 250), spec(250, 130), target="h100").gemms
  assert gemm.is_fp8
  assert (gemm.extent.m, gemm.extent.n, gemm.extent.k) == (112, 144, 256)
  assert gemm.notes == (
    "lhs padded from 100x250 to 112x256",
    "rhs padded from 130x250 to 144x256",
  )


def test_raw_autodiff_of_an_fp8_dot_leaves_backward_out():
  """Autodiff multiplies a float32 gradient by an FP8 operand, which is not an FP8 product."""
  loss = lambda a, b: jnp.mean(product(quantize(a), quantize(b)) ** 2)
  report = fp8.explain(jax.value_and_grad(loss, argnums=(0, 1)), MATRIX, MATRIX, target="h100")
  reasons = [gemm.reason for gemm in report.gemms]
  assert reasons[0] == ""
  assert all(re.search("operand is f32, made by .*: both must be FP8", r) for r in reasons[1:])
