"""The benchmark of fused projections, on a small block."""

import json

import pytest
from rich.console import Console

import fused_cost

SIZES = fused_cost.Sizes(tokens=256, width=128, heads=4, kv_heads=2, head_dim=32, hidden=256)
NAMES = ("BF16", "current, three layers", "current, fused, separate scales")


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found():
  return fused_cost.measure(SIZES, NAMES, Console(quiet=True))


def test_counts(found):
  """Three GEMMs a layer; BF16's and separate ones may be merged by XLA, fused ones are whole."""
  for projections, gemms in (("query, key, value", 3), ("SwiGLU", 6)):
    bf16, separate, fused = (found[projections][name] for name in NAMES)
    assert bf16["fp8_gemms"] == 0
    assert gemms <= separate["fp8_gemms"] == separate["gemms"] <= 9
    assert fused["fp8_gemms"] == fused["gemms"] == gemms
    assert fused["kernels"] < separate["kernels"]
  assert json.loads(json.dumps(found)) == found
  assert fused_cost.table("SwiGLU", found["SwiGLU"]).row_count == len(NAMES)
