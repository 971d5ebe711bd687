"""The benchmark of traffic, on a small layer and a small stack."""

import json

import pytest

import traffic

pytestmark = pytest.mark.slow
SMALL = {
  "a layer": traffic.Case(
    lambda cls: traffic.dense(2048, cls), 2048, 1024, traffic.layer_floor(2048, 1024, 2048)
  ),
  "a stack": traffic.Case(lambda cls: traffic.Stack(cls, scan=True), 1024, 2048),
}


@pytest.fixture(scope="module")
def found():
  return {name: traffic.measure(case, "h100") for name, case in SMALL.items()}


def test_every_gemm_is_fp8_and_fewer_bytes_move_than_with_flax(found):
  for name, gemms in (("a layer", 3), ("a stack", 48)):
    bf16, flax, ours = (found[name][variant] for variant in traffic.VARIANTS)
    assert [each["fp8_gemms"] for each in (bf16, flax, ours)] == [0, gemms, gemms]
    assert bf16["operands"] == ["bf16"]
    assert ours["mib_outside_gemms"] < flax["mib_outside_gemms"]
    assert not ours["doubts"]


def test_table(found, monkeypatch):
  monkeypatch.setattr(traffic, "CASES", SMALL)
  assert json.loads(json.dumps(found)) == found
  assert traffic.table(found, "h100").row_count == 6


def test_the_floor_of_a_layer():
  """The design's: 320 MiB for 4096 by 4096 and 8192 tokens."""
  assert traffic.layer_floor(8192, 4096, 4096) == 320
