"""The benchmark of collectives, on a small decoder of which the layout is as ever."""

import json

import pytest
from rich.console import Console

import collectives
from lm.model import ModelShape

SHAPE = ModelShape(d_model=256, d_ff=512, layers=2, heads=4, kv_heads=4)
LAYOUT = "FSDP and tensor parallel"


@pytest.fixture(scope="module")
def found():
  how = {"layouts": (LAYOUT,), "scans": (False,), "recipes": ("delayed",), "length": 32}
  return collectives.measure(SHAPE, Console(quiet=True), **how)


@pytest.mark.slow
def test_two_small_all_reduces_for_all_amaxes(found):
  """Of 3 tensors of 7 layers of 2 blocks, once merged; the kernels travel in FP8."""
  case = found[f"unrolled, {LAYOUT}"]["delayed"]
  assert 1 <= case["amax"] <= 2
  assert case["amax_bytes"] <= 2 * 7 * 3 * 4
  assert case["fp8_gemms"] == 2 * 7 * 3
  gathered = {name for name in case["counts"] if name.startswith("all-gather")}
  assert "all-gather f8e4m3fn" in gathered
  weights = case["gib"]["all-gather f8e4m3fn"]
  assert sum(case["gib"][name] for name in gathered) <= weights * 1.1
  assert json.loads(json.dumps(found)) == found
  assert collectives.table(found).row_count == 1
