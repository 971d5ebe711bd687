"""Descriptions and rates of GPU targets."""

import dataclasses
import re

import pytest

import flax_fp8 as fp8
from flax_fp8.explain.target import NAMES

H100 = fp8.GpuTarget.named("h100")


@pytest.mark.parametrize("name", NAMES)
def test_description_and_rates_agree(name, described):
  target, device = fp8.GpuTarget.named(name), described(name)
  assert target.name == name
  assert name.upper() in device.device_kind.upper()
  assert fp8.GpuTarget.of_kind(device.device_kind) is target
  supported, _ = fp8.capability(device)
  assert supported == ("fp8" in target.peak_flops)
  bandwidth = re.search(r"memory_bandwidth: (\d+)", target.description)
  assert float(bandwidth[1]) == target.memory_bandwidth


def test_fp8_is_twice_bf16_is_twice_tf32():
  for name in ("h100", "h200", "b200"):
    rates = fp8.GpuTarget.named(name).peak_flops
    assert rates["fp8"] == pytest.approx(2 * rates["bf16"], rel=1e-3)
    assert rates["bf16"] == pytest.approx(2 * rates["tf32"], rel=1e-3)


def test_kinds_that_are_not_known():
  for kind in ("NVIDIA GeForce RTX 4090", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB"):
    assert fp8.GpuTarget.of_kind(kind) is None


ERRORS = {
  "no_bf16": ({"peak_flops": {"tf32": 1.0}}, r"Add \['bf16'\] in FLOP/s"),
  "negative": ({"memory_bandwidth": -1.0}, "rates and memory_bytes must be positive"),
}


@pytest.mark.parametrize(("change", "match"), ERRORS.values(), ids=ERRORS)
def test_errors(change, match):
  with pytest.raises(ValueError, match=match):
    dataclasses.replace(H100, **change)
