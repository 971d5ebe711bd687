"""Plots of reports."""

import pkgutil

import pytest

from flax_fp8.explain import plot
from flax_fp8.explain.roofline import ClassTotal
from flax_fp8.explain.traffic import KernelClass

ONE = (ClassTotal(KernelClass.FP8_GEMM, 2, 3 * 2**20, 0.001),)
OTHER = (
  ClassTotal(KernelClass.GEMM, 2, 2**20, 0.002),
  ClassTotal(KernelClass.REDUCE, 1, 2**21, 0.003),
)


def widths(axes):
  return sorted(round(patch.get_width(), 6) for patch in axes.patches if patch.get_width())


def test_bytes_left_time_right(tmp_path):
  figure = plot.draw([("one", ONE), ("other", OTHER)], "H100")
  left, right = figure.axes
  assert widths(left) == [1, 2, 3]
  assert widths(right) == [1, 2, 3]
  assert [label.get_text() for label in left.get_yticklabels()] == ["one", "other"]
  names = [text.get_text() for text in figure.legends[0].get_texts()]
  assert names == ["FP8 GEMM", "other GEMM", "reduce"]
  figure.savefig(tmp_path / "plot.png")


def test_without_rates_there_is_no_time():
  figure = plot.draw([("one", [ClassTotal(KernelClass.GEMM, 1, 5, None)])], "a GPU")
  assert len(figure.axes) == 1


def test_without_matplotlib(monkeypatch):
  def missing(name):
    raise ImportError(name)

  monkeypatch.setattr(pkgutil, "resolve_name", missing)
  with pytest.raises(ImportError, match=r"drawing needs matplotlib; .*pip install matplotlib"):
    plot.draw([("one", ONE)], "H100")
  with pytest.raises(ImportError, match="drawing needs matplotlib"):
    plot.formats()


def test_formats():
  assert {"png", "svg", "pdf"} <= set(plot.formats())
