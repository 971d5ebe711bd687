"""The main benchmark: runs, results, refusals, and what it prints."""

import dataclasses
import io
import json
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest
from rich.console import Console

import flax_fp8 as fp8
import lm.explain
import train_lm
from flax_fp8.explain.compile import Memory
from flax_fp8.explain.gemms import Extent, Gemm, GemmRole
from lm.checkpoints import new_curve
from lm.config import PRESETS, ModelShape, UsageError
from lm.model import fuse_params, fused_qkv, fused_swiglu
from lm.recorded import sentences
from lm.report import draw, find_gaps, make_document, show
from lm.runs import label
from lm.step import create_state, mean_loss
from lm.text import Corpus
from lm.train import identify, open_checkpoints

MISSING = lm.explain.missing_compiler()
SMALL = ["--preset", "micro", "--steps", "12", "--checkpoint-every", "4"]
TINY = PRESETS["tiny"]


def train(out, *options):
  """Runs the command on one device; returns its exit status."""
  with pytest.MonkeyPatch.context() as patch:
    first = train_lm.Devices.first()
    patch.setattr(train_lm.Devices, "every", lambda: first)
    return train_lm.main([*SMALL, "--out", str(out), *options])


def results(out):
  return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run in BF16 and in FP8, explained where a compiler is installed; and what it printed."""
  out, printed = tmp_path_factory.mktemp("finished"), io.StringIO()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train_lm.output, "make_console", lambda: Console(file=printed, width=120))
    assert train(out, "--explain", "none" if MISSING else "h200") == 0
  return out, printed.getvalue()


@pytest.mark.slow
def test_what_a_comparison_leaves(finished):
  out, _ = finished
  found = results(out)
  assert set(found["runs"]) == {"bf16", "delayed"}
  fp8, bf16 = found["runs"]["delayed"], found["runs"]["bf16"]
  gap = 100 * (fp8["validation_loss"] / bf16["validation_loss"] - 1)
  assert found["gap_percent"] == {"delayed": pytest.approx(gap)}
  assert fp8["fp8_state_bytes"] > bf16["fp8_state_bytes"] == 0
  assert fp8["train_curve"][-1] < fp8["train_curve"][0]
  assert bf16["parameters"] == PRESETS["micro"].shape.parameters
  assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
  (out / "curves.png").unlink()
  train_lm.main(["--redraw", "--out", str(out)])
  assert (out / "curves.png").exists()


@pytest.mark.slow
def test_it_says_what_it_does_what_came_out_and_what_is_next(finished):
  out, printed = finished
  first, *_ = printed.splitlines()
  assert first.startswith("This trains a decoder with 34,976 parameters")
  assert "12 steps each of BF16, FP8 delayed." in first
  assert "On two CPU cores, this takes about 1 min." in printed
  assert "FP8 delayed: step 12/12: loss" in printed
  table = printed[printed.index("validation loss") :]
  assert "│ BF16 " in table
  assert "│ FP8 delayed " in table
  assert "FP8 is emulated on this CPU" in table
  assert f"Plot: {out / 'curves.png'}" in table
  assert "--recipe all" in table


@pytest.mark.slow
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_the_steps_are_explained(finished):
  out, printed = finished
  runs, reports = results(out)["runs"], results(out)["explain"]
  # Two layers of seven projections, three GEMMs each; in BF16, XLA merges some that share an input.
  counts = {"delayed": (42, 57), "bf16": (0, 45)}
  for name, (fp8_gemms, gemms) in counts.items():
    run, report = runs[name], reports[name]
    assert (run["fp8_gemms"], run["gemms"], run["gemms_target"]) == (fp8_gemms, gemms, "H200")
    assert (report["fp8_gemms"], report["gemms"], report["device"]) == (fp8_gemms, gemms, "H200")
    assert f" {fp8_gemms}/{gemms} " in printed
    title = f"{label(name)} step on H200 (described, not attached; 1 device): "
    assert title in printed
    assert title in (out / f"explain_{name}.md").read_text()
    assert (out / f"explain_{name}.png").read_bytes().startswith(b"\x89PNG")
  assert printed.index("roofline ms") < printed.index("compiled in")


@pytest.mark.slow
def test_refusals(finished, tmp_path, capsys, monkeypatch):
  out, _ = finished
  refused = {
    "Add --resume": (out,),
    "must have the same configuration; got seed=7 (there: 0)": (out, "--resume", "--seed", "7"),
  }
  monkeypatch.setattr(lm.explain, "missing_compiler", lambda: "a compiler is missing")
  refused["--explain: a compiler is missing"] = (tmp_path, "--explain", "h200")
  for message, (folder, *options) in refused.items():
    assert train(folder, *options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_checkpoint_belongs_to_one_run(finished):
  config = dataclasses.replace(PRESETS["micro"], steps=12)
  folder = finished[0] / "checkpoints" / "bf16"
  with open_checkpoints(config, "bf16", Corpus.read(), folder) as checkpoints:
    assert len(checkpoints.find(resume=True)["train_curve"]) == 12
  with (
    open_checkpoints(config, "delayed", Corpus.read(), folder) as checkpoints,
    pytest.raises(UsageError, match=r"got run=delayed \(there: bf16\)"),
  ):
    checkpoints.find(resume=True)


@pytest.mark.slow
def test_float16_beside_bf16(tmp_path):
  """float16 with FP8 and without, both with a loss scale, and near BF16's loss."""
  assert train(tmp_path, "--dtype", "float16", "--explain", "none") == 0
  found = results(tmp_path)
  assert set(found["runs"]) == {"bf16", "float16", "delayed-float16"}
  assert set(found["gap_percent"]) == {"float16", "delayed-float16"}
  assert all(abs(gap) < 0.5 for gap in found["gap_percent"].values())
  for name, of in found["runs"].items():
    assert ("loss_scale" in of) == ("skipped_steps" in of) == (name != "bf16")
    if name != "bf16":
      assert (of["loss_scale"], of["skipped_steps"]) == (65536, 0)


def test_cudnn_attention_is_explained_with_xla_and_refused_for_training(monkeypatch):
  """On a CPU. A preset that fills a GPU is described without making its arrays."""
  asked = {}
  monkeypatch.setattr(fp8, "explain", lambda fn, *args, **named: asked.update(named, args=args))
  config = dataclasses.replace(
    PRESETS["h200"], shape=dataclasses.replace(PRESETS["h200"].shape, layers=1)
  )
  lm.explain.explain_step(config, "current", "h200")
  assert asked["name"] == "FP8 current step (XLA attention)"
  assert asked["target"] == "h200"
  state, windows = asked["args"]
  assert {type(leaf) for leaf in jax.tree.leaves(asked["args"])} == {jax.ShapeDtypeStruct}
  made = sum(leaf.size for leaf in jax.tree.leaves(state.params["params"]))
  assert made == config.shape.parameters > 6e7
  assert PRESETS["h200"].shape.parameters > 9e8
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
  where = {"device_kind": target.upper(), "devices": 1, "target": fp8.GpuTarget.named(target)}
  nothing = {"kernels": (), "collectives": (), "memory": Memory(0, 0, 0, 0), "described": True}
  return fp8.Report(name="step", gemms=gemms, **where, **nothing)


ROLES = (GemmRole.FPROP, GemmRole.DGRAD, GemmRole.WGRAD)
TOKENS, SHAPE = TINY.batch_size * TINY.seq_len, TINY.shape
OTHER = [gemm("head", GemmRole.FPROP, "bf16", times=1), gemm("layers", GemmRole.FPROP, "bf16")]


def three(name, size):
  module = f"layers/{name}/Fp8DotGeneral_0"
  return [gemm(module, role, extent=(TOKENS, *size)) for role in ROLES]


PROJECTED = [each for name, size in SHAPE.projections.items() for each in three(name, size)]
# XLA may merge gate and up, which share an input, and then loses their modules.
OTHERS = [gemm for gemm in PROJECTED if "/gate/" not in gemm.path and "/up/" not in gemm.path]
MERGED = [gemm("layers", role, extent=(TOKENS, SHAPE.d_model, 2 * SHAPE.d_ff)) for role in ROLES]
FUSED = [
  *three("qkv", (SHAPE.d_model, (SHAPE.heads + 2 * SHAPE.kv_heads) * SHAPE.head_dim)),
  *three("out", SHAPE.projections["out"]),
  *three("swiglu/gate_up", (SHAPE.d_model, 2 * SHAPE.d_ff)),
  *three("swiglu/down", SHAPE.projections["down"]),
]
AGAIN = gemm("layers/up/Fp8DotGeneral_0", GemmRole.REMAT)


def as_bf16(gemm):
  return dataclasses.replace(gemm, lhs="bf16", rhs="bf16", reason="the reason")


@pytest.mark.parametrize(
  ("name", "right"),
  [
    ("delayed", report(*PROJECTED, *OTHER)),
    ("rowwise", report(*PROJECTED, AGAIN, *OTHER)),
    ("current", report(*OTHERS, *MERGED, *OTHER)),
    ("delayed-fused", report(*FUSED, *OTHER)),
    ("delayed-converted", report(*PROJECTED, *OTHER)),
    ("delayed", report(*map(as_bf16, PROJECTED), target="a100")),
    ("mxfp8", report(*map(as_bf16, PROJECTED), *OTHER)),
    ("bf16", report(*map(as_bf16, PROJECTED), *OTHER)),
  ],
  ids=["fp8", "remat", "merged", "fused", "converted", "gpu-without-fp8", "no-promise", "bf16"],
)
def test_gemms_as_the_run_promises(name, right):
  lm.explain.require_fp8_gemms(TINY, name, right)


@pytest.mark.parametrize(
  ("name", "wrong", "message"),
  [
    (
      "delayed",
      report(*PROJECTED, gemm("layers/out", GemmRole.DGRAD, "bf16"), *OTHER),
      r"(?s)got 1 that is not.*\n  .*layers/out.*the reason",
    ),
    ("delayed", report(*PROJECTED, as_bf16(AGAIN), *OTHER), "(?s)got 1 that is not.*layers/up"),
    (
      "delayed",
      report(*PROJECTED[1:], dataclasses.replace(as_bf16(PROJECTED[0]), path=""), *OTHER),
      "got 1 that is not",
    ),
    (
      "current",
      report(*OTHERS, as_bf16(MERGED[0]), *MERGED[1:], *OTHER),
      r"the step of FP8 current must have 6\.04e\+08 FLOPs .* got 5\.",
    ),
    ("current-fused", report(as_bf16(FUSED[0]), *FUSED, *OTHER), "(?s)got 1 that.*layers/qkv"),
    ("bf16", report(PROJECTED[0], *OTHER), "the step of BF16 must have 0 FLOPs"),
  ],
  ids=["left-out", "remat", "no-module", "merged", "fused", "bf16"],
)
def test_gemms_that_are_not_stop_the_benchmark(name, wrong, message):
  with pytest.raises(AssertionError, match=message):
    lm.explain.require_fp8_gemms(TINY, name, wrong)


def record(name, loss):
  curve = new_curve() | {"train_curve": [3.0, loss], "validation_curve": [[1, 2.0], [2, loss]]}
  sizes = {"parameters": 1, "state_bytes": 1, "fp8_state_bytes": 0, "steps_per_second": 1.0}
  losses = {"validation_loss": loss, "training_loss": 2 * loss - 1}
  return {"run": name, **losses, **sizes, **curve}


@pytest.mark.parametrize("width", [40, 100])
def test_each_recipe_has_its_gap_to_the_one_bf16(width):
  """On a narrow ASCII terminal too."""
  ran = [record("bf16", 1.0), record("delayed", 1.01), record("mxfp8", 0.98)]
  document = make_document(ran, {}, TINY, Corpus.read(), 1)
  assert document["gap_percent"] == {"delayed": pytest.approx(1.0), "mxfp8": pytest.approx(-2.0)}
  training = document["training_gap_percent"]
  assert training == {"delayed": pytest.approx(2.0), "mxfp8": pytest.approx(-4.0)}
  assert find_gaps({"delayed": ran[1]}) == find_gaps({"bf16": ran[0]}) == {}
  written = io.BytesIO()
  terminal = io.TextIOWrapper(written, encoding="ascii", write_through=True)
  show(document, Console(file=terminal, width=width))
  printed = written.getvalue().decode()
  assert "FP8 GEMMs are not counted: " in printed
  if width == 100:
    assert all(
      text in printed
      for text in ("FP8 delayed", "(+1.00 %)", "FP8 mxfp8", "(-2.00 %)", "(+2.00 %)")
    )
  for some in (ran, ran[1:], ran[:1]):
    draw(make_document(some, {}, TINY, Corpus.read(), 1)).canvas.draw()


@pytest.mark.parametrize(
  ("options", "runs"),
  [
    ([], ("bf16", "delayed")),
    (["--precision", "bf16", "--recipe", "all"], ("bf16",)),
    (["--precision", "fp8", "--recipe", "all"], tuple(fp8.RECIPES)),
    (["--recipe", "delayed", "delayed"], ("bf16", "delayed")),
    (["--fused", "--recipe", "delayed", "current"], ("bf16", "delayed-fused", "current-fused")),
    (["--convert", "--precision", "fp8"], ("delayed-converted",)),
    (["--fused", "--dtype", "float16"], ("bf16", "float16", "delayed-fused-float16")),
    (["--floor"], ("bf16", "bf16-perturbed", "delayed")),
  ],
  ids=["default", "bf16", "all", "twice", "fused", "convert", "float16", "floor"],
)
def test_the_runs_asked_for(options, runs):
  assert train_lm.choose_runs(train_lm.make_options().parse_args(options)) == runs


def test_names_are_parts_joined_by_hyphens():
  assert not any("-" in name for name in fp8.RECIPES)
  names = ("bf16", "bf16-perturbed", "float16", "delayed-fused-float16")
  labels = ["BF16", "BF16 perturbed", "float16", "FP8 delayed fused float16"]
  assert list(map(label, names)) == labels


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
  assert identify(config, "delayed-fused", Corpus.read())["run"] == "delayed-fused"


def test_help_can_be_printed_on_any_terminal():
  text = train_lm.make_options().format_help()
  assert text.isascii()
  assert "--out OUT" in text


def test_pairs_that_were_recorded_are_quoted(tmp_path):
  """Only those of the same model, schedule and text."""
  of = lambda mean: {"pairs": 12, "mean": mean, "interval": [mean - 0.2, mean + 0.2]}
  arms = {
    "bf16": {},
    "delayed": {"compared": {"training": of(0.6), "held_out": of(0.4)}},
    "bf16, fp8-sized": {"compared": {"training": of(0.1), "held_out": of(0.0)}},
  }
  content = {"config": TINY.as_dict() | {"seed": 3}, "text": {"name": "a"}, "arms": arms}
  (tmp_path / "convergence_tiny.json").write_text(json.dumps(content))
  runs = ["bf16", "bf16-perturbed", "delayed"]
  quoted = lambda config, text="a": list(sentences(config, text, runs, tmp_path))
  assert quoted(TINY) == [
    "Recorded over 12 seeds, BF16 perturbed against BF16: training loss +0.10 % [-0.10, +0.30], "
    "validation loss +0.00 % [-0.20, +0.20].",
    "Recorded over 12 seeds, FP8 delayed against BF16: training loss +0.60 % [+0.40, +0.80], "
    "validation loss +0.40 % [+0.20, +0.60].",
  ]
  assert quoted(dataclasses.replace(TINY, steps=100)) == quoted(TINY, "b") == []
