"""Tests every cell of the table that ``python -m tests.transformations`` prints."""

import pytest

from tests import transformations

# At least seven seconds: JAX runs an eager shard_map one operation at a time. Jitted, the same
# programs are in all columns.
SLOW = {"shard_map, check_vma=True, eager", "shard_map, closure, pmean, eager"}
cells = [
  pytest.param(
    case,
    column,
    id=f"{case.name}-{column}",
    marks=(pytest.mark.slow, pytest.mark.exhaustive) if case.name in SLOW else (),
  )
  for case in transformations.CASES
  for column in transformations.COLUMNS
  if case.name not in SLOW or column == "value_and_grad"
]


@pytest.mark.parametrize(("case", "column"), cells)
def test_cell(case, column):
  assert transformations.outcome(case, column) == case.expect.get(column, "right")
