"""The main job, as a user runs it: results, refusals, proof, and a kill that changes nothing."""

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest
from rich.console import Console

import flax_fp8 as fp8
import lm.explain
import lm.runs
import train_lm
from flax_fp8.explain.compile import Memory
from flax_fp8.explain.gemms import Extent, Gemm, GemmRole
from lm.config import PRESETS
from lm.curve import Curve, Result
from lm.errors import UsageError
from lm.model import ModelShape, fuse_params, fused_qkv, fused_swiglu
from lm.plot import write_png
from lm.report import find_gaps, table
from lm.runs import label, named_recipes, require_fp8_hardware
from lm.step import create_state, mean_loss
from lm.text import read_corpus
from lm.train import identify, require_startable

ROOT = Path(__file__).parents[1]
STEPS = 12
MISSING = lm.explain.missing_compiler()
# Runs a script as if the GPU compiler were not installed: no step is explained, which takes time.
WITHOUT_COMPILER = """
import pathlib, runpy, sys
from flax_fp8.explain import plugin

plugin.find_compiler = lambda: None
sys.argv = sys.argv[1:]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(out, *options, compiler=False):
  without = [] if compiler else ["-c", WITHOUT_COMPILER]
  script = [sys.executable, *without, str(ROOT / "benchmarks" / "train_lm.py"), "--out", str(out)]
  return [*script, "--steps", str(STEPS), "--batch-size", "2", "--checkpoint-every", "4", *options]


def environment():
  """One device, as in a shell; the package of this checkout."""
  of_tests = ("XLA_FLAGS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK")
  kept = {key: value for key, value in os.environ.items() if key not in of_tests}
  return kept | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def run(out, *options, compiler=False):
  return subprocess.run(
    command(out, *options, compiler=compiler),
    env=environment(),
    capture_output=True,
    text=True,
    check=False,
  )


def results(out):
  return json.loads((out / "results.json").read_text())


def curves(out, name="delayed"):
  of = results(out)["runs"][name]
  return of["train_curve"], of["validation_curve"]


def kill_after_a_checkpoint(out):
  """Starts a run and kills it outright once its first checkpoint stands."""
  process = subprocess.Popen(
    command(out, "--precision", "fp8"),
    env=environment(),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  first = out / "checkpoints" / "delayed" / "4"
  while not first.exists():
    assert process.poll() is None, "the run ended before its first checkpoint"
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not (out / "results.json").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """An unbroken run in BF16 and in FP8, explained where that can be."""
  out = tmp_path_factory.mktemp("whole")
  return out, run(out, *([] if MISSING else ["--explain", "h200"]), compiler=True)


@pytest.mark.slow
def test_both_precisions_and_what_they_leave(whole):
  out, finished = whole
  assert finished.returncode == 0, finished.stderr
  assert "│ BF16 " in finished.stdout
  assert "│ FP8 delayed " in finished.stdout
  assert "emulated" in finished.stdout
  assert "cuDNN" not in finished.stderr  # JAX complains of what a CPU machine need not have
  assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
  found = results(out)
  assert set(found["runs"]) == {"bf16", "delayed"}
  fp8, bf16 = found["runs"]["delayed"], found["runs"]["bf16"]
  gap = 100 * (fp8["validation_loss"] / bf16["validation_loss"] - 1)
  assert found["gap_percent"] == {"delayed": pytest.approx(gap)}
  assert fp8["fp8_state_bytes"] > bf16["fp8_state_bytes"] == 0
  assert fp8["train_curve"][-1] < fp8["train_curve"][0]


@pytest.mark.slow
def test_float16_beside_bf16(tmp_path):
  """float16 with FP8 and without, both with a loss scale, and near BF16's loss."""
  finished = run(tmp_path, "--dtype", "float16", "--explain", "none")
  assert finished.returncode == 0, finished.stderr
  found = results(tmp_path)
  assert set(found["runs"]) == {"bf16", "float16", "delayed-float16"}
  assert set(found["gap_percent"]) == {"float16", "delayed-float16"}
  assert all(abs(gap) < 0.5 for gap in found["gap_percent"].values())
  for name, of in found["runs"].items():
    assert ("loss_scale" in of) == ("skipped_steps" in of) == (name != "bf16")
    if name != "bf16":
      assert (of["loss_scale"], of["skipped_steps"]) == (65536, 0)


@pytest.mark.slow
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_the_steps_are_explained(whole):
  out, finished = whole
  runs, reports = results(out)["runs"], results(out)["explain"]
  # Two layers of seven projections, three GEMMs each; in BF16, XLA merges some that share an input.
  counts = {"delayed": (42, 57), "bf16": (0, 45)}
  for name, (fp8_gemms, gemms) in counts.items():
    run, report = runs[name], reports[name]
    assert (run["fp8_gemms"], run["gemms"], run["gemms_target"]) == (fp8_gemms, gemms, "H200")
    assert (report["fp8_gemms"], report["gemms"], report["device"]) == (fp8_gemms, gemms, "H200")
    assert f" {fp8_gemms}/{gemms} " in finished.stdout
    title = f"{label(name)} step on H200 (described, not attached; 1 device): "
    assert title in finished.stdout
    assert title in (out / f"explain_{name}.md").read_text()
    assert (out / f"explain_{name}.png").read_bytes().startswith(b"\x89PNG")
  assert finished.stdout.index("roofline ms") < finished.stdout.index("compiled in")
  assert "ratio" in finished.stdout


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(whole, tmp_path):
  kill_after_a_checkpoint(tmp_path)
  resumed = run(tmp_path, "--precision", "fp8", "--resume")
  assert resumed.returncode == 0, resumed.stderr
  assert "goes on after step" in resumed.stdout
  assert curves(tmp_path) == curves(whole[0])
  check_not_counted(tmp_path, resumed.stdout)


def check_not_counted(out, stdout):
  """What a run without the GPU compiler says of its GEMMs."""
  assert re.search(r"│\s+-\s+│", stdout)
  note = next(line for line in stdout.splitlines() if "FP8 GEMMs are not counted" in line)
  assert "pip install 'jax[cuda13-local]==" in note
  assert results(out)["runs"]["delayed"]["fp8_gemms"] is None
  assert "explain" not in results(out)


@pytest.mark.slow
def test_refusals(whole, tmp_path):
  out, _ = whole
  again = run(out, "--precision", "fp8")
  assert again.returncode == 2
  assert "Add --resume" in again.stderr
  other = run(out, "--precision", "fp8", "--resume", "--seed", "7")
  assert other.returncode == 2
  assert "must be of the same configuration; got seed=7 (there: 0)" in other.stderr
  unexplained = run(tmp_path, "--explain", "h200")
  assert unexplained.returncode == 2
  assert "--explain: explain: compiling for a GPU that is not attached" in unexplained.stderr


def test_cudnn_attention_is_explained_with_xla_and_refused_for_training(monkeypatch):
  """On a CPU; and a preset that fills a GPU is described without making its arrays."""
  asked = {}
  monkeypatch.setattr(fp8, "explain", lambda fn, *args, **named: asked.update(named, args=args))
  lm.explain.explain_step(PRESETS["h200"], "delayed", "h200")
  assert asked["name"] == "FP8 delayed step (XLA attention)"
  assert asked["target"] == "h200"
  state, windows = asked["args"]
  assert {type(leaf) for leaf in jax.tree.leaves(asked["args"])} == {jax.ShapeDtypeStruct}
  assert sum(leaf.size for leaf in jax.tree.leaves(state.params["params"])) > 9e8
  assert windows.shape == (8, 2049)
  with pytest.raises(UsageError, match="--attention: cudnn trains on a GPU only; got cpu"):
    train_lm.require_attention(PRESETS["h200"])


@pytest.mark.parametrize(
  ("attached", "asked", "target"),
  [
    ("cpu", None, "h200"),
    ("cpu", "b200", "b200"),
    ("NVIDIA H200", None, None),
    ("NVIDIA H200", "h200", None),
    ("NVIDIA H200", "b200", "b200"),
    ("NVIDIA GeForce RTX 4090", None, None),
  ],
)
def test_the_attached_gpu_is_explained_first(monkeypatch, attached, asked, target):
  platform = "cpu" if attached == "cpu" else "gpu"
  device = SimpleNamespace(platform=platform, device_kind=attached)
  monkeypatch.setattr(jax, "devices", lambda: [device])
  assert lm.explain.choose_target(asked) == target


def gemm(module, role, dtype="f8e4m3fn", times=2, extent=(16, 16, 16)):
  reason = "" if dtype.startswith("f8") else "the reason"
  sizes = {"extent": Extent(1, *extent), "times": times, "bytes": 0}
  types = {"lhs": dtype, "rhs": dtype, "out": "bf16", "kernel": "cuBLASLt", "reason": reason}
  return Gemm(path=f"Transformer/{module}", role=role, **sizes, **types)


def report(*gemms, target="h200"):
  return fp8.Report(
    name="step",
    device_kind=target.upper(),
    devices=1,
    described=True,
    gemms=gemms,
    kernels=(),
    collectives=(),
    memory=Memory(0, 0, 0, 0),
    target=fp8.GpuTarget.named(target),
  )


THREE = (GemmRole.FPROP, GemmRole.DGRAD, GemmRole.WGRAD)
HEAD = gemm("head", GemmRole.FPROP, "bf16", times=1)
TINY = PRESETS["tiny"]
TOKENS = TINY.batch_size * TINY.seq_len
PROJECTED = [
  gemm(f"layers/{name}/Fp8DotGeneral_0", role, extent=(TOKENS, *size))
  for name, size in TINY.shape.projections.items()
  for role in THREE
]
# Of gate and up, which share an input, XLA may make one GEMM; of which module, it then has lost.
OTHERS = [gemm for gemm in PROJECTED if "/gate/" not in gemm.path and "/up/" not in gemm.path]
MERGED = [
  gemm("layers", role, extent=(TOKENS, TINY.shape.d_model, 2 * TINY.shape.d_ff)) for role in THREE
]
FUSED_SIZES = {
  "qkv": (TINY.shape.d_model, (TINY.shape.heads + 2 * TINY.shape.kv_heads) * TINY.shape.head_dim),
  "out": TINY.shape.projections["out"],
  "swiglu/gate_up": (TINY.shape.d_model, 2 * TINY.shape.d_ff),
  "swiglu/down": TINY.shape.projections["down"],
}
FUSED = [
  gemm(f"layers/{name}/Fp8DotGeneral_0", role, extent=(TOKENS, *size))
  for name, size in FUSED_SIZES.items()
  for role in THREE
]
AGAIN = gemm("layers/up/Fp8DotGeneral_0", GemmRole.REMAT)


def as_bf16(gemm):
  return dataclasses.replace(gemm, lhs="bf16", rhs="bf16", reason="the reason")


@pytest.mark.parametrize(
  ("name", "right"),
  [
    ("delayed", report(*PROJECTED, HEAD)),
    ("rowwise", report(*PROJECTED, AGAIN, HEAD)),
    ("current", report(*OTHERS, *MERGED, HEAD)),
    ("delayed-fused", report(*FUSED, HEAD)),
    ("delayed-converted", report(*PROJECTED, HEAD)),
    ("delayed", report(*map(as_bf16, PROJECTED), target="a100")),
    ("mxfp8", report(*map(as_bf16, PROJECTED), HEAD)),
    ("bf16", report(*map(as_bf16, PROJECTED), HEAD)),
  ],
  ids=["fp8", "remat", "merged", "fused", "converted", "gpu-without-fp8", "no-promise", "bf16"],
)
def test_gemms_as_the_run_promises(name, right):
  lm.explain.require_fp8_gemms(PRESETS["tiny"], name, right)


@pytest.mark.parametrize(
  ("name", "wrong", "rows"),
  [
    (
      "delayed",
      report(*PROJECTED, gemm("layers/out", GemmRole.DGRAD, "bf16"), HEAD),
      ["Transformer/layers/out dgrad (2 a step), bf16 x bf16 by cuBLASLt: the reason"],
    ),
    (
      "delayed",
      report(*PROJECTED, as_bf16(AGAIN)),
      ["Transformer/layers/up/Fp8DotGeneral_0 fprop again (2 a step), bf16 x bf16 by cuBLASLt: "],
    ),
    (
      "delayed",
      report(*PROJECTED[1:], dataclasses.replace(as_bf16(PROJECTED[0]), path=""), HEAD),
      ["(no module) fprop (2 a step)", "Transformer/head fprop (1 a step)"],
    ),
    (
      "current",
      report(*OTHERS, as_bf16(MERGED[0]), *MERGED[1:]),
      ["Transformer/layers fprop (2 a step)"],
    ),
    (
      "current-fused",
      report(as_bf16(FUSED[0]), *FUSED, HEAD),
      ["Transformer/layers/qkv/Fp8DotGeneral_0 fprop (2 a step)"],
    ),
    ("bf16", report(PROJECTED[0], HEAD), ["f8e4m3fn x f8e4m3fn by cuBLASLt: is FP8"]),
  ],
  ids=["left-out", "remat", "no-module", "merged", "fused", "bf16"],
)
def test_gemms_that_are_not_name_their_rows(name, wrong, rows):
  with pytest.raises(RuntimeError, match=f"train_step: {label(name)} must have") as error:
    lm.explain.require_fp8_gemms(PRESETS["tiny"], name, wrong)
  _, *found = str(error.value).splitlines()
  assert len(found) == len(rows)
  for row, expected in zip(found, rows, strict=True):
    assert expected in row


def result(name, loss):
  losses = Curve(train=[3.0, loss], validation=[(1, 2.0), (2, loss)], rates=[1.0])
  sizes = {"parameters": 1, "state_bytes": 1, "fp8_state_bytes": 0, "temp_bytes": 0}
  return Result(run=name, curve=losses, **sizes, compile_seconds=1.0)


@pytest.fixture
def recipes(monkeypatch):
  """Two recipes, of which the second asks for the units of Blackwell."""
  monkeypatch.setattr(lm.runs.fp8, "RECIPES", {"delayed": None, "mxfp8": None})
  blocks = SimpleNamespace(needs=fp8.recipes.Needs(fp8.Format.E4M3, "float8_e8m0fnu"))
  known = {"delayed": fp8.DelayedScaling(), "mxfp8": blocks}
  monkeypatch.setattr(lm.runs.fp8, "get_recipe", known.__getitem__)


def test_each_recipe_has_its_gap_to_the_one_bf16(recipes, tmp_path):
  ran = [result("bf16", 1.0), result("delayed", 1.01), result("mxfp8", 0.98)]
  gaps = {"delayed": pytest.approx(1.0), "mxfp8": pytest.approx(-2.0)}
  assert find_gaps(ran) == gaps
  assert find_gaps(ran[1:]) == find_gaps(ran[:1]) == {}
  columns = table(ran, {}, PRESETS["tiny"]).columns
  assert list(columns[0].cells) == ["BF16", "FP8 delayed", "FP8 mxfp8"]
  assert list(columns[2].cells) == ["", "+1.00 %", "-2.00 %"]
  for some in (ran, ran[1:], ran[:1]):
    write_png(some, tmp_path / "curves.png")


@pytest.mark.parametrize("width", [40, 100])
def test_the_table_can_be_printed_on_an_ascii_terminal(width):
  written = io.BytesIO()
  terminal = io.TextIOWrapper(written, encoding="ascii", write_through=True)
  grid = table([result("bf16", 1.0), result("delayed", 1.01)], {}, PRESETS["tiny"])
  Console(file=terminal, width=width).print(grid)
  assert b"parameters" in written.getvalue()


@pytest.mark.parametrize(
  ("options", "runs"),
  [
    ([], ("bf16", "delayed")),
    (["--precision", "bf16", "--recipe", "all"], ("bf16",)),
    (["--precision", "fp8", "--recipe", "all"], tuple(fp8.RECIPES)),
    (["--recipe", "delayed", "delayed"], ("bf16", "delayed")),
    (["--fused", "--recipe", "delayed", "current"], ("bf16", "delayed-fused", "current-fused")),
    (["--convert", "--precision", "fp8"], ("delayed-converted",)),
  ],
  ids=["default", "bf16", "all", "twice", "fused", "convert"],
)
def test_the_runs_asked_for(options, runs):
  assert train_lm.choose_runs(train_lm.make_parser().parse_args(options)) == runs


def test_every_recipe_asks_the_hardware(recipes, monkeypatch):
  require_fp8_hardware(("bf16", "delayed", "mxfp8"))
  hopper = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")
  monkeypatch.setattr(jax, "local_devices", lambda **_: [hopper])
  require_fp8_hardware(("bf16", "delayed"))
  with pytest.raises(UsageError, match=r"the device must .* got FP8 mxfp8 on NVIDIA H200"):
    require_fp8_hardware(named_recipes(["all"]))


@pytest.mark.slow
def test_fused_runs_begin_with_the_parameters_of_bf16():
  """And at the same loss; two layers, stacked by ``nn.scan``."""
  shape = ModelShape(d_model=16, d_ff=32, layers=2, heads=4, kv_heads=2)
  config = dataclasses.replace(TINY, shape=shape, seq_len=16)
  bf16, fused = (create_state(config, run) for run in ("bf16", "current-fused"))
  recipe = fp8.Float8CurrentScaling()
  params = fuse_params(bf16.params["params"], shape, recipe)
  jax.tree.map(np.testing.assert_array_equal, fused.params["params"], params)
  layers = fused.params["params"]["layers"]
  back = fused_qkv(shape, recipe).to_separate(layers["qkv"], nn.Dense)
  back |= fused_swiglu(shape, recipe).to_separate(layers["swiglu"])
  whole = bf16.params["params"]["layers"]
  jax.tree.map(np.testing.assert_array_equal, back, {name: whole[name] for name in back})
  windows = np.arange(2 * 17, dtype=np.uint8).reshape(2, 17)
  losses = [float(mean_loss(jax.jit(s.apply_fn), s.params, windows)) for s in (bf16, fused)]
  assert losses[1] == pytest.approx(losses[0], rel=5e-3)
  assert label("delayed-fused") == "FP8 delayed fused"
  assert identify(config, "delayed-fused", read_corpus())["run"] == "delayed-fused"


@pytest.mark.slow
def test_a_checkpoint_is_of_one_recipe(whole):
  folder = whole[0] / "checkpoints" / "bf16"
  config = dataclasses.replace(PRESETS["tiny"], steps=STEPS, batch_size=2)
  of = {"folder": folder, "resume": True}
  require_startable(config, "bf16", read_corpus(), **of)
  with pytest.raises(UsageError, match=r"got run=delayed \(there: bf16\)"):
    require_startable(config, "delayed", read_corpus(), **of)
