"""The benchmark of the crossover in small, and its rule on times that are made up."""

import json
import sys

import jax.numpy as jnp
import pytest

import crossover
import flax_fp8 as fp8
from harness import compiling
from harness.models import dense
from harness.names import BF16
from harness.options import Options
from harness.variants import VARIANTS


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
    "smallest side, 16 tokens": 512,
    "smallest side, 64 tokens": 1024,
    "worst speed with it": 1.0,
    "worst speed without": 0.5,
  }


def test_the_rule_is_judged_by_other_rounds_than_it_was_chosen_by():
  found = crossover.rule([size(16, 256, [1.1, 0.9] * 4)], "delayed")
  assert found["min_kernel_size"] == 256**2
  assert found["worst speed with it"] == pytest.approx(0.9)


def test_where_fp8_is_slower_at_every_size_there_is_no_rule():
  found = crossover.rule([size(16, 256, [0.9] * 2), size(16, 512, [0.8] * 2)], "delayed")
  assert found["min_kernel_size"] is None
  assert found["smallest side, 16 tokens"] is None
  assert found["worst speed with it"] == 1.0


@pytest.mark.parametrize(("side", "taken"), [(32, True), (16, False)])
def test_fp8_config_reads_the_rule_as_it_is_meant(side, taken):
  """A layer of the chosen side is FP8, a smaller one is not."""
  config = fp8.Fp8Config(min_kernel_size=32**2)
  (row,) = config.report(dense(side, VARIANTS[BF16]), jnp.ones((16, side))).rows
  assert row.taken == taken


@pytest.mark.slow
def test_programs():
  (programs,) = crossover.cases(256, (256,), Options(out=None, repeat=2, tiny=True)).values()
  for name, program in programs.items():
    report = fp8.explain(program.fn, *program.shapes, target="h100")
    assert compiling.problems(report, program) == []
    assert report.total_gemms == 6
    assert report.fp8_gemms == (0 if name == BF16 else 6)


@pytest.mark.slow
def test_tiny(monkeypatch, capsys, tmp_path):
  command = "crossover.py --tiny --rounds 2 --repeat 1 --threads 2 --out"
  monkeypatch.setattr(sys, "argv", [*command.split(), str(tmp_path)])
  crossover.main()
  found = json.loads((tmp_path / "crossover.json").read_text())
  assert found["measurement"] is False
  assert list(found["found"]) == ["16 tokens, 16", "16 tokens, 32"]
  rules = [name for name in found["summary"] if name.endswith("min_kernel_size")]
  assert [name.split(":")[0] for name in rules] == ["delayed", "current", "rowwise"]
  assert found["left_out"] == []
  assert "worst speed with it" in capsys.readouterr().out
  assert (tmp_path / "crossover.png").exists()
