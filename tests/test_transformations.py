"""Every cell of the table that ``python -m tests.transformations`` prints."""

import pytest

from tests import transformations


@pytest.mark.parametrize("column", transformations.COLUMNS)
@pytest.mark.parametrize("case", transformations.CASES, ids=lambda case: case.name)
def test_cell(case, column):
  assert transformations.outcome(case, column) == case.expect.get(column, "right")
