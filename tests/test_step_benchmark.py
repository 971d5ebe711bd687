"""The benchmark of a train step, in small."""

import json
import sys

import jax
import numpy as np
import pytest

import flax_fp8 as fp8
import step
from harness.names import BF16


def run(name, repeat):
  """The state after some steps of the loop, and the shared first state."""
  arrays = step.arguments(step.TINY, 16)
  made = step.program(step.TINY, name, 16, repeat)
  given = arrays.fill(made.shapes)
  return made.fn(*given), given[0]


def test_widths_are_those_of_llama_3_8b():
  assert sum(rows * columns for rows, columns in step.WIDTHS.projections.values()) == 218_103_808


@pytest.mark.slow
def test_the_loop_takes_optimizer_steps():
  last, first = run("delayed", 3)
  assert int(last.step) == 3
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), last.params, first.params)
  assert all(jax.tree.leaves(moved))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(last.params))


@pytest.mark.slow
def test_variants_begin_with_the_same_parameters():
  arrays = step.arguments(step.TINY, 16)
  states = [
    arrays.fill(step.program(step.TINY, name, 16, 1).shapes)[0] for name in (BF16, "delayed")
  ]
  first, second = (jax.tree.leaves(state.params["params"]) for state in states)
  assert all(a is b for a, b in zip(first, second, strict=True))
  assert fp8.OVERWRITE_WITH_GRADIENT in states[1].params


@pytest.mark.slow
def test_tiny(monkeypatch, capsys, tmp_path):
  names = ("delayed", "flax.linen.fp8_ops")
  command = f"step.py --tiny --rounds 2 --repeat 1 --threads 2 --variants {' '.join(names)} --out"
  monkeypatch.setattr(sys, "argv", [*command.split(), str(tmp_path)])
  step.main()
  found = json.loads((tmp_path / "step.json").read_text())
  assert (found["measurement"], found["failures"]) == (False, [])
  assert list(found["found"]) == ["remat", "all kept"]
  for variants in found["found"].values():
    assert list(variants) == [BF16, *names]
    assert variants["delayed"]["tokens_per_second"] > 0
  assert "remat, delayed: tokens/s" in capsys.readouterr().out
  assert (tmp_path / "step.png").exists()
