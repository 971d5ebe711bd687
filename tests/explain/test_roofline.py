"""The roofline against sums by hand."""

import pytest

from flax_fp8.explain import roofline
from flax_fp8.explain.collectives import Collective
from flax_fp8.explain.target import GpuTarget
from flax_fp8.explain.traffic import Kernel, KernelClass

GPU = GpuTarget(
  name="round",
  description="",
  peak_flops={"fp8": 2e12, "bf16": 1e12, "tf32": 5e11},
  memory_bandwidth=1e9,
  link_bandwidth=1e8,
  memory_bytes=10**9,
)
A100 = GpuTarget.named("a100")


@pytest.mark.parametrize(
  ("dtype", "rate"),
  [("f8e4m3fn", 2e12), ("f8e5m2", 2e12), ("bf16", 1e12), ("f16", 1e12), ("f32", 5e11)],
)
def test_rates(dtype, rate):
  assert roofline.peak_flops(GPU, dtype) == rate


def test_fp8_counts_as_bf16_where_there_is_none():
  assert roofline.peak_flops(A100, "f8e4m3fn") == A100.peak_flops["bf16"]


def test_the_slower_of_memory_and_matrix_units():
  bound_by_memory = Kernel("a", KernelClass.GEMM, 1, 10**6, 10**6, flops=10, operand="bf16")
  bound_by_units = Kernel("b", KernelClass.GEMM, 3, 10, 10, flops=10**12, operand="bf16")
  assert roofline.kernel_seconds(bound_by_memory, GPU) == pytest.approx(2e-3)
  assert roofline.kernel_seconds(bound_by_units, GPU) == pytest.approx(3.0)


def test_the_estimate_has_sustained_rates_and_launches():
  kernels = [
    Kernel("a", KernelClass.FP8_GEMM, 2, 10, 10, flops=10**12, operand="f8e5m2"),
    Kernel("b", KernelClass.QUANTIZE, 3, 10**6, 10**6),
    Kernel("c", KernelClass.COLLECTIVE, 1, 10**6, 10**6),
  ]
  sent = [Collective("all-gather", "bf16", 10**6, group=2, times=1, path="")]
  gemms = 2 * 1e12 / (2e12 * roofline.SUSTAINED["fp8"])
  casts = 3 * 2e6 / (1e9 * roofline.SUSTAINED_MEMORY)
  want = gemms + casts + 6 * roofline.LAUNCH_SECONDS + 5e-3
  assert roofline.estimate(kernels, sent, GPU) == pytest.approx(want)


def test_a_cast_that_transposes_takes_longer():
  of = lambda **how: roofline.estimate(
    [Kernel("a", KernelClass.QUANTIZE, 1, 10**6, 0, **how)], [], GPU
  )
  casts, both = of() - roofline.LAUNCH_SECONDS, of(transposes=True) - roofline.LAUNCH_SECONDS
  assert casts == pytest.approx(1e-3 / roofline.SUSTAINED_MEMORY)
  assert both == pytest.approx(1e-3 / roofline.SUSTAINED_TRANSPOSING)


def test_sustained_rates_are_below_the_data_sheet():
  likely = roofline.sustained(A100)
  assert likely.peak_flops["bf16"] < A100.peak_flops["bf16"]
  assert likely.memory_bandwidth < A100.memory_bandwidth
  assert likely.link_bandwidth == A100.link_bandwidth


def test_totals_by_class():
  kernels = [
    Kernel("a", KernelClass.QUANTIZE, 2, 10**6, 0),
    Kernel("b", KernelClass.QUANTIZE, 1, 0, 10**6),
    Kernel("c", KernelClass.COLLECTIVE, 1, 10**6, 10**6),
  ]
  sent = [Collective("all-gather", "bf16", 10**6, group=2, times=1, path="")]
  quantize, collective = roofline.class_totals(kernels, sent, GPU)
  assert (quantize.kernels, quantize.bytes) == (3, 3 * 10**6)
  assert quantize.seconds == pytest.approx(3e-3)
  assert collective.seconds == pytest.approx(5e-3)  # half of it at 1e8 bytes/s
  assert [t.seconds for t in roofline.class_totals(kernels, sent, None)] == [None, None]
