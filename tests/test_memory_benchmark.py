"""The benchmark of memory, as it is: nothing is computed."""

import json

import pytest
from rich.console import Console

import memory

pytestmark = pytest.mark.slow


AGAIN = {
  "unrolled": 0,
  memory.NONE: 0,
  "nothing_saveable": 1,
  "dots_saveable": 0,
  "save_fp8_inputs": 1,
  "everything_saveable": 0,
}


def test_every_policy():
  """In one test, so that each program is compiled once."""
  found = memory.measure("h100", Console(quiet=True))
  both = [each for each in found.values() if "BF16" in each]
  assert len(both) == 5
  for variants in both:
    assert variants["flax_fp8"]["temp_mib"] <= variants["BF16"]["temp_mib"]
  assert found.keys() == AGAIN.keys()
  for policy, again in AGAIN.items():
    ours = found[policy]["flax_fp8"]
    assert ours["fp8_gemms"] == ours["gemms"] == (memory.GEMMS + again) * memory.LAYERS, policy
  assert json.loads(json.dumps(found)) == found
  assert memory.table(found, "h100").row_count == 3 * len(found) - 2
