"""The cost benchmark on its smallest case, and what it draws."""

import pytest

from explain_cost import draw, measure, table

pytestmark = [pytest.mark.slow, pytest.mark.child]


@pytest.fixture(scope="module")
def case():
  return measure(1, unrolled=True)


def test_a_case(case):
  assert (case["layers"], case["unrolled"]) == (1, True)
  assert case["gemms"] == 3 * 7 + 6 + 3  # projections, attention's two products, the head
  assert case["kernels"] > case["gemms"]
  assert 0.1 < case["gib"] < 8
  assert case["seconds"] > 0


def test_table_and_picture(case, tmp_path):
  cases = [case, case | {"unrolled": False}]
  assert table(cases).row_count == 2
  figure = draw(cases)
  assert [len(axes.lines) for axes in figure.axes] == [2, 2]
  figure.savefig(tmp_path / "cost.png")
