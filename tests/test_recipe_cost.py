"""The cost benchmark on a small layer."""

import json

import pytest
from rich.console import Console

import recipe_cost

SIZES = (256, 128, 128)
NAMES = ("BF16", "delayed", "mxfp8")


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found():
  return recipe_cost.measure(("h100",), NAMES, SIZES, Console(quiet=True))


def test_counts(found):
  variants = found["h100"]
  assert [variants[name]["gemms"] for name in NAMES] == [3, 3, 3]
  assert [variants[name]["fp8_gemms"] for name in NAMES] == [0, 3, 0]
  assert variants["BF16"]["extra_mib"] == 0
  assert variants["delayed"]["extra_mib"] > 0
  assert variants["delayed"]["kernels"] > variants["BF16"]["kernels"] >= 3
  assert json.loads(json.dumps(found)) == found


def test_tables(found):
  assert recipe_cost.table("h100", found["h100"]).row_count == 3
  assert recipe_cost.markdown(found).count("\n") == 5


def test_every_recipe_is_a_variant():
  assert set(recipe_cost.fp8.RECIPES) <= set(recipe_cost.VARIANTS)
