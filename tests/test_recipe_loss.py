"""The sweep over recipes and seeds: trained once, read again, and what it says of numbers."""

import json
import math
import os

import pytest

import recipe_loss
from lm.checkpoints import check_identity
from lm.config import PRESETS
from lm.curve import Curve, Result
from lm.errors import UsageError
from lm.sweep import Sweep, cell, draw, mean_and_error, mean_cell, read_run, write_run
from lm.text import read_corpus

TINY = ["--preset", "tiny", "--steps", "3", "--batch-size", "2", "--recipes", "delayed"]


def main(out, *options):
  return recipe_loss.main([*TINY, "--out", str(out), *options])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """BF16 and delayed scaling, one seed, two processes at a time."""
  out = tmp_path_factory.mktemp("sweep")
  assert main(out, "--seeds", "0", "--jobs", "2") == 0
  return out


@pytest.mark.slow
def test_what_a_sweep_leaves(trained):
  found = json.loads((trained / "recipe_loss.json").read_text())
  assert found["seeds"] == [0]
  assert "seed" not in found["config"]
  bf16, fp8 = (found["runs"][run]["0"] for run in ("bf16", "delayed"))
  assert (bf16["fp8_state_bytes"], fp8["fp8_state_bytes"] > 0) == (0, True)
  gap = 100 * (fp8["validation_loss"] / bf16["validation_loss"] - 1)
  assert found["compared"]["delayed"]["gap_percent"]["0"] == pytest.approx(gap)
  assert found["compared"]["delayed"]["mean_gap_percent"] == pytest.approx(gap)
  again = found["runs"]["bf16-again"]["0"]["validation_loss"]
  assert again != bf16["validation_loss"]
  assert again == pytest.approx(bf16["validation_loss"], rel=1e-2)
  assert "standard_error" not in found["compared"]["delayed"]  # of one seed
  assert found["environment"]["fp8_emulated"]
  assert (trained / "recipe_loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_finished_runs_are_not_trained_again(trained, monkeypatch, capsys):
  before = (trained / "delayed_seed0.json").read_text()
  monkeypatch.setattr(recipe_loss, "train", None)
  for task in recipe_loss.plan(recipe_loss.make_parser().parse_args([*TINY, "--seeds", "0"])):
    recipe_loss.finish(recipe_loss.dataclasses.replace(task, out=trained))
  assert (trained / "delayed_seed0.json").read_text() == before
  # A report takes what is there, of the seeds that it is asked for.
  assert main(trained, "--seeds", "0", "1", "--report") == 0
  assert "FP8 delayed" in capsys.readouterr().out


@pytest.mark.slow
def test_refusals(trained, tmp_path, capsys):
  assert main(tmp_path, "--report") == 2
  assert "--report: needs finished runs; got none in" in capsys.readouterr().err
  assert main(trained, "--seeds", "0", "--report", "--steps", "4") == 2
  assert "got steps=4 (there: 3). Use that one" in capsys.readouterr().err
  with pytest.raises(UsageError, match="x must be of the same configuration; got a=1 "):
    check_identity({"a": 1}, {"a": 2}, what="x")


def saved(loss):
  return {"validation_loss": loss, "validation_curve": [(1, 2.0), (2, loss)]}


def test_gaps_are_taken_seed_by_seed():
  sweep = Sweep()
  for seed, (bf16, fp8) in enumerate([(1.0, 1.01), (2.0, 2.06), (1.0, None)]):
    sweep.add("bf16", seed, saved(bf16))
    if fp8 is not None:
      sweep.add("delayed", seed, saved(fp8))
  assert sweep.seeds == [0, 1, 2]
  assert sweep.gaps("delayed") == {0: pytest.approx(1.0), 1: pytest.approx(3.0)}
  assert mean_and_error(list(sweep.gaps("delayed").values())) == pytest.approx((2.0, 1.0))
  assert [len(axes.lines) > 0 for axes in draw(sweep).axes] == [True, True]
  assert cell(1.0, 0.5) == "1.0000\n+0.50 %"
  assert cell(None, None) == "-"
  assert [mean_cell(gaps) for gaps in ([], [1.0], [1.0, 3.0])] == ["-", "+1.00 %", "+2.00 ± 1.00 %"]
  assert math.isnan(mean_and_error([])[0])


def test_a_run_is_read_as_it_was_written(tmp_path):
  config, corpus = PRESETS["tiny"], read_corpus()
  curve = Curve(train=[2.0, 1.5], validation=[(2, 1.5)], rates=[1.0])
  sizes = {"parameters": 1, "state_bytes": 1, "fp8_state_bytes": 0, "temp_bytes": 0}
  result = Result(run="bf16", curve=curve, **sizes, compile_seconds=1.0)
  assert read_run(tmp_path, "a", config, "bf16", corpus) is None
  write_run(tmp_path, "a", config, result, corpus)
  found = read_run(tmp_path, "a", config, "bf16", corpus)
  assert found is not None
  assert found["train_curve"] == [2.0, 1.5]
  with pytest.raises(UsageError, match=r"got run=delayed \(there: bf16\)"):
    read_run(tmp_path, "a", config, "delayed", corpus)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores are bound on Linux alone")
@pytest.mark.parametrize(
  ("jobs", "cores"),
  [(1, [{0, 1, 2}]), (2, [{0, 2}, {1}]), (4, [{0}, {1}, {2}, {0}])],
  ids=["one", "two", "more-than-cores"],
)
def test_cores_are_shared_out(monkeypatch, jobs, cores):
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
  assert recipe_loss.share_out(jobs) == cores
