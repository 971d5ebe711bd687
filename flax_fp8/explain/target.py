"""The GPUs to compile for: XLA's descriptions and peak rates."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType

# XLA's GpuTargetConfigProto, with the fields of all JAX releases that flax_fp8 supports. XLA reads
# the version of the toolkit to know whether cuBLASLt supports FP8.
_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_memory}
  shared_memory_per_block_optin: {shared_memory_optin}
  threads_per_core_limit: {threads_per_core}
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {memory_bandwidth:.0f}
  l2_cache_size: {l2_cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory_bytes}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "{label}"
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuTarget:
  """A GPU to compile for: its description for XLA, and its peak rates for the roofline.

  ``GpuTarget.named`` returns ``"h100"``, ``"h200"``, ``"b200"``, ``"a100"`` and ``"l40s"``. For any
  other NVIDIA GPU, pass XLA's description of it.

  Attributes:
    name: name in reports.
    description: text proto of XLA's ``GpuTargetConfigProto``.
    peak_flops: dense FLOP/s of the matrix units by operand dtype: ``"bf16"``, ``"tf32"``, and
      ``"fp8"`` if the GPU supports it.
    memory_bandwidth: bytes/s of the GPU memory.
    link_bandwidth: bytes/s to other GPUs, in one direction.
    memory_bytes: bytes of the GPU memory.

  Raises:
    ValueError: ``peak_flops`` lacks ``"bf16"`` or ``"tf32"``, or a rate is not positive.

  Example:
    >>> import flax_fp8 as fp8
    >>> fp8.GpuTarget.named("h100").peak_flops["fp8"]
    1978900000000000.0

  References:
    NVIDIA's data sheets of the A100, L40S, H100, H200 and HGX B200; XLA,
    ``xla/stream_executor/device_description.proto``.
  """

  name: str
  description: str
  peak_flops: Mapping[str, float]
  memory_bandwidth: float
  link_bandwidth: float
  memory_bytes: int

  def __post_init__(self) -> None:
    if missing := {"bf16", "tf32"} - self.peak_flops.keys():
      raise ValueError(
        f"GpuTarget: peak_flops must name the operand types 'bf16' and 'tf32', and 'fp8' if the "
        f"GPU has it; got {dict(self.peak_flops)}. Add {sorted(missing)} in FLOP/s."
      )
    rates = [*self.peak_flops.values(), self.memory_bandwidth, self.link_bandwidth]
    if min(*rates, self.memory_bytes) <= 0:
      raise ValueError(
        f"GpuTarget: rates and memory_bytes must be positive; got {self}. Take them from the "
        "GPU's data sheet."
      )

  def __getstate__(self) -> dict[str, object]:
    # pickle supports dicts, but not read-only views of dicts.
    return {**vars(self), "peak_flops": dict(self.peak_flops)}

  @property
  def device_kind(self) -> str:
    """Name of the GPU in its driver; ``name`` if the description lacks it."""
    found = re.search(r'device_description_str: *"([^"]*)"', self.description)
    return found[1] if found else self.name

  @classmethod
  def named(cls, name: str) -> GpuTarget:
    """Returns a known GPU by name.

    Args:
      name: one of ``"a100"``, ``"b200"``, ``"h100"``, ``"h200"``, ``"l40s"``.

    Returns:
      The GPU.

    Raises:
      ValueError: the name is unknown.
    """
    if name not in _TARGETS:
      raise ValueError(
        f"GpuTarget: the name must be one of {sorted(_TARGETS)}; got {name!r}. Pass one of these, "
        "or GpuTarget(...) with XLA's description of your GPU."
      )
    return _TARGETS[name]

  @classmethod
  def of_kind(cls, kind: str) -> GpuTarget | None:
    """Returns a known GPU by the name in its driver, ``device.device_kind``, or None.

    Boards of the same chip with other rates, such as ``"NVIDIA H100 PCIe"``, give None.
    """
    words = set(re.split(r"[\s-]+", kind.lower()))
    if words & {"pcie", "nvl", "40gb"}:
      return None
    return next((target for name, target in _TARGETS.items() if name in words), None)


def _gpu(
  name: str,
  label: str,
  capability: tuple[int, int],
  *,
  cores: int,
  clock: float,
  memory_bytes: int,
  l2_cache: int,
  memory_bandwidth: float,
  link_bandwidth: float,
  peak_tflops: Mapping[str, float],
  fpus: int = 128,
  shared_memory: int = 233472,
  threads_per_core: int = 2048,
) -> GpuTarget:
  text = _DESCRIPTION.format(
    label=label,
    major=capability[0],
    minor=capability[1],
    cores=cores,
    fpus=fpus,
    clock=clock,
    memory_bytes=memory_bytes,
    l2_cache=l2_cache,
    memory_bandwidth=memory_bandwidth,
    shared_memory=shared_memory,
    shared_memory_optin=shared_memory - 1024,
    threads_per_core=threads_per_core,
  )
  return GpuTarget(
    name=name,
    description=text,
    peak_flops=MappingProxyType({key: 1e12 * value for key, value in peak_tflops.items()}),
    memory_bandwidth=memory_bandwidth,
    link_bandwidth=link_bandwidth,
    memory_bytes=memory_bytes,
  )


_HOPPER = {"fp8": 1978.9, "bf16": 989.4, "tf32": 494.7}

_TARGETS = {
  target.name: target
  for target in (
    _gpu(
      "a100",
      "NVIDIA A100-SXM4-80GB",
      (8, 0),
      cores=108,
      clock=1.41,
      fpus=64,
      shared_memory=167936,
      memory_bytes=85100068864,
      l2_cache=41943040,
      memory_bandwidth=2.039e12,
      link_bandwidth=300e9,
      peak_tflops={"bf16": 312.0, "tf32": 156.0},
    ),
    _gpu(
      "l40s",
      "NVIDIA L40S",
      (8, 9),
      cores=142,
      clock=2.52,
      shared_memory=102400,
      threads_per_core=1536,
      memory_bytes=47697362944,
      l2_cache=100663296,
      memory_bandwidth=0.864e12,
      link_bandwidth=32e9,  # PCIe 4.0 x16; the L40S has no NVLink
      peak_tflops={"fp8": 733.0, "bf16": 362.05, "tf32": 183.0},
    ),
    _gpu(
      "h100",
      "NVIDIA H100 80GB HBM3",
      (9, 0),
      cores=132,
      clock=1.98,
      memory_bytes=84942979072,
      l2_cache=52428800,
      memory_bandwidth=3.352e12,
      link_bandwidth=450e9,
      peak_tflops=_HOPPER,
    ),
    _gpu(
      "h200",
      "NVIDIA H200",
      (9, 0),
      cores=132,
      clock=1.98,
      memory_bytes=151397597184,
      l2_cache=52428800,
      memory_bandwidth=4.8e12,
      link_bandwidth=450e9,
      peak_tflops=_HOPPER,
    ),
    _gpu(
      "b200",
      "NVIDIA B200",
      (10, 0),
      cores=148,
      clock=1.965,
      memory_bytes=191514411008,
      l2_cache=132644864,
      memory_bandwidth=7.672e12,
      link_bandwidth=900e9,
      peak_tflops={"fp8": 4500.0, "bf16": 2250.0, "tf32": 1125.0},
    ),
  )
}
NAMES = tuple(sorted(_TARGETS))
