"""The converted model of ``train_lm.py``, its calibration, and what it exports."""

import dataclasses
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest

import flax_fp8 as fp8
import lm.export
import lm.train
import train_lm
from lm.config import PRESETS, ModelShape, UsageError
from lm.export import PROGRAM, VARIABLES, export_forward, export_run, freeze, window
from lm.report import describe_export
from lm.runs import label
from lm.step import initializer, jitted_step, make_model, step_shapes
from lm.text import Corpus
from lm.train import calibrated, identify, train

CONVERTED = "delayed-converted"
CONFIG = dataclasses.replace(
  PRESETS["tiny"],
  shape=ModelShape(d_model=32, d_ff=32, layers=2, heads=2, kv_heads=1),
  steps=2,
  seq_len=16,
  batch_size=2,
  validate_every=2,
  validation_batches=2,
  calibrate=3,
)
# Runs where neither Flax nor this package can be imported.
LOADER = """
import sys

sys.modules |= dict.fromkeys(("flax", "flax_fp8", "optax", "orbax"))
import jax, jax.export, numpy as np

program, arrays, out = sys.argv[1:]
exported = jax.export.deserialize(bytearray(open(program, "rb").read()))
leaves = [x.view(a.dtype) for x, a in zip(np.load(arrays).values(), exported.in_avals)]
args, kwargs = jax.tree.unflatten(exported.in_tree, leaves)
np.save(out, exported.call(*args, **kwargs))
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
  """A converted model: calibrated, trained and exported; with what training said.

  Compiled without most optimizations, which nearly halves the time, alike for all it compares.
  """
  out, notes = tmp_path_factory.mktemp("served"), []
  jax.config.update("jax_disable_most_optimizations", True)
  try:
    corpus, of = Corpus.read(), {"folder": out / "checkpoints", "checkpoint_every": 2}
    record, trained = train(CONFIG, CONVERTED, corpus, note=notes.append, **of)
    export = export_run(CONFIG, CONVERTED, corpus, trained, out / "export")
  finally:
    jax.config.update("jax_disable_most_optimizations", False)
  return record | {"export": export}, trained, out, notes


@pytest.mark.slow
def test_a_converted_model_is_the_edited_one():
  """Parameters, state, and the programs that make them and take a step: text for text."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  texts = [
    (
      initializer(CONFIG, run).lower(key).as_text(),
      jitted_step.lower(*step_shapes(CONFIG, run)).as_text(),
    )
    for run in ("current", "current-converted")
  ]
  assert texts[0] == texts[1]
  trees = [step_shapes(CONFIG, run)[0] for run in ("delayed", CONVERTED)]
  leaves = [dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in trees]
  assert leaves[0] == leaves[1]


def test_a_model_is_fused_or_converted(capsys):
  with pytest.raises(SystemExit):
    train_lm.main(["--fused", "--convert"])
  assert "argument --convert: not allowed with argument --fused" in capsys.readouterr().err


@pytest.mark.slow
def test_calibration_fills_the_state_before_the_first_step(served):
  """Three batches and two steps: five entries of every history."""
  record, trained, _, notes = served
  assert "calibrated on the batches of the first 3 steps" in notes
  assert record["fp8_state_bytes"] > 0
  leaves = jax.tree_util.tree_leaves_with_path(trained[fp8.OVERWRITE_WITH_GRADIENT])
  histories = [leaf for path, leaf in leaves if path[-1].key.endswith("_amax_history")]
  assert len(histories) == 3 * len(CONFIG.shape.projections)
  for history in histories:
    np.testing.assert_array_equal(np.count_nonzero(history, axis=-1), [5, 5])


def test_calibration_without_state_says_so():
  notes, off = [], dataclasses.replace(CONFIG, calibrate=0)
  for config, run in ((CONFIG, "current"), (CONFIG, "bf16"), (off, "delayed")):
    assert calibrated(config, run, "state", None, notes.append) == "state"
  assert notes == ["nothing to calibrate, because its recipe has no state"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_calibration_is_part_of_what_is_resumed(served, monkeypatch):
  """Of runs that have state. A resumed run is not calibrated again."""
  record, _, out, _ = served
  corpus, off = Corpus.read(), dataclasses.replace(CONFIG, calibrate=0)
  assert identify(CONFIG, CONVERTED, corpus)["calibrate"] == 3
  for run in ("bf16", "current"):
    assert identify(CONFIG, run, corpus) == identify(off, run, corpus)
  of = {"folder": out / "checkpoints", "resume": True}
  with pytest.raises(UsageError, match=r"got calibrate=None \(there: 3\)"):
    train(off, CONVERTED, corpus, **of)
  monkeypatch.setattr(lm.train, "calibrated", None)
  monkeypatch.setattr(lm.train, "compiled", None)
  again = train(CONFIG, CONVERTED, corpus, **of)[0]
  assert all(again[key] == record[key] for key in ("train_curve", "validation_curve"))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_what_is_exported_is_the_trained_model(served):
  """The same loss; and the sizes."""
  record, _, out, _ = served
  export = record["export"]
  assert export["validation_loss"] == record["validation_loss"]
  assert export["bytes_bf16"] == 2 * record["parameters"]
  assert export["bytes"] < export["bytes_bf16"]
  assert export["program_bytes"] == len((out / "export" / PROGRAM).read_bytes())
  assert export["platforms"] == ["cpu", "cuda"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_program_runs_where_there_is_nothing_but_jax(served, tmp_path):
  _, trained, out, _ = served
  folder = out / "export"
  module, frozen = freeze(CONFIG, CONVERTED, trained)
  saved = fp8.restore_checkpoint(folder / VARIABLES, frozen).tree
  tokens = np.arange(CONFIG.seq_len, dtype=np.int32)[None]
  raw = [np.asarray(leaf).view(np.uint8) for leaf in jax.tree.leaves((saved, tokens))]
  arrays, logits = tmp_path / "arrays.npz", tmp_path / "logits.npy"
  np.savez(arrays, *raw)
  files = [str(path) for path in (folder / PROGRAM, arrays, logits)]
  subprocess.run([sys.executable, "-c", LOADER, *files], check=True, capture_output=True)
  np.testing.assert_array_equal(np.load(logits), jax.jit(module.apply)(frozen, tokens))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_mxfp8_is_exported_for_cpus_and_for_gpus(monkeypatch):
  """In one program where this JAX can, else in the one of this machine."""
  run = "mxfp8-converted"
  trained = step_shapes(CONFIG, run)[0].params
  _, frozen = fp8.freeze_for_inference(make_model(CONFIG, run), trained, window(CONFIG))
  assert export_forward(CONFIG, run, trained, frozen).platforms in (("cpu",), ("cpu", "cuda"))
  monkeypatch.setattr(lm.export, "PLATFORMS", ("cuda",))
  assert export_forward(CONFIG, run, trained, frozen).platforms == ("cuda",)


def test_the_line_of_an_export():
  export = {"bytes": 3 * 2**20, "bytes_bf16": 4 * 2**20, "program_bytes": 2048}
  export |= {"platforms": ["cpu", "cuda"], "validation_loss": 2.25}
  assert describe_export({"run": CONVERTED, "validation_loss": 2.0}, export) == (
    f"{label(CONVERTED)}, exported: variables 3.00 MiB (BF16 4.00 MiB); validation loss off by "
    "+0.25; program of 2 KiB for cpu and cuda"
  )


def test_presets_for_a_gpu_learn_the_larger_text(tmp_path):
  read = lambda *given: Corpus.of_preset(*given).name
  assert read("tiny") == "pydoc_data.topics"
  assert read("h200") == read("gpu") == "Python's standard library"
  (tmp_path / "own.txt").write_text("a text")
  assert read("h200", tmp_path / "own.txt") == "own.txt"
