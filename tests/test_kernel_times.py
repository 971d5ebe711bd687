"""The benchmark of kernels: what it reads of a trace, and what it sets beside the roofline."""

import json
import sys
import types

import pytest
from rich.console import Console

import kernel_times
from flax_fp8.explain import roofline
from flax_fp8.explain.target import GpuTarget
from flax_fp8.explain.traffic import Kernel, KernelClass
from harness import output
from harness.names import BF16, FLAX
from kernel_times import Event

H100 = GpuTarget.named("h100")


def test_an_event_is_named_by_its_instruction():
  given = {"name": "nvjet", "start_ns": 5.0, "duration_ns": 2.0}
  event = types.SimpleNamespace(**given, stats=[("hlo_op", "gemm.1"), (None, 3)])
  assert kernel_times.read_event(event) == Event("gemm.1", "nvjet", 5.0, 2.0)
  bare = types.SimpleNamespace(**given, stats=[])
  assert kernel_times.read_event(bare).op == ""


def test_time_in_which_kernels_overlap_counts_once():
  events = [Event("c", "", 20, 5), Event("a", "", 10, 6), Event("b", "", 12, 2)]
  assert kernel_times.busy(events) == (11, 15)
  assert kernel_times.busy([]) == (0, 0)


def test_each_kernel_stands_beside_its_roofline():
  cast = Kernel("cast", KernelClass.QUANTIZE, 2, 3_352_000, 3_352_000)
  gemm = Kernel("gemm", KernelClass.FP8_GEMM, 2, 1, 1, flops=10**9, operand="f8e4m3fn")
  report = types.SimpleNamespace(kernels=[cast, gemm], target=H100)
  events = [
    Event("gemm", "nvjet", 0, 2e6),
    Event("cast", "fusion", 2e6, 4e6),
    Event("cast", "fusion", 8e6, 4e6),
    Event("memset", "memset", 12e6, 1e6),
  ]
  found = kernel_times.compare(report, events, 2)
  assert found["ms"] == pytest.approx(6.5)
  assert found["idle_ms"] == pytest.approx(1)
  assert found["launches"] == 2
  assert [each["name"] for each in found["kernels"]] == ["cast", "gemm", "memset"]
  quantize = found["classes"]["quantize"]
  assert quantize["ms"] == pytest.approx(4)
  assert quantize["roofline_ms"] == pytest.approx(2e-3)
  assert quantize["times"] == 1
  assert found["classes"][kernel_times.OTHER]["ms"] == pytest.approx(0.5)
  assert found["symbols"][0] == {"op": "cast", "kernel": "fusion", "ms": 4.0}
  console = Console(width=120)
  with console.capture() as shown:
    kernel_times.show({"found": {"FP8": found}}, console)
  assert "6.500 ms a step, 1.000 ms of it idle" in shown.get()


@pytest.mark.slow
def test_tiny(monkeypatch, capsys, tmp_path):
  """On a CPU there is a trace and no kernel in it."""
  command = "kernel_times.py --tiny --variants delayed --threads 2 --out"
  monkeypatch.setenv("XLA_FLAGS", "")
  monkeypatch.setattr(sys, "argv", [*command.split(), str(tmp_path)])
  kernel_times.main()
  found = json.loads((tmp_path / "kernel_times.json").read_text())
  assert found["measurement"] is False
  assert list(found["found"]) == ["BF16", "delayed"]
  assert found["found"]["delayed"]["launches"] == 0
  assert "idle" in capsys.readouterr().out


def test_kernels_that_quantize_and_transpose_sustain_half_of_the_memory_rate():
  """XLA fuses both in Flax's ops and in rowwise scaling. Other recipes keep them apart."""
  found = output.read_json(output.RESULTS, "kernel_times")["found"]
  classes = {name: each["classes"]["quantize"] for name, each in found.items() if name != BF16}
  rates = {name: each["roofline_ms"] / each["ms"] for name, each in classes.items()}
  for name in ("rowwise", FLAX):
    assert rates[name] == pytest.approx(roofline.SUSTAINED_TRANSPOSING, rel=0.1)
  for name in ("delayed", "current"):
    assert rates[name] > roofline.SUSTAINED_MEMORY
