"""The benchmark of the crossover in small, and its rule on times that are made up."""

import json
import sys

import jax.numpy as jnp
import pytest

import crossover
import flax_fp8 as fp8
from timed import compiling
from timed.options import Options
from timed.variants import BF16, VARIANTS


def size(tokens, side, speeds):
  """A measured size: BF16 takes 1 ms; FP8's speed differs from round to round."""
  rounds = {BF16: [1.0] * len(speeds), "delayed": [1 / speed for speed in speeds]}
  variants = {name: {"ms_rounds": each} for name, each in rounds.items()}
  return {"tokens": tokens, "side": side, "variants": variants}


def test_the_rule_begins_where_no_larger_kernel_is_slower():
  sizes = [
    size(16, 256, [0.5] * 4),
    size(16, 512, [1.1] * 4),
    size(16, 1024, [1.5] * 4),
    size(64, 256, [1.2] * 4),
    size(64, 512, [0.9] * 4),
    size(64, 1024, [1.6] * 4),
  ]
  assert crossover.rule(sizes, "delayed") == {
    "min_kernel_size": 1024**2,
    "smallest_side": {"16": 512, "64": 1024},
    "worst_with_rule": 1.0,
    "worst_without": 0.5,
    "holds": True,
  }


def test_the_rule_is_judged_by_other_rounds_than_it_was_chosen_by():
  found = crossover.rule([size(16, 256, [1.1, 0.9] * 4)], "delayed")
  assert found["min_kernel_size"] == 256**2
  assert found["worst_with_rule"] == pytest.approx(0.9)
  assert not found["holds"]


def test_where_fp8_is_slower_at_every_size_there_is_no_rule():
  found = crossover.rule([size(16, 256, [0.9] * 2), size(16, 512, [0.8] * 2)], "delayed")
  assert found["min_kernel_size"] is None
  assert found["smallest_side"] == {"16": None}
  assert (found["worst_with_rule"], found["holds"]) == (1.0, True)


@pytest.mark.parametrize(("side", "taken"), [(32, True), (16, False)])
def test_fp8_config_reads_the_rule_as_it_is_meant(side, taken):
  """A layer of the chosen side is FP8, a smaller one is not."""
  config = fp8.Fp8Config(min_kernel_size=32**2)
  (row,) = config.report(VARIANTS[BF16].dense(side), jnp.ones((16, side))).rows
  assert row.taken == taken


@pytest.mark.slow
def test_programs():
  options = Options(out=None, rounds=1, repeat=2, tiny=True, threads=1, seconds=1, replot=False)
  for name, program in crossover.programs(256, 256, options).items():
    report = fp8.explain(program.fn, *program.shapes, target="h100")
    assert compiling.problems(report, program) == []
    assert report.total_gemms == 6
    assert report.fp8_gemms == (0 if name == BF16 else 6)


def test_it_refuses_a_cpu(monkeypatch, capsys, tmp_path):
  monkeypatch.setattr(sys, "argv", ["crossover.py", "--out", str(tmp_path)])
  with pytest.raises(SystemExit):
    crossover.main()
  assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_tiny(monkeypatch, capsys, tmp_path):
  command = "crossover.py --tiny --rounds 2 --repeat 1 --threads 2 --out"
  monkeypatch.setattr(sys, "argv", [*command.split(), str(tmp_path)])
  crossover.main()
  found = json.loads((tmp_path / "crossover.json").read_text())
  assert found["measurement"] is False
  assert [(each["tokens"], each["side"]) for each in found["sizes"]] == [(16, 16), (16, 32)]
  assert list(found["rules"]) == ["delayed", "current", "rowwise"]
  assert found["left_out"] == []
  assert "0.98" in capsys.readouterr().out
  assert (tmp_path / "crossover.png").exists()
