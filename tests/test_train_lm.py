"""The main job, as a user runs it: results, refusals, and a kill that changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS = 12


def command(out, *options):
  script = [sys.executable, str(ROOT / "benchmarks" / "train_lm.py"), "--out", str(out)]
  return [*script, "--steps", str(STEPS), "--batch-size", "2", "--checkpoint-every", "4", *options]


def environment():
  """One device, as in a shell; the package of this checkout."""
  kept = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
  return kept | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def run(out, *options):
  return subprocess.run(
    command(out, *options), env=environment(), capture_output=True, text=True, check=False
  )


def results(out):
  return json.loads((out / "results.json").read_text())


def curves(out, precision="fp8"):
  of = results(out)["runs"][precision]
  return of["train_curve"], of["validation_curve"]


def kill_after_a_checkpoint(out):
  """Starts a run and kills it outright once its first checkpoint stands."""
  process = subprocess.Popen(
    command(out, "--precision", "fp8"),
    env=environment(),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  first = out / "checkpoints" / "fp8" / "4"
  while not first.exists():
    assert process.poll() is None, "the run ended before its first checkpoint"
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not (out / "results.json").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """An unbroken run of both precisions."""
  out = tmp_path_factory.mktemp("whole")
  return out, run(out)


def test_both_precisions_and_what_they_leave(whole):
  out, finished = whole
  assert finished.returncode == 0, finished.stderr
  assert {"BF16", "FP8"} <= set(finished.stdout.split())
  assert "emulated" in finished.stdout
  assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
  found = results(out)
  assert set(found["runs"]) == {"bf16", "fp8"}
  fp8, bf16 = found["runs"]["fp8"], found["runs"]["bf16"]
  layers = found["config"]["layers"]
  assert fp8["fp8_gemm_sites"] == layers * 7 * 3  # seven projections, three GEMMs each
  assert bf16["fp8_gemm_sites"] == 0
  assert bf16["gemm_sites"] == fp8["gemm_sites"]
  assert fp8["fp8_state_bytes"] > bf16["fp8_state_bytes"] == 0
  assert fp8["train_curve"][-1] < fp8["train_curve"][0]


def test_killed_and_resumed_is_bit_identical(whole, tmp_path):
  kill_after_a_checkpoint(tmp_path)
  resumed = run(tmp_path, "--precision", "fp8", "--resume")
  assert resumed.returncode == 0, resumed.stderr
  assert "goes on after step" in resumed.stdout
  assert curves(tmp_path) == curves(whole[0])


def test_refusals(whole):
  out, _ = whole
  again = run(out, "--precision", "fp8")
  assert again.returncode == 2
  assert "Add --resume" in again.stderr
  other = run(out, "--precision", "fp8", "--resume", "--seed", "7")
  assert other.returncode == 2
  assert "--resume: the configuration must be the checkpoint's; got seed=7" in other.stderr
