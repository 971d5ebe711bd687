"""The benchmark of torchao, as far as it goes without PyTorch: its shapes, sums and tables."""

import dataclasses
import json
import subprocess
import sys

import pytest
from rich.console import Console

import against_torchao
import block
import gemm
from against_torchao import BF16, BLOCK


def variant(ms, baseline):
  """A measured variant."""
  figures = against_torchao.figures([ms / 1e3] * 3, [baseline / 1e3] * 3, 10**12)
  return figures | {"peak_mib": None, "difference": 0.05, "compile_seconds": 9.0}


def layer(baseline, **others):
  return {name: variant(ms, baseline) for name, ms in {BF16: baseline, **others}.items()}


@pytest.fixture
def content():
  layers = {"up": layer(4, tensorwise=2, rowwise=4), "down": layer(4, tensorwise=4)}
  return {
    "note": "made up",
    "found": {BLOCK: layer(10, tensorwise=8), **layers},
    "summary": against_torchao.summarize(layers),
    "left_out": ["MLP down"],
    "failures": ["rowwise: no [such] kernel"],
  }


def test_shapes_are_those_of_our_own_benchmarks():
  layers = gemm.GROUPS[against_torchao.PUBLISHED]
  assert list(against_torchao.SHAPES) == list(layers)
  for name, shape in against_torchao.SHAPES.items():
    assert dataclasses.asdict(shape) == dataclasses.asdict(layers[name])
    assert shape.flops == layers[name].flops
  theirs, ours = against_torchao.Sizes(), block.Sizes()
  assert dataclasses.asdict(theirs) | {"layers": ours.layers} == dataclasses.asdict(ours)
  assert (theirs.flops, theirs.head_dim) == (ours.flops, ours.head_dim)
  assert len(theirs.projections) == 7


def test_it_imports_no_jax():
  code = "import sys, against_torchao; sys.exit('jax' in sys.modules)"
  folder = against_torchao.RESULTS.parent
  subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


def test_it_says_what_is_missing(monkeypatch, capsys, tmp_path):
  monkeypatch.setattr(against_torchao, "missing", "needs torch and torchao; got neither")
  monkeypatch.setattr(sys, "argv", ["against_torchao.py", "--tiny", "--out", str(tmp_path)])
  with pytest.raises(SystemExit) as stopped:
    against_torchao.main()
  assert stopped.value.code == 2
  assert "against_torchao: needs torch and torchao; got neither" in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_a_summary_has_the_variants_that_ran_everywhere(content):
  summary = content["summary"]
  assert list(summary) == [BF16, "tensorwise"]
  assert summary["tensorwise"]["geometric_mean"] == pytest.approx(2**0.5)
  assert summary["tensorwise"]["of_the_sum"] == pytest.approx(8 / 6)
  assert summary["tensorwise"]["ms"] == pytest.approx(6)


def test_our_figures_stand_beside_torchaos(content, tmp_path):
  alone = against_torchao.compare(content, tmp_path)
  assert {library for _, library, *_ in alone} == {"torchao"}
  ours = {"found": {BLOCK: layer(9, delayed=6)}}
  means = {"delayed": {"geometric_mean": 1.75, "of_the_sum": 1.7, "ms": 5.0}}
  (tmp_path / "block.json").write_text(json.dumps(ours))
  (tmp_path / "gemm.json").write_text(json.dumps({"summary": {against_torchao.PUBLISHED: means}}))
  rows = against_torchao.compare(content, tmp_path)
  found = {row[:3]: pytest.approx(row[3:]) for row in rows}
  assert found[BLOCK, "torchao", "tensorwise"] == (1.25, 8)
  assert found[BLOCK, "flax_fp8", "delayed"] == (1.5, 6)
  assert found[against_torchao.LAYERS, "flax_fp8", "delayed"] == (1.75, 5)
  console = Console(width=120)
  with console.capture() as printed:
    against_torchao.show(content, tmp_path, console)
  text = printed.get()
  for words in ("made up", "1.750", "left out, the time was up: MLP down", "no [such] kernel"):
    assert words in text


def test_tiny(monkeypatch, capsys, tmp_path):
  pytest.importorskip("torchao", reason="PyTorch and torchao are no requirements of the tests")
  monkeypatch.setattr(sys, "argv", ["against_torchao.py", "--tiny", "--out", str(tmp_path)])
  against_torchao.main()
  found = json.loads((tmp_path / "against_torchao.json").read_text())
  assert found["measurement"] is False
  assert found["failures"] == found["left_out"] == []
  for variants in found["found"].values():
    assert list(variants) == list(against_torchao.VARIANTS)
    assert variants[BF16]["difference"] == 0
    assert all(0 < variants[name]["difference"] < 0.2 for name in ("tensorwise", "rowwise"))
  assert "torchao" in capsys.readouterr().out
