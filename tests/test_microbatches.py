"""The benchmark of microbatches, with large ones: nothing is computed."""

import json

import pytest
from rich.console import Console

import microbatches

pytestmark = pytest.mark.slow


def test_ours_moves_less_than_flax_and_is_ahead_of_bf16():
  found = microbatches.measure("h100", Console(quiet=True), (4096, 16384))
  for variants in found.values():
    ours, flax, bf16 = (variants[name] for name in ("flax_fp8", "flax.linen.fp8_ops", "BF16"))
    assert ours["mib_outside_gemms"] < flax["mib_outside_gemms"]
    assert ours["roofline_ms"] < bf16["roofline_ms"]
    assert ours["fp8_gemms"] == ours["gemms"]
  assert json.loads(json.dumps(found)) == found
  assert microbatches.table(found, "h100").row_count == 6
