"""The benchmark of memory, as it is: nothing is computed."""

import json

import pytest
from rich.console import Console

import memory

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found():
  return memory.measure("h100", Console(quiet=True))


def test_no_policy_costs_more_memory_than_bf16_with_the_same(found):
  both = [each for each in found.values() if "BF16" in each]
  assert len(both) == 5
  for variants in both:
    assert variants["flax_fp8"]["temp_mib"] <= variants["BF16"]["temp_mib"]


AGAIN = {
  "unrolled": 0,
  memory.NONE: 0,
  "nothing_saveable": 1,
  "dots_saveable": 0,
  "save_fp8_inputs": 1,
  "everything_saveable": 0,
}


@pytest.mark.parametrize(("policy", "again"), AGAIN.items())
def test_what_is_computed_again(found, policy, again):
  ours = found[policy]["flax_fp8"]
  assert ours["fp8_gemms"] == ours["gemms"] == (memory.GEMMS + again) * memory.LAYERS


def test_table(found):
  assert json.loads(json.dumps(found)) == found
  assert memory.table(found, "h100").row_count == 3 * len(found) - 2
