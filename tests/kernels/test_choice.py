"""Where kernels run."""

import pytest

import flax_fp8 as fp8
from flax_fp8.explain.target import NAMES, GpuTarget
from flax_fp8.kernels import choice


def test_refuses_another_word():
  with pytest.raises(ValueError, match=r"use_kernels: which must be one of .*got 'on'"):
    fp8.use_kernels("on")


def test_no_kernel_runs_on_a_cpu():
  assert not choice.available()


@pytest.mark.parametrize(
  ("which", "taken"), [("off", []), ("auto", [True]), ("all", [True, False])]
)
def test_what_the_switch_leaves_to_kernels(monkeypatch, which, taken):
  monkeypatch.setattr(choice, "_is_fp8_gpu", lambda: True)
  with fp8.use_kernels(which):
    assert [opaque for opaque in (True, False) if choice.takes(opaque=opaque)] == taken


def test_without_the_triton_backend_it_is_plain_jax(monkeypatch):
  monkeypatch.setattr(choice, "_is_fp8_gpu", lambda: True)
  monkeypatch.setattr(choice._compat, "HAS_TRITON", False)
  assert not choice.available()


@pytest.mark.parametrize("name", NAMES)
def test_knows_the_gpus_with_fp8_by_name(name):
  gpu = GpuTarget.named(name)
  assert bool(choice._FP8_KINDS.search(gpu.device_kind)) == ("fp8" in gpu.peak_flops)


OTHERS = {
  "NVIDIA GH200 480GB": True,
  "NVIDIA GB200": True,
  "NVIDIA L4": True,
  "NVIDIA GeForce RTX 4090": True,
  "NVIDIA RTX 6000 Ada Generation": False,  # not told from an older RTX 6000 by its name alone
  "NVIDIA A10": False,
  "Tesla V100-SXM2-16GB": False,
}


@pytest.mark.parametrize(("kind", "has_fp8"), OTHERS.items())
def test_knows_others(kind, has_fp8):
  assert bool(choice._FP8_KINDS.search(kind)) == has_fp8
