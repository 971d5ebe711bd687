"""The error benchmark on a small layer: what it measures is what is known, and it draws."""

import shutil

import numpy as np
import pytest

import recipe_error
from harness.output import RESULTS
from recipe_error import INPUTS, LINES, ROWS, Shape

SMALL = Shape((2, 40), 64, (3, 16))
CHECKED = ("BF16", "delayed, first step", "delayed", "mxfp8")


def test_errors_are_those_of_the_formats():
  found = {name: recipe_error.errors(ROWS[name], "normal", SMALL) for name in CHECKED}
  assert 0 < found["BF16"]["out"] < 0.004
  assert 0.02 < found["mxfp8"]["out"] < 0.05  # E4M3
  assert 0.02 < found["mxfp8"]["wgrad/channel"] < 0.05
  assert 0.05 < found["delayed"]["dgrad"] < 0.07  # E5M2
  assert found["delayed, first step"]["wgrad"] > 0.3  # scale 1, gradients of 1e-5


@pytest.mark.parametrize("name", ["delayed", *LINES])
def test_a_product_with_the_identity_shows_values(name):
  x = np.random.default_rng(0).choice([2.0, -1.0, 0.5, 0.0], (32, 32))  # exact in each format
  for wgrad in (False, True):
    seen = recipe_error.seen_by_gemm(ROWS[name], [x] * 4, wgrad=wgrad)
    np.testing.assert_allclose(seen, x, rtol=1e-6)


def test_outliers():
  assert recipe_error.outliers("channels x100", 200).nonzero()[0].size == 200
  assert (recipe_error.outliers("channels x100", 200) == 100).sum() == 2
  assert (recipe_error.outliers("normal", 200) == 1).all()


@pytest.mark.slow
def test_an_outlier_spoils_what_shares_its_scale():
  at = lambda name, place: recipe_error.sqnr_beside(ROWS[name], place, 1e6, (64, 256))
  assert at("current", "one value, in fprop") < 1
  assert at("rowwise", "one value, in fprop") > 15
  assert at("rowwise", "one channel, in fprop") < 10
  assert at("rowwise", "one channel, in wgrad") > 30
  assert at("mxfp8", "one channel, in fprop") > at("block", "one channel, in fprop") + 3


@pytest.mark.slow
def test_documents(monkeypatch):
  monkeypatch.setattr(recipe_error, "ROWS", {name: ROWS[name] for name in ("BF16", *LINES)})
  monkeypatch.setattr(recipe_error, "FACTORS", (1.0, 100.0))
  document = recipe_error.measure({"small": Shape((8,), 32, (8,))}, (64, 256))
  assert document["errors"].keys() == {"BF16", *LINES}
  assert len(recipe_error.tables(document)) == len(INPUTS) + 1


def test_the_recorded_result_is_drawn_and_tabulated(tmp_path):
  for suffix in ("json", "md"):
    shutil.copy(RESULTS / f"recipe_error.{suffix}", tmp_path)
  recipe_error.main(["--redraw", "--out", str(tmp_path)])
  want = (RESULTS / "recipe_error.md").read_text()
  assert (tmp_path / "recipe_error.md").read_text() == want
  assert (tmp_path / "recipe_error.png").exists()
