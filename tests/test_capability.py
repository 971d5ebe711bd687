"""Which devices multiply FP8."""

import dataclasses

import jax
import pytest

import flax_fp8 as fp8


@dataclasses.dataclass
class Device:
  """What ``capability`` reads of a JAX device."""

  platform: str
  device_kind: str
  compute_capability: str | None = None


CASES = {
  "V100": (Device("gpu", "Tesla V100", "7.0"), False),
  "A100": (Device("gpu", "NVIDIA A100", "8.0"), False),
  "L40": (Device("gpu", "NVIDIA L40", "8.9"), True),
  "H100": (Device("gpu", "NVIDIA H100", "9.0"), True),
  "B200": (Device("gpu", "NVIDIA B200", "10.0"), True),
  "MI250": (Device("gpu", "AMD MI250", "gfx90a"), False),
  "MI300": (Device("gpu", "AMD MI300X", "gfx942"), True),
  "TPU": (Device("tpu", "TPU v4"), False),
}


@pytest.mark.parametrize(("device", "supported"), CASES.values(), ids=CASES)
def test_by_device(device, supported):
  got, reason = fp8.capability(device)
  assert got == supported
  assert device.device_kind in reason


def test_cpu_emulates_and_says_so():
  assert fp8.capability(jax.devices("cpu")[0]) == fp8.capability()
  supported, reason = fp8.capability()
  assert supported
  assert "emulated" in reason
