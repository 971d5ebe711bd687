"""The benchmark of public models on one that needs no other package."""

import json

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

import corpus
from harness.output import RESULTS
from zoo import models, study
from zoo.models import Case, Model

ROW = {"package": "flax", "version": "1", "name": "Model", "failures": {}}


@pytest.mark.slow
def test_tiny(tmp_path):
  (row,) = corpus.main(["--tiny", "--out", str(tmp_path)])
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


@pytest.mark.slow
def test_a_failing_model_stops_no_other(tmp_path):
  def fails() -> Model:
    raise RuntimeError("of its own\nand more")

  cases = (Case("flax", "Broken", fails), Case("no-such-package", "Absent", fails))
  console = Console(record=True, width=200)
  (tmp_path / "corpus.json").write_text(json.dumps({"found": [ROW]}))
  earlier, row = corpus.measure(cases, tmp_path, None, console)
  assert earlier == ROW
  assert row["failures"] == {"make": "RuntimeError: of its own"}
  assert "no-such-package is not installed" in console.export_text()
  assert "| RuntimeError" not in (tmp_path / "corpus.md").read_text()


@pytest.mark.slow
def test_a_failing_stage_stops_no_other():
  model = Model(models.AttentionStack(), (jnp.ones((1, 4, 24)),), {})  # 16 does not divide 24
  row = study.study(Case("flax", "Unfit", lambda: model), None)
  assert row["converted"] == 0
  assert sum(row["left"].values()) == 8
  assert row["failures"]["init"].startswith("ValueError: fp8_linear_layers: at least one layer")
  assert "loss_fp8" not in row


def test_the_recorded_table_is_that_of_the_recorded_numbers():
  found = json.loads((RESULTS / "corpus.json").read_text())["found"]
  assert corpus.table(found) == (RESULTS / "corpus.md").read_text()
  assert {(row["package"], row["name"]) for row in found} <= {
    (case.package, case.name) for case in corpus.CASES
  }


@pytest.mark.parametrize(
  "case", [case for case in corpus.CASES if case.package == "flax"], ids=lambda case: case.name
)
def test_models_of_flax_are_made(case):
  model = case.make()
  out = jax.eval_shape(model.module.init_with_output, jax.random.key(0), *model.args)[0]
  assert out.ndim == 3


def test_models_are_chosen_by_package_or_name():
  names = lambda *only: [f"{case.package}/{case.name}" for case in corpus.chosen(only)]
  assert len(names("flax")) == 4
  assert names("brax/MLP") == ["brax/MLP"]
  assert len(names()) == len(set(names())) == len(corpus.CASES) >= 25
  with pytest.raises(SystemExit, match="no package or model is called 'nothing'"):
    corpus.chosen(["nothing"])


def test_relative_error_is_of_the_whole_tree():
  want = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
  got = jax.tree.map(lambda leaf: leaf + 0.5, want)
  assert study.relative(got, want) == pytest.approx(0.5**0.5 / 5)
