"""Tables for a terminal and for Markdown."""

import pytest

from flax_fp8 import tables
from flax_fp8.tables import Table

PLAIN = Table(("<name", "count"), (("a", "1"), ("long name | bar", "20")))
GROUPED = Table(
  ("<module", "<role", "times"),
  (("net/a", "fprop", "1"), ("net/a", "wgrad", "2"), ("net/b", "fprop", "3")),
  grouped=True,
)


def test_markdown():
  assert tables.markdown(["title", PLAIN]) == (
    "title\n\n| name | count |\n| --- | ---: |\n| a | 1 |\n| long name \\| bar | 20 |\n"
  )


def test_groups_have_a_line_of_their_own():
  lines = [line.split() for line in tables.terminal([GROUPED]).splitlines()]
  assert lines == [
    ["role", "times"],
    ["net/a"],
    ["fprop", "1"],
    ["wgrad", "2"],
    ["net/b"],
    ["fprop", "3"],
  ]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_fits_the_terminal(monkeypatch, columns):
  monkeypatch.setenv("COLUMNS", str(columns))
  wide = Table(("<a", "<b"), (("x" * 70, "y" * 70),))
  lines = tables.terminal(["word " * 40, wide, PLAIN]).splitlines()
  assert max(map(len, lines)) <= columns
  assert sum(line.count("x") for line in lines) == 70
