"""The benchmark of compiled programs: its questions in small, their tables and plots."""

import json
import sys

import pytest
from rich.console import Console

import compiled
from flax_fp8.ops import metrics
from harness import output, plot
from harness.names import BF16, FLAX
from harness.sizes import Shape
from harness.variants import RECIPES
from lm.model import ModelShape
from questions import QUESTIONS, layers, steps

SMALL = Shape(256, 128, 128)
COMMITTED = {name: output.read_json(output.RESULTS, name) for name in QUESTIONS}


def main(monkeypatch, tmp_path, *words):
  monkeypatch.setattr(sys, "argv", ["compiled.py", *words, "--out", str(tmp_path)])
  compiled.main()
  return output.read_json(tmp_path, words[0])


@pytest.mark.parametrize("name", QUESTIONS)
def test_committed_results_are_the_answers_of_todays_cases(name):
  rows = COMMITTED[name]["rows"]
  asked = {each[:2] for each in QUESTIONS[name].cases()}
  assert {(row["case"], row["variant"]) for row in rows} == asked
  command = "step.py" if name == "step_compiled" else f"compiled.py {name}"
  assert COMMITTED[name]["environment"]["command"] == f"python benchmarks/{command}"
  assert COMMITTED[name]["note"] == QUESTIONS[name].note
  assert all(row["operands"] == ["bf16"] for row in rows if row.get("operands") and is_bf16(row))


def is_bf16(row):
  return row["variant"] == BF16


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_table_has_a_row_for_each_program(name):
  console = Console(width=250)
  with console.capture() as shown:
    compiled.show(name, COMMITTED[name], console)
  printed = shown.get()
  assert printed.count("│\n") == len(COMMITTED[name]["rows"])
  assert COMMITTED[name]["note"] in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, each in QUESTIONS.items() if each.draw])
def test_a_plot_is_redrawn_from_its_json(name, monkeypatch, tmp_path):
  output.write_json(tmp_path, name, COMMITTED[name])
  main(monkeypatch, tmp_path, name, "--redraw")
  assert (tmp_path / f"{name}.png").stat().st_size > 10_000
  figure = QUESTIONS[name].draw(COMMITTED[name])
  assert COMMITTED[name]["note"] in figure.get_suptitle()
  for axes in figure.axes:
    plot.check(axes)
    assert axes.get_xscale() == "linear" or axes.get_yscale() == "log"


def test_a_panel_has_at_most_five_lines():
  axes = plot.make_figure("", COMMITTED["growth"], (2, 2)).subplots()
  names = {name: [1] for name in (*RECIPES, BF16, FLAX)}
  plot.lines(axes, [1], names)
  with pytest.raises(ValueError, match="at most 5 lines"):
    plot.lines(axes, [1], {"block": [1]})


def test_the_floor_of_a_layer():
  """320 MiB for 4096 by 4096 and 8192 tokens."""
  assert layers.floor_mib(layers.LAYER) == 320


def test_a_baseline_that_is_not_bf16_ends_the_benchmark():
  case = "a layer", BF16, lambda target: {"operands": ["f8e4m3fn"]}, {}
  with pytest.raises(ValueError, match="baseline must be BF16"):
    compiled.measure([case], ["h100"], output.make_console())


@pytest.mark.slow
def test_a_command(monkeypatch, tmp_path, capsys):
  found = main(monkeypatch, tmp_path, "size_rule", "--cases", "2,048 tokens, 256 x *")
  assert [row["variant"] for row in found["rows"]] == [BF16, *RECIPES]
  assert found["note"] == "compiled, not timed"
  assert "--cases '2,048 tokens" in found["environment"]["command"]
  assert "2,048 tokens" in capsys.readouterr().out


@pytest.mark.slow
def test_layers_move_more_than_bf16_and_less_than_flax():
  names = (BF16, FLAX, "delayed")
  bf16, flax, ours = (layers.layer(Shape(2048, 1024, 2048), layers.ASKED[n], "h100") for n in names)
  assert [each["fp8_gemms"] for each in (bf16, flax, ours)] == [0, 3, 3]
  assert bf16["operands"] == ["bf16"]
  assert bf16["mib_outside_gemms"] < ours["mib_outside_gemms"] < flax["mib_outside_gemms"]
  assert not ours["doubts"]


@pytest.mark.slow
def test_metrics_cost_nothing_where_they_are_absent(monkeypatch):
  """Compiled with the measuring taken out: the same kernels, bytes and memory."""
  delayed = RECIPES["delayed"]
  without = layers.layer(SMALL, delayed, "h100")
  measured = layers.layer(SMALL, delayed, "h100", metrics=True)
  assert without["fp8_gemms"] == measured["fp8_gemms"] == 3
  assert measured["kernels"] > without["kernels"]
  calls = []
  monkeypatch.setattr(metrics, "split", lambda state: calls.append(1) or (dict(state), {}))
  monkeypatch.delattr(metrics, "measure")
  assert layers.layer(SMALL, delayed, "h100") == without
  assert calls


@pytest.mark.slow
def test_fused_projections_launch_less():
  cases = {each[:2]: each[2] for each in layers.fused_cost()}
  for case, gemms in (("query, key, value", 3), ("SwiGLU", 6)):
    three, fused = (cases[case, f"current, {how}"]("h100") for how in ("three layers", "fused"))
    assert gemms <= three["fp8_gemms"] == three["gemms"] <= 9
    assert fused["fp8_gemms"] == fused["gemms"] == gemms
    assert fused["kernels"] < three["kernels"]


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "again"), [("save_fp8_inputs", 1), ("dots_saveable", 0)])
def test_policies_of_recomputation(policy, again):
  ours = {each[0]: each[2] for each in steps.memory() if each[1] == "delayed"}
  found = ours[policy]("h100")
  assert found["fp8_gemms"] == found["gemms"] == (6 + again) * 8


@pytest.mark.slow
def test_microbatches_move_less_than_with_flax():
  bf16, flax, ours = (
    measure("h100") for case, _, measure, _ in steps.microbatches() if case == "4,096"
  )
  assert ours["mib_outside_gemms"] < flax["mib_outside_gemms"]
  assert ours["roofline_ms"] < bf16["roofline_ms"]
  assert ours["fp8_gemms"] == ours["gemms"]


@pytest.mark.slow
def test_time_and_memory_grow():
  small, large = (layers.grown("layers", count, "delayed", "h100") for count in (1, 2))
  assert large["roofline_ms"] > small["roofline_ms"]
  assert large["temp_mib"] >= small["temp_mib"]
  assert layers.grown("history", 16, FLAX, "h100")["fp8_gemms"] == 3


@pytest.mark.slow
def test_two_small_all_reduces_for_all_amaxes():
  """Of 3 tensors of 7 layers of 2 blocks, once merged; the kernels travel in FP8."""
  shape = ModelShape(d_model=256, d_ff=512, layers=2, heads=4, kv_heads=4)
  cases = {each[:2]: each[2] for each in steps.collectives(shape, 32)}
  found = cases["unrolled, FSDP and tensor parallel", "delayed"]("h100")
  assert 1 <= found["amax"] <= 2
  assert found["amax_bytes"] <= 2 * 7 * 3 * 4
  assert found["fp8_gemms"] == 2 * 7 * 3
  gathered = {name for name in found["counts"] if name.startswith("all-gather")}
  weights = found["gib"]["all-gather f8e4m3fn"]
  assert sum(found["gib"][name] for name in gathered) <= weights * 1.1
  assert json.loads(json.dumps(found)) == found


@pytest.mark.slow
@pytest.mark.child
def test_explain_cost():
  found = steps.in_child(1, scan=False, target="h200")
  assert found["gemms"] == 3 * 7 + 6 + 3  # projections, attention's two products, the head
  assert found["kernels"] > found["gemms"]
  assert 0.1 < found["gib"] < 8
  assert found["seconds"] > 0
