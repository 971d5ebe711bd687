"""Tables rendered for a terminal and for Markdown."""

import contextlib
import io

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import flax_fp8 as fp8
from flax_fp8 import tables
from flax_fp8.explain.compare import Comparison
from flax_fp8.explain.roofline import ClassTotal
from flax_fp8.explain.traffic import KernelClass
from flax_fp8.tables import Table
from flax_fp8.training.check.report import Finding

PLAIN = Table(("<name", "count"), (("a", "1"), ("long name | bar", "20")))
GROUPED = Table(
  ("<module", "<role", "times"),
  (("net/a", "fprop", "1"), ("net/a", "wgrad", "2"), ("net/b", "fprop", "3")),
  grouped=True,
)


def conversion():
  return fp8.Fp8Config().report(nn.Dense(8, name="größe"), jnp.ones((2, 4)))


def statistics():
  layer = nn.Dense(8, dot_general_cls=fp8.Fp8DotGeneral)
  return fp8.stats(layer.init(jax.random.key(0), jnp.ones((2, 4))))


def train_step():
  finding = Finding(kind="summed", paths=("größe/input",), seen="added")
  return fp8.TrainStepReport(findings=(finding,), tensors=("größe/input",), rolls=1, notes=())


def comparison():
  totals = (ClassTotal(KernelClass.GEMM, 1, 5, None),)
  return Comparison(
    names=("größe", "b"), figures=({"GEMMs": 1}, {}), totals=(totals, totals), device_kind="H100"
  )


REPORTS = {
  "conversion": conversion,
  "stats": statistics,
  "train step": train_step,
  "comparison": comparison,
}


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


WIDE = Table(("<a", "<b"), (("x" * 70, "y" * 70),))
MANY = Table(
  ("<layer", "<kind", "K x N", "times", "<FP8", "MiB saved", "<rule"),
  (("attention/query", "Dense", "4096 x 4096", "32", "delayed", "1,024.25", "target '*'"),) * 2,
)
OF_GEMMS = Table(
  ("<module", "<role", "<M x N x K", "<lhs rhs out", "<FP8", "<kernel", "times"),
  (
    ("net/a", "fprop", "8192 x 4096 x 4096", "e4m3 e4m3 bf16", "yes", "cuBLASLt FP8", "32"),
    ("net/b", "fprop", "8 x 8 x 8", "e4m3 e4m3 f32", "no [1]", "cuBLASLt", "1"),
  ),
  grouped=True,
)


@pytest.mark.parametrize("columns", [1, 20, 30, 40, 60, 80, 120])
def test_fits_the_terminal(monkeypatch, columns):
  monkeypatch.setenv("COLUMNS", str(columns))
  parts = ["word " * 40, WIDE, PLAIN, MANY, OF_GEMMS]
  lines = tables.terminal(parts).splitlines()
  assert max(map(len, lines)) <= max(columns, 20)
  assert sum(line.count("x") for line in tables.terminal([WIDE]).splitlines()) == 70


@pytest.mark.parametrize("columns", [20, 30, 40, 60, 80, 120])
@pytest.mark.parametrize("table", [PLAIN, MANY, OF_GEMMS], ids=["plain", "many", "grouped"])
def test_nothing_is_cut_off(monkeypatch, columns, table):
  monkeypatch.setenv("COLUMNS", str(columns))
  shown = tables.terminal([table])
  letters = lambda text: sorted(text.replace(" ", ""))
  for cell in table.rows[0]:
    assert not set(letters(cell)) - set(letters(shown))
  whole = [name for row in table.rows for name in row if name.replace(",", "").isdecimal()]
  assert all(number in shown.split() for number in whole)  # numbers are never folded


def test_narrow_tables_are_lists(monkeypatch):
  monkeypatch.setenv("COLUMNS", "40")
  assert tables.terminal([MANY]).split("\n\n") == 2 * [
    "layer      attention/query\nkind       Dense\nK x N      4096 x 4096\ntimes      32\n"
    "FP8        delayed\nMiB saved  1,024.25\nrule       target '*'"
  ]


def test_a_cell_of_several_lines_is_as_wide_as_the_longest(monkeypatch):
  monkeypatch.setenv("COLUMNS", "100")
  table = Table(("<a", "<b"), (("one\nlonger", "東京"),))
  assert tables.terminal([table]).splitlines() == [
    " a        b",
    " ─────────────",
    " one      東京",
    " longer",
  ]


@pytest.mark.parametrize("columns", ["20", "100"])
def test_brackets_are_no_markup(monkeypatch, columns):
  monkeypatch.setenv("COLUMNS", columns)
  table = Table(("<", "fp8[bold]", "bf16[/x]"), (("a[red]", "123456", "1234567"),))
  shown = tables.terminal([table])
  assert all(name in shown for name in ("fp8[bold]", "bf16[/x]", "a[red]"))


def test_groups_have_the_same_columns(monkeypatch):
  monkeypatch.setenv("COLUMNS", "100")
  heads, _, one, _, other = tables.terminal([OF_GEMMS]).splitlines()
  assert heads.index("lhs") == one.index("e4m3") == other.index("e4m3")
  assert heads.index("kernel") == one.index("cuBLASLt") == other.index("cuBLASLt")


def printed(show):
  """Makes the text inside of an ASCII terminal, and returns what the terminal shows."""
  written = io.BytesIO()
  with contextlib.redirect_stdout(io.TextIOWrapper(written, encoding="ascii", write_through=True)):
    print(show())
    return written.getvalue().decode("ascii")


class TestAscii:
  """Only characters that stdout can't encode are replaced."""

  def test_rules_and_names(self):
    shown = printed(lambda: tables.terminal(["1×128 ± ½", PLAIN]))
    assert shown.splitlines()[:4] == [
      "1x128 +- \\xbd",
      "",
      " name              count",
      " -----------------------",
    ]

  @pytest.mark.parametrize("make", REPORTS.values(), ids=REPORTS)
  def test_every_report_can_be_printed(self, make):
    report = make()
    assert printed(lambda: report)

  def test_utf8_stays(self):
    assert "───" in tables.terminal([PLAIN])
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")):
      assert tables.printable("½ \udcff") == "½ \\udcff"  # a file name that is not UTF-8
