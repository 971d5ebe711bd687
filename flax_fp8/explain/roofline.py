"""Computes the roofline and the estimated time of a program.

The seconds are a sum over kernels plus a sum over collectives. The term of a kernel is
``times * max(flops / peak_flops, bytes / memory_bandwidth)``, and the term of a collective is
``bytes sent / link_bandwidth``. With data-sheet rates, the sum is the roofline: a lower bound
without launch costs, overlap and caches. The estimate uses the fractions of these rates that an
H100 and an H200 sustained, and adds the cost of each launch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from flax_fp8.explain import mosaic
from flax_fp8.explain.collectives import Collective
from flax_fp8.explain.hlo import bits
from flax_fp8.explain.target import GpuTarget
from flax_fp8.explain.traffic import Kernel, KernelClass

# Fractions of their data-sheet rates that an H100 and an H200 with 700 W sustained, and extra
# seconds per launch. Fitted to what benchmarks/gemm.py and benchmarks/block.py measured there.
SUSTAINED = {"fp8": 0.67, "bf16": 0.69, "tf32": 0.69}
SUSTAINED_ATTENTION = dict.fromkeys(SUSTAINED, 0.48)  # cuDNN's, with 8,192 causal tokens
# Block-scaled GEMMs of Pallas Mosaic GPU, which also add in float32 on the CUDA cores.
SUSTAINED_MOSAIC = dict.fromkeys(SUSTAINED, 0.48)
SUSTAINED_MEMORY = 0.66
SUSTAINED_TRANSPOSING = 0.50  # memory, by kernels that both quantize and transpose a tensor
LAUNCH_SECONDS = 2.5e-6


def sustained(
  target: GpuTarget, fractions: Mapping[str, float] = SUSTAINED, memory: float = SUSTAINED_MEMORY
) -> GpuTarget:
  """Returns the same GPU with sustained instead of peak rates."""
  rates = {dtype: fractions[dtype] * rate for dtype, rate in target.peak_flops.items()}
  bandwidth = memory * target.memory_bandwidth
  return dataclasses.replace(target, peak_flops=rates, memory_bandwidth=bandwidth)


def estimate(
  kernels: Sequence[Kernel], collectives: Sequence[Collective], target: GpuTarget
) -> float:
  """Returns the estimated seconds of a step: kernels at sustained rates, launches, collectives."""
  likely, in_attention = sustained(target), sustained(target, SUSTAINED_ATTENTION)
  transposing = sustained(target, memory=SUSTAINED_TRANSPOSING)
  block_scaled = sustained(target, SUSTAINED_MOSAIC)

  def rates(kernel: Kernel) -> GpuTarget:
    if kernel.maker == mosaic.NAME:
      return block_scaled
    if kernel.kind is KernelClass.LIBRARY:
      return in_attention
    return transposing if kernel.transposes else likely

  seconds = sum(kernel_seconds(each, rates(each)) + LAUNCH_SECONDS * each.times for each in kernels)
  return seconds + sum(collective_seconds(each, target) for each in collectives)


def peak_flops(target: GpuTarget, dtype: str) -> float:
  """Returns the peak FLOP/s of the matrix units for an operand dtype, as XLA prints it.

  FP8 counts as BF16 on a GPU without FP8. float32 counts as TF32.
  """
  if bits(dtype) == 8:
    return target.peak_flops.get("fp8", target.peak_flops["bf16"])
  return target.peak_flops["bf16" if bits(dtype) <= 16 else "tf32"]


def kernel_seconds(kernel: Kernel, target: GpuTarget) -> float:
  """Returns the seconds of all runs of a kernel in a step; 0 for collectives."""
  if kernel.kind is KernelClass.COLLECTIVE:
    return 0.0
  memory = (kernel.read + kernel.written) / target.memory_bandwidth
  compute = kernel.flops / peak_flops(target, kernel.operand) if kernel.flops else 0.0
  return kernel.times * max(memory, compute)


def collective_seconds(collective: Collective, target: GpuTarget) -> float:
  """Returns the seconds of all runs of a collective in a step."""
  return collective.sent / target.link_bandwidth


@dataclasses.dataclass(frozen=True)
class ClassTotal:
  """Totals of all kernels of one class.

  Attributes:
    kind: the class.
    kernels: number of launches in a step.
    bytes: bytes that they read and write.
    seconds: their roofline; None if the rates of the GPU are not known.
  """

  kind: KernelClass
  kernels: int
  bytes: int
  seconds: float | None


def class_totals(
  kernels: Sequence[Kernel], collectives: Sequence[Collective], target: GpuTarget | None
) -> tuple[ClassTotal, ...]:
  """Returns the totals of each class of kernels in the program."""
  totals = []
  for kind in KernelClass:
    found = [kernel for kernel in kernels if kernel.kind is kind]
    if not found:
      continue
    seconds = None
    if target is not None:
      seconds = sum(kernel_seconds(kernel, target) for kernel in found)
      if kind is KernelClass.COLLECTIVE:
        seconds = sum(collective_seconds(each, target) for each in collectives)
    launches, moved = sum(k.times for k in found), sum(k.bytes for k in found)
    totals.append(ClassTotal(kind, launches, moved, seconds))
  return tuple(totals)
