"""The benchmark of layers in small, and what it shares with the others that time a GPU."""

import dataclasses
import importlib
import json
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import block
import card
import crossover
import flax_fp8 as fp8
import gemm
import kernel_times
from flax_fp8.explain import roofline
from flax_fp8.explain.target import GpuTarget
from flax_fp8.explain.traffic import KernelClass
from harness import clock, compiling, output, programs, timed
from harness.models import dense
from harness.names import BF16, BLOCK
from harness.options import Options
from harness.sizes import PUBLISHED, TINY_GROUPS, Shape
from harness.variants import VARIANTS

REPEAT = 3
HAS_KERNELS = jax.__version_info__ >= (0, 10, 2)  # of block scaling
COMPILED = [name for name in VARIANTS if name != BLOCK or HAS_KERNELS]
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="block's kernels need JAX 0.10.2")
SHAPE = Shape(512, 256, 768)
X = jax.ShapeDtypeStruct((SHAPE.tokens, SHAPE.width), jnp.bfloat16)


def layer(name, repeat=REPEAT, shape=SHAPE):
  return programs.layer_programs(shape, [name], repeat)[name]


class Ticks:
  """A clock that moves only as programs run, and a GPU that slows down."""

  def __init__(self):
    self.time, self.order, self.slow = 0.0, [], 1.0

  def program(self, name, seconds):
    def run():
      self.order.append(name)
      self.time += seconds * self.slow
      self.slow *= 1.1

    return run


def test_every_round_runs_each_program_once_beginning_with_another():
  ticks = Ticks()
  runs = {name: ticks.program(name, 1.0) for name in "abc"}
  clock.interleave(runs, 4, warm_up=1, now=lambda: ticks.time)
  assert "".join(ticks.order) == "abc" + "abc" + "bca" + "cab" + "abc"


def test_what_is_timed_is_the_programs_own_time():
  ticks = Ticks()
  ticks.slow, runs = 1.0, {name: ticks.program(name, 2.0) for name in ("BF16", "FP8")}
  times = clock.interleave(runs, 6, warm_up=0, now=lambda: ticks.time)
  first = [2 * 1.1**index for index in (0, 3, 4, 7, 8, 11)]
  assert times["BF16"] == pytest.approx(first)


def test_a_gpu_that_slows_down_spoils_no_ratio():
  """Each ratio is one of neighbours."""
  ticks = Ticks()
  runs = {"BF16": ticks.program("BF16", 2.0), "FP8": ticks.program("FP8", 1.0)}
  times = clock.interleave(runs, 8, now=lambda: ticks.time)
  ratios = clock.speedups(times["BF16"], times["FP8"])
  assert min(ratios) == pytest.approx(2 / 1.1)
  assert max(ratios) == pytest.approx(2 * 1.1)
  assert clock.spread(ratios)["median"] == pytest.approx(2, rel=0.01)


def test_spread():
  assert clock.spread([4, 1, 2, 3, 5]) == {"median": 3, "low": 2, "high": 4}
  assert clock.spread([7.0]) == {"median": 7, "low": 7, "high": 7}


def options(**others):
  return Options(out=None, rounds=3, threads=2, **others)


def test_loops_are_long_beside_their_dispatch():
  assert timed.steps(10**13, options()) == 10
  assert timed.steps(10**11, options()) == 160
  assert timed.steps(10, options()) == clock.MOST_STEPS
  assert timed.steps(10, options(tiny=True, repeat=2)) == 2


def broken(*, is_fp8):
  """A program that does not compile."""

  def fn(state, x):
    raise RuntimeError("no such kernel")

  shapes = ({}, jax.ShapeDtypeStruct((2,), jnp.float32))
  return programs.Program(jax.jit(fn), shapes, 1, 1, is_fp8)


def test_what_does_not_compile_is_noted_and_the_others_go_on():
  tiny = Shape(16, 16, 32)
  asked, made = options(), {BF16: layer(BF16, shape=tiny), "delayed": broken(is_fp8=True)}
  ready = compiling.prepare_all(made, asked)
  assert list(ready) == [BF16]
  assert asked.failures == ["delayed: RuntimeError: no such kernel"]
  assert list(timed.measure(ready, asked, programs.Arrays())) == [BF16]
  with pytest.raises(RuntimeError, match="no such kernel"):
    compiling.prepare_all({BF16: broken(is_fp8=False)}, asked)


def test_what_does_not_run_is_noted_and_the_others_go_on():
  def fails(*args):
    raise ValueError("out of memory")

  program = layer(BF16, shape=Shape(16, 16, 32))
  ready = compiling.prepare(BF16, program)
  bad = dataclasses.replace(ready, run=fails, program=dataclasses.replace(program, is_fp8=True))
  asked = options()
  found = timed.measure({BF16: ready, "delayed": bad}, asked, programs.Arrays())
  assert list(found) == [BF16]
  assert asked.failures == ["delayed: ValueError: out of memory"]
  assert len(found[BF16]["ms_rounds"]) == 3


def test_variants_that_are_chosen_come_with_bf16():
  assert options(variants=["rowwise"]).choose(VARIANTS) == [BF16, "rowwise"]
  assert options().choose(VARIANTS) == list(VARIANTS)


def test_no_case_begins_when_the_time_is_up(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(sys, "argv", f"a.py --tiny --seconds -1 --out {tmp_path}".split())
  timed.run(None, "a", lambda options: {"first": dict}, timed.models_summary)
  assert output.read_json(tmp_path, "a")["left_out"] == ["first"]
  assert "left out, the time was up: first" in capsys.readouterr().out


def test_shapes_are_those_that_transformer_engine_publishes():
  """Hidden 4096, four times that inside, 15872 tokens: twelve GEMMs."""
  published = gemm.GROUPS[PUBLISHED].values()
  assert {shape.tokens for shape in published} == {15872}
  assert sorted((shape.width, shape.features) for shape in published) == [
    (4096, 4096),
    (4096, 12288),
    (4096, 16384),
    (16384, 4096),
  ]
  assert sum(len(shape.gemms) for shape in published) == 12
  assert Shape(2, 3, 5).gemms == {"fprop": (2, 5, 3), "dgrad": (2, 3, 5), "wgrad": (3, 5, 2)}


# FLOPs of causal attention in one forward pass of block.py's block. A backward pass has 2.5 times
# as many, and remat in the model of twelve blocks repeats the forward pass.
ATTENTION = 2 * 2 * 32 * 8192 * 8192 * 128 // 2
ATTENTION_PASSES = {"block": 3.5, "model": 12 * 4.5}


def estimated_ms(case, name, each, target):
  """What ``Report.estimated_seconds`` adds up, from what the JSON says of a program.

  The JSON does not say which kernels both quantize and transpose, so their rate is that of others.
  """
  rates = roofline.sustained(target)
  attention = roofline.SUSTAINED_ATTENTION["bf16"] * target.peak_flops["bf16"]
  moved = each["mib_outside_gemms"] * compiling.MIB / rates.memory_bandwidth
  launches = each["kernels"] * roofline.LAUNCH_SECONDS
  gemms = each["flops"] / rates.peak_flops["bf16" if name == BF16 else "fp8"]
  attended = ATTENTION_PASSES.get(case, 0) * ATTENTION / attention
  return 1e3 * (gemms + attended + moved + launches)


@pytest.mark.parametrize("script", ["gemm", "block"])
@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_estimates_are_within_15_percent_of_what_was_measured(gpu, script):
  """Layers, the block, and the model of twelve blocks."""
  content = output.read_json(output.RESULTS / ("h200" if gpu == "h200" else ""), script)
  assert content["measurement"]
  assert content["environment"]["device"].startswith(f"NVIDIA {gpu.upper()}")
  target = GpuTarget.named(gpu)
  ratios = {
    (case, name): estimated_ms(case, name, each, target) / each["ms"]["median"]
    for case, variants in content["found"].items()
    for name, each in variants.items()
    if "bare" not in case
  }
  assert len(ratios) >= 10
  assert max(ratios.values()) < 1.15
  assert min(ratios.values()) > 0.85


def test_estimates_tell_whether_fp8_is_faster():
  """In all cases of crossover.py but one: rowwise, 8,192 tokens, 4096 x 4096, which takes 1.03."""
  found = output.read_json(output.RESULTS, "crossover")["found"]
  h100 = GpuTarget.named("h100")
  ms = {
    (case, name): (estimated_ms(case, name, each, h100), each["ms"]["median"])
    for case, variants in found.items()
    for name, each in variants.items()
  }
  wrong = [
    (case, name)
    for (case, name), (estimated, measured) in ms.items()
    if (estimated < ms[case, BF16][0]) != (measured < ms[case, BF16][1])
  ]
  assert len(ms) == 60
  assert wrong == [("8192 tokens, 4096", "rowwise")]


@pytest.mark.parametrize("script", [block, card, crossover, gemm, kernel_times])
def test_each_script_refuses_a_cpu(script, monkeypatch, capsys, tmp_path):
  monkeypatch.setattr(sys, "argv", ["a.py", "--out", str(tmp_path)])
  monkeypatch.setenv("XLA_FLAGS", "")
  with pytest.raises(SystemExit) as stopped:
    script.main()
  assert stopped.value.code == 2
  assert "needs a GPU that multiplies FP8" in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_each_step_goes_on_from_the_last_ones_state():
  """As many steps by hand: the state is theirs, and the results are not zero."""
  program = layer("delayed", shape=Shape(16, 16, 32))
  arguments = programs.Arrays().fill(program.shapes)
  counter, state, results = program.fn(*arguments)
  module = dense(32, VARIANTS["delayed"])
  jitted = jax.jit(programs.forward_and_backward(module.apply, max_grad=True))
  by_hand = arguments[0]
  for _ in range(REPEAT):
    by_hand, last = jitted(by_hand, *arguments[1:])
  assert int(counter) == REPEAT - 1
  jax.tree.map(np.testing.assert_array_equal, (state, results), (by_hand, last))
  assert all(np.any(np.asarray(leaf, np.float32)) for leaf in jax.tree.leaves((state, results)))
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state, arguments[0])
  assert all(jax.tree.leaves(moved))
  histories = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim and leaf.size > 8]
  assert all(np.count_nonzero(history) == REPEAT for history in histories)


@pytest.fixture
def cpu_as_gpu(monkeypatch):
  """What scripts do on a GPU, with this CPU in its place."""
  compile_module = importlib.import_module("flax_fp8.explain.compile")
  monkeypatch.setattr(compile_module, "_attached_gpu", lambda: jax.devices()[0])
  for module in (compiling, kernel_times):
    monkeypatch.setattr(module, "on_gpu", lambda: True)


def test_what_is_compiled_to_be_read_is_what_runs(cpu_as_gpu):
  program = layer("delayed", shape=Shape(16, 16, 32))
  ready = compiling.prepare("delayed", program)
  arguments = programs.Arrays().fill(program.shapes)
  jax.tree.map(np.testing.assert_array_equal, ready.run(*arguments), program.fn(*arguments))
  assert ready.figures["gemms"] == 3


def test_kernel_times_explains_what_it_traces(cpu_as_gpu):
  program = layer("delayed", shape=Shape(16, 16, 32))
  report, kept = kernel_times.compile_program("delayed", program)
  assert report.kernels
  assert kept.compiled


def test_variants_share_their_parameters():
  arrays = programs.Arrays()
  first, second = (arrays.fill(layer(name).shapes) for name in (BF16, "delayed"))
  assert first[1]["kernel"] is second[1]["kernel"]
  assert first[2] is second[2]


@pytest.fixture(scope="module")
def reports():
  """Compiled for a described H100."""
  made = {name: layer(name) for name in COMPILED}
  return {
    name: (program, fp8.explain(program.fn, *program.shapes, target="h100"))
    for name, program in made.items()
  }


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_every_turn_of_the_loop_has_all_three_gemms(reports, name):
  program, report = reports[name]
  assert report.total_gemms == 3 * REPEAT
  assert report.fp8_gemms == (0 if name == BF16 else 3 * REPEAT)
  assert compiling.problems(report, program) == []
  figures = compiling.describe(report, program)
  assert (figures["gemms"], figures["doubts"]) == (3, [])


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_no_tensor_is_quantized_or_transposed_once_for_all_turns(reports, name):
  """What runs once writes the zeros with which the results begin, and nothing reads a tensor."""
  _, report = reports[name]
  fewest = min(SHAPE.tokens * SHAPE.width, SHAPE.width * SHAPE.features)  # bytes, in FP8
  once = [kernel for kernel in report.kernels if kernel.times < REPEAT]
  assert not [kernel for kernel in once if kernel.read >= fewest]
  moving = (KernelClass.QUANTIZE, KernelClass.TRANSPOSE, KernelClass.REDUCE)
  assert not [kernel for kernel in once if kernel.kind in moving]


@pytest.mark.slow
def test_a_baseline_that_is_not_bf16_ends_the_benchmark(reports):
  (bf16, bf16_report), (delayed, delayed_report) = reports[BF16], reports["delayed"]
  with pytest.raises(ValueError, match="must be BF16"):
    compiling.problems(delayed_report, bf16)
  assert len(compiling.problems(bf16_report, delayed)) == 4


@pytest.mark.slow
def test_bare_gemms_are_of_operands_that_are_ready():
  for kind, formats in gemm.FORMATS.items():
    sizes = Shape(2048, 2048, 2048).gemms[kind]
    program = gemm.bare_program(sizes, formats, kind == "fprop", REPEAT)
    report = fp8.explain(program.fn, *program.shapes, target="h100")
    assert report.fp8_gemms == report.total_gemms == REPEAT
    assert compiling.problems(report, program) == []
    kinds = {kernel.kind for kernel in report.kernels}
    assert kinds.isdisjoint({KernelClass.QUANTIZE, KernelClass.TRANSPOSE, KernelClass.REDUCE})
    assert report.gemms[0].out == "bf16"


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("kind", gemm.FORMATS)
def test_bare_gemms_of_block_are_one_kernel(kind):
  program = gemm.bare_block_program(Shape(256, 384, 512).gemms[kind], kind, REPEAT)
  report = fp8.explain(program.fn, *program.shapes, target="h100")
  assert report.fp8_gemms == report.total_gemms == REPEAT
  assert compiling.problems(report, program) == []
  kinds = {kernel.kind for kernel in report.kernels}
  assert kinds.isdisjoint({KernelClass.QUANTIZE, KernelClass.TRANSPOSE, KernelClass.REDUCE})


@pytest.mark.slow
@needs_kernels
def test_a_layer_of_block_has_six_kernels(reports):
  """A quantizer for each tensor, and a GEMM for each product. The others are the loop's own."""
  _, report = reports[BLOCK]
  kernels = [kernel for kernel in report.kernels if kernel.read + kernel.written > 1024]
  in_loop = Counter(kernel.kind for kernel in kernels if kernel.times == REPEAT)
  assert in_loop == {KernelClass.FP8_GEMM: 3, KernelClass.QUANTIZE: 3}


def test_bare_gemms_of_block_are_left_out_with_the_recipe():
  shapes = {"small": Shape(16, 16, 16)}
  for variants, names in (((), [BF16, gemm.FP8, BLOCK]), (("delayed",), [BF16, gemm.FP8])):
    made = gemm.bare("a", shapes, options(tiny=True, variants=variants))
    assert {tuple(programs) for programs in made.values()} == {tuple(names)}


@pytest.mark.slow
def test_tiny(monkeypatch, capsys, tmp_path):
  command = "gemm.py --tiny --rounds 3 --repeat 2 --variants delayed block --threads 2 --out"
  monkeypatch.setattr(sys, "argv", [*command.split(), str(tmp_path)])
  gemm.main()
  found = json.loads((tmp_path / "gemm.json").read_text())
  assert found["measurement"] is False
  assert found["note"] == output.NO_MEASUREMENT
  assert {"date", "device", "jax", "nvidia_smi"} <= found["environment"].keys()
  layers = {f"{group}: {layer}" for group, layers in TINY_GROUPS.items() for layer in layers}
  bare = {f"{layer}, bare {kind}" for layer in layers for kind in gemm.FORMATS}
  assert found["found"].keys() == layers | bare
  for layer in layers:
    each = found["found"][layer]
    assert list(each) == [BF16, "delayed", BLOCK]
    assert each[BF16]["speedup"] == {"median": 1, "low": 1, "high": 1}
    assert all(len(variant["ms_rounds"]) == 3 for variant in each.values())
    assert all(variant["ms"]["median"] > 0 for variant in each.values())
    assert all(variant["tokens_per_second"] > 0 for variant in each.values())
  assert found["summary"][f"{PUBLISHED}: {BF16}"] == 1
  for bare_gemms in ("bare GEMMs", f"bare GEMMs, {BLOCK}"):
    assert {f"{layer}: {bare_gemms}" for layer in layers} < found["summary"].keys()
  printed = capsys.readouterr().out
  assert output.NO_MEASUREMENT in printed
  assert f"{PUBLISHED}: delayed: " in printed
  (tmp_path / "gemm.png").unlink()
  monkeypatch.setattr(sys, "argv", ["gemm.py", "--redraw", "--out", str(tmp_path)])
  gemm.main()
  assert (tmp_path / "gemm.png").exists()


def test_the_json_names_the_command_without_folders(monkeypatch):
  script = str(output.ROOT / "benchmarks" / "gemm.py")
  monkeypatch.setattr(sys, "argv", [script, "--out", "/a/folder", "--rounds", "3"])
  assert output.command() == "python benchmarks/gemm.py --rounds 3"
