"""Where kernels run."""

import pytest

import flax_fp8 as fp8
from flax_fp8.explain.target import NAMES, GpuTarget
from flax_fp8.kernels import choice
from flax_fp8.kernels.choice import Gpu


def test_refuses_another_word():
  with pytest.raises(ValueError, match=r"use_kernels: which must be one of .*got 'on'"):
    fp8.use_kernels("on")


def test_no_kernel_runs_on_a_cpu():
  assert not choice.available()


TAKEN = {
  ("off", Gpu.ROWS_ONLY): [],
  ("auto", Gpu.ROWS_ONLY): [True],
  ("all", Gpu.ROWS_ONLY): [True, False],
  ("auto", Gpu.ANY_LAYOUT): [],
  ("all", Gpu.ANY_LAYOUT): [True, False],
  ("all", Gpu.OTHER): [],
}


@pytest.mark.parametrize(("which", "gpu", "taken"), [(*key, taken) for key, taken in TAKEN.items()])
def test_what_the_switch_leaves_to_kernels(monkeypatch, which, gpu, taken):
  monkeypatch.setattr(choice, "_gpu", lambda: gpu)
  with fp8.use_kernels(which):
    assert [opaque for opaque in (True, False) if choice.takes(opaque=opaque)] == taken
    assert choice.available() == (which != "off" and gpu is not Gpu.OTHER)


@pytest.mark.parametrize(("which", "available"), [("auto", False), ("all", True)])
def test_in_a_loop_there_are_no_kernels_unasked(monkeypatch, which, available):
  monkeypatch.setattr(choice, "_gpu", lambda: Gpu.ROWS_ONLY)
  with fp8.use_kernels(which), choice.in_loop(True):
    assert choice.available() == choice.takes(opaque=True) == available


def test_without_the_triton_backend_it_is_plain_jax(monkeypatch):
  monkeypatch.setattr(choice, "_gpu", lambda: Gpu.ROWS_ONLY)
  monkeypatch.setattr(choice._compat, "HAS_TRITON", False)
  assert not choice.available()


OTHERS = {
  "NVIDIA GH200 480GB": Gpu.ROWS_ONLY,
  "NVIDIA L4": Gpu.ROWS_ONLY,
  "NVIDIA GeForce RTX 4090": Gpu.ROWS_ONLY,
  "NVIDIA GB200": Gpu.ANY_LAYOUT,
  "NVIDIA GeForce RTX 5090": Gpu.ANY_LAYOUT,
  "NVIDIA RTX 6000 Ada Generation": Gpu.OTHER,  # as an older RTX 6000 by its first words
  "NVIDIA A10": Gpu.OTHER,
  "Quadro RTX 4000": Gpu.OTHER,
  "Tesla V100-SXM2-16GB": Gpu.OTHER,
  "cpu": Gpu.OTHER,
}
NAMED = {
  "a100": Gpu.OTHER,
  "l40s": Gpu.ROWS_ONLY,
  "h100": Gpu.ROWS_ONLY,
  "h200": Gpu.ROWS_ONLY,
  "b200": Gpu.ANY_LAYOUT,
}


def test_knows_every_described_gpu():
  assert {name: choice._by_name(GpuTarget.named(name).device_kind) for name in NAMES} == NAMED


@pytest.mark.parametrize(("kind", "gpu"), OTHERS.items())
def test_knows_others(kind, gpu):
  assert choice._by_name(kind) is gpu


class Device:
  device_kind = "NVIDIA of tomorrow"
  platform = "gpu"


@pytest.mark.parametrize(
  ("compute_capability", "gpu"),
  [("8.0", Gpu.OTHER), ("8.9", Gpu.ROWS_ONLY), ("9.0", Gpu.ROWS_ONLY), ("10.3", Gpu.ANY_LAYOUT)],
)
def test_knows_an_attached_gpu_by_what_it_can(monkeypatch, compute_capability, gpu):
  device = Device()
  device.compute_capability = compute_capability
  monkeypatch.setattr(choice.jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(choice.jax, "local_devices", lambda backend: [device])
  assert choice._gpu() is gpu
