"""The benchmark of public models on one that needs no other package."""

import json

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

import corpus
from zoo import flax_modules, study
from zoo.model import Case, Model

ROW = {"package": "flax", "version": "1", "name": "Model", "failures": {}}


@pytest.mark.slow
def test_tiny(tmp_path):
  (row,) = corpus.main(["--tiny", "--target", "none", "--out", str(tmp_path)])
  assert row["failures"] == {}
  assert (row["converted"], row["layers"], row["left"]) == (8, 8, {})
  assert row["params_equal"]
  assert row["frozen_difference"] == 0
  for kind in ("fresh", "calibrated"):
    assert 0.01 < row[f"{kind}_forward"] < 0.1
    assert 0.02 < row[f"{kind}_gradient"] < 0.2
  assert row["loss_fp8"] == pytest.approx(row["loss_plain"], rel=0.02)
  document = json.loads((tmp_path / "corpus.json").read_text())
  assert document["found"] == [row]
  assert "jax" in document["environment"]
  text = (tmp_path / "corpus.md").read_text()
  assert text.startswith("1 of 1 models pass every stage.")
  assert "| 8/8 |" in text


def test_a_failing_model_stops_no_other(monkeypatch, tmp_path):
  def fails() -> Model:
    raise RuntimeError("of its own\nand more")

  cases = (Case("flax", "Broken", fails), Case("no-such-package", "Absent", fails))
  monkeypatch.setattr(corpus, "CASES", cases)
  console = Console(record=True, width=200)
  arguments = corpus.parse(["--target", "none", "--out", str(tmp_path)])
  (row,) = corpus.measure(cases, arguments, console)
  assert row["failures"] == {"make": "RuntimeError: of its own"}
  assert "Not installed: no-such-package." in console.export_text()
  assert "0 of 1" in (tmp_path / "corpus.md").read_text()


def test_a_failing_stage_stops_no_other():
  model = Model(flax_modules.AttentionStack(), (jnp.ones((1, 4, 24)),))  # 24 is no multiple of 16
  row = study.study(Case("flax", "Unfit", lambda: model), None, 1.0)
  assert row["converted"] == 0
  assert sum(row["left"].values()) == 8
  assert row["failures"]["init"].startswith("ValueError: fp8_linear_layers: at least one layer")
  assert "loss_fp8" not in row


def test_rows_of_earlier_runs_stay(tmp_path):
  (tmp_path / "corpus.json").write_text(json.dumps({"found": [ROW]}))
  assert corpus.earlier(tmp_path / "corpus.json") == {("flax", "Model"): ROW}
  assert corpus.earlier(tmp_path / "none.json") == {}


def test_models_are_chosen_by_package_or_name():
  names = lambda *only: [f"{case.package}/{case.name}" for case in corpus.chosen(only)]
  assert names("flax") == [f"flax/{case.name}" for case in flax_modules.CASES]
  assert names("brax/MLP") == ["brax/MLP"]
  assert len(names()) == len(set(names())) == len(corpus.CASES) >= 25
  with pytest.raises(SystemExit, match="no package or model is called 'nothing'"):
    corpus.chosen(["nothing"])


def test_relative_error_is_of_the_whole_tree():
  want = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
  got = jax.tree.map(lambda leaf: leaf + 0.5, want)
  assert study.relative(got, want) == pytest.approx(0.5**0.5 / 5)
