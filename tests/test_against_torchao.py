"""The benchmark of torchao, as far as it goes without PyTorch: its shapes, sums and tables."""

import json
import subprocess
import sys

import pytest
from rich.console import Console

import against_torchao
from against_torchao import BLOCK
from harness import clock, output
from harness.names import BF16
from harness.sizes import GROUPS, PUBLISHED


def variant(ms, baseline):
  """A measured variant."""
  figures = clock.figures([ms / 1e3] * 3, [baseline / 1e3] * 3, 10**12)
  return figures | {"peak_mib": None, "difference": 0.05, "compile_seconds": 9.0}


def layer(baseline, **others):
  return {name: variant(ms, baseline) for name, ms in {BF16: baseline, **others}.items()}


@pytest.fixture
def content():
  layers = {"up": layer(4, tensorwise=2, rowwise=4), "down": layer(4, tensorwise=4)}
  return {
    "note": "made up",
    "found": {BLOCK: layer(10, tensorwise=8), **layers},
    "summary": clock.summarize(layers, BF16),
    "left_out": ["MLP down"],
    "failures": ["rowwise: no [such] kernel"],
  }


def test_it_imports_no_jax():
  code = "import sys, against_torchao; sys.exit('jax' in sys.modules)"
  folder = output.RESULTS.parent
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
  assert {row["library"] for row in alone} == {"torchao"}
  ours = {"found": {BLOCK: layer(9, delayed=6)}}
  layers = {f"{PUBLISHED}: {name}": layer(4, delayed=2) for name in GROUPS[PUBLISHED]}
  (tmp_path / "block.json").write_text(json.dumps(ours))
  (tmp_path / "gemm.json").write_text(json.dumps({"found": layers}))
  rows = against_torchao.compare(content, tmp_path)
  found = {(row["of"], row["variant"]): (row["speedup"], row["ms"]) for row in rows}
  assert found[BLOCK, "tensorwise"] == pytest.approx((1.25, 8))
  assert found[BLOCK, "delayed"] == pytest.approx((1.5, 6))
  assert found[against_torchao.LAYERS, "delayed"] == pytest.approx((2, 8))
  console = Console(width=120)
  with console.capture() as printed:
    against_torchao.show(content, tmp_path, console)
  text = printed.get()
  for words in ("made up", "2.000", "left out, the time was up: MLP down", "no [such] kernel"):
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
