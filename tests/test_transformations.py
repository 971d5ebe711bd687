"""Tests every cell of the table that ``python -m tests.transformations`` prints."""

import pytest

from tests import transformations

# At least seven seconds each: JAX runs an eager shard_map one operation at a time.
SLOW = {"shard_map, check_vma=True, eager", "shard_map, closure, pmean, eager"}
cases = [
  pytest.param(case, id=case.name, marks=pytest.mark.slow if case.name in SLOW else ())
  for case in transformations.CASES
]


@pytest.mark.parametrize("column", transformations.COLUMNS)
@pytest.mark.parametrize("case", cases)
def test_cell(case, column):
  assert transformations.outcome(case, column) == case.expect.get(column, "right")
