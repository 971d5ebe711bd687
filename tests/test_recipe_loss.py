"""The sweep over recipes and seeds: trained once, read again, and what it says of numbers."""

import json

import pytest

import lm.train
import recipe_loss
from lm.config import UsageError


@pytest.mark.slow
def test_a_sweep_is_trained_once(tmp_path, monkeypatch, capsys):
  options = ["--preset", "micro", "--steps", "3", "--recipes", "delayed", "--out", str(tmp_path)]
  recipe_loss.main([*options, "--seeds", "0"])
  found = json.loads((tmp_path / "recipe_loss_micro.json").read_text())
  loss = {run: by["0"]["validation_loss"] for run, by in found["runs"].items()}
  gap = 100 * (loss["delayed"] / loss["bf16"] - 1)
  compared = found["compared"]
  assert compared["delayed"] == {"gap_percent": {"0": gap}, "mean_gap_percent": gap}
  assert loss["bf16-again"] != loss["bf16"]
  assert loss["bf16-again"] == pytest.approx(loss["bf16"], rel=1e-2)
  assert (tmp_path / "recipe_loss_micro.png").read_bytes().startswith(b"\x89PNG")
  monkeypatch.setattr(lm.train, "compiled", None)
  recipe_loss.main([*options, "--seeds", "0"])
  assert "FP8 delayed" in capsys.readouterr().out
  with pytest.raises(UsageError, match=r"got steps=4 \(there: 3\)"):
    recipe_loss.main([*options, "--seeds", "0", "--steps", "4"])


def test_gaps_are_taken_seed_by_seed():
  losses = {"bf16": {"0": 1.0, "1": 2.0}, "delayed": {"0": 1.01, "1": 2.06}}
  runs = {
    run: {seed: {"validation_loss": loss} for seed, loss in by.items()}
    for run, by in losses.items()
  }
  (found,) = recipe_loss.compare(runs).values()
  assert found["gap_percent"] == {"0": pytest.approx(1.0), "1": pytest.approx(3.0)}
  assert (found["mean_gap_percent"], found["standard_error"]) == pytest.approx((2.0, 1.0))
