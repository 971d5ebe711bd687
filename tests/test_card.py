"""The benchmark of the card, in small."""

import json
import sys

import pytest

import card


@pytest.mark.slow
def test_tiny(monkeypatch, capsys, tmp_path):
  command = "card.py --tiny --rounds 2 --repeat 2 --threads 2 --out"
  monkeypatch.setattr(sys, "argv", [*command.split(), str(tmp_path)])
  card.main()
  found = json.loads((tmp_path / "card.json").read_text())
  assert found["measurement"] is False
  assert len(found["found"]["GEMM 32 x 32 x 32"]) == 4
  assert found["bandwidth"]["bytes_per_second"]["median"] > 0
  assert found["launch"]["seconds"]["median"] > 0
  assert found["capabilities"]["delayed"].startswith("yes")
  assert any("jaxlib" in line for line in found["doctor"])
  assert "a kernel that does nothing" in capsys.readouterr().out
