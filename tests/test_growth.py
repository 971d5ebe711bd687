"""The benchmark of growth, on small sizes."""

import json

import pytest
from rich.console import Console

import growth
from growth import Sizes

pytestmark = pytest.mark.slow
SMALL = {
  "tokens": [Sizes(tokens, 128, 128, history=4) for tokens in (128, 1024)],
  "layers": [Sizes(128, 2048, layers=layers, history=4) for layers in (1, 2)],
}


@pytest.fixture(scope="module")
def found():
  return growth.measure(SMALL, "h100", Console(quiet=True))


def test_time_and_memory_grow(found):
  for points in found.values():
    small, large = points
    for name in growth.NAMES:
      assert large[name]["roofline_ms"] > small[name]["roofline_ms"]
      assert large[name]["temp_mib"] >= small[name]["temp_mib"]


def test_table_and_picture(found, tmp_path):
  assert json.loads(json.dumps(found)) == found
  assert growth.table(found, "h100").row_count == 4
  growth.draw(found).savefig(tmp_path / "growth.png")
  assert (tmp_path / "growth.png").stat().st_size > 10_000
