"""The benchmark of a train step in small, timed on this CPU and compiled."""

import json
import sys

import jax
import numpy as np
import pytest
from rich.console import Console

import flax_fp8 as fp8
import step
from harness import output
from harness.names import BF16, BLOCK, FLAX
from harness.train import TINY, WIDTHS
from questions import training


def run(name, repeat):
  """The state after some steps of the loop, and the shared first state."""
  arrays = step.arguments(TINY, 16)
  made = step.program(TINY, name, 16, repeat)
  given = arrays.fill(made.shapes)
  return made.fn(*given), given[0]


def test_widths_are_those_of_llama_3_8b():
  assert sum(rows * columns for rows, columns in WIDTHS.projections.values()) == 218_103_808


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_loop_takes_optimizer_steps():
  last, first = run("delayed", 3)
  assert int(last.step) == 3
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), last.params, first.params)
  assert all(jax.tree.leaves(moved))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(last.params))


@pytest.mark.slow
def test_variants_begin_with_the_same_parameters():
  arrays = step.arguments(TINY, 16)
  states = [arrays.fill(step.program(TINY, name, 16, 1).shapes)[0] for name in (BF16, "delayed")]
  first, second = (jax.tree.leaves(state.params["params"]) for state in states)
  assert all(a is b for a, b in zip(first, second, strict=True))
  assert fp8.OVERWRITE_WITH_GRADIENT in states[1].params


@pytest.mark.slow
@pytest.mark.exhaustive
def test_tiny_timed(monkeypatch, capsys, tmp_path):
  names = ("delayed", FLAX)
  command = f"step.py --tiny --rounds 2 --repeat 1 --threads 2 --variants {' '.join(names)} --out"
  monkeypatch.setattr(sys, "argv", [*command.split(), str(tmp_path)])
  step.time_steps()
  found = json.loads((tmp_path / "step.json").read_text())
  assert (found["measurement"], found["failures"]) == (False, [])
  assert list(found["found"]) == ["remat", "all kept"]
  for variants in found["found"].values():
    assert list(variants) == [BF16, *names]
    assert variants["delayed"]["tokens_per_second"] > 0
  assert "remat, delayed: tokens/s" in capsys.readouterr().out
  assert (tmp_path / "step.png").exists()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_tiny_compiled(monkeypatch, tmp_path):
  """21 FP8 GEMMs a layer; remat computes six of seven projections again. Only FSDP sends."""
  script, console = output.ROOT / "benchmarks" / "step.py", Console(width=200)
  words = ("--tiny", "--variants", "delayed", "--out", str(tmp_path))
  monkeypatch.setattr(sys, "argv", [str(script), *words])
  monkeypatch.setattr(output, "make_console", lambda: console)
  with console.capture() as shown:
    step.main()
  text = (tmp_path / "step_compiled.json").read_text()
  content, printed = json.loads(text), shown.get()
  assert content["environment"]["command"] == f"python benchmarks/step.py {' '.join(words[:3])}"
  assert str(output.ROOT) not in text
  rows = {(row["case"], row["variant"]): row for row in content["rows"]}
  cases, names = [*training.STEPS, training.MLPS], (BF16, "delayed")
  assert list(rows) == [(case, name) for case in cases for name in names]
  assert printed.count("│\n") == len(rows)
  assert content["note"] == f"{training.NOTE}; {output.NO_MEASUREMENT}"
  assert content["note"].split("; ")[0] in printed  # the title, which is wrapped
  assert (tmp_path / "step_compiled.png").exists()
  for case, (layers, remat, _, fsdp) in training.STEPS.items():
    wanted = layers * (27 if remat else 21)
    assert [rows[case, name]["fp8_gemms"] for name in names] == [0, wanted]
    assert rows[case, "delayed"]["gemms"] == wanted + 3  # the head's
    assert all((rows[case, name]["mib_sent"] > 0) == fsdp for name in names)
  mlps = [rows[training.MLPS, name] for name in names]
  assert [(row["fp8_gemms"], row["mib_sent"]) for row in mlps] == [(0, 0), (48, 0)]


def test_each_variant_has_a_bar_in_the_cases_that_it_has():
  row = lambda case, name: {"case": case, "variant": name, "estimated_ms": 2.0}
  names = {"nn.scan, remat": (BF16, BLOCK), "FSDP, nn.scan, remat": (BF16,)}
  rows = [row(case, name) for case, own in names.items() for name in own]
  content = {"rows": rows, "environment": {"date": "2026-11-27", "device": "cpu"}, "target": "h100"}
  (axes,) = training.draw(content).axes
  assert [len(bars) for bars in axes.containers if hasattr(bars, "patches")] == [2, 1]


def test_kernels_and_their_moments_are_split_along_features():
  model = training.decoder(TINY, training.VARIANTS["delayed"], "mix", split=True)
  with jax.sharding.use_abstract_mesh(training.MESH):
    state = jax.eval_shape(lambda: training.first_state(model, 16, training.GPUS))
  placed = jax.tree_util.tree_map_with_path(training.place, state)
  found = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(placed)}
  split = {path for path, leaf in found.items() if "data" in leaf.sharding.spec}
  named = {path for path in found if path.endswith(("['kernel']", "['embedding']"))}
  assert split == named
  assert len(split) == 3 * (7 + 2)
  assert {found[path].sharding.spec[-1] for path in split} == {"data"}
