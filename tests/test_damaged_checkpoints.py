"""The benchmark of damaged checkpoints in small: each damage does what it says, and is counted."""

import json
import random

import pytest

import damaged_checkpoints
from damaged_checkpoints import DAMAGES


@pytest.mark.parametrize("kind", DAMAGES)
def test_damages(kind, tmp_path):
  older, newer = tmp_path / "older", tmp_path / "newer"
  for folder, step in ((older, b"1"), (newer, b"2")):
    folder.mkdir()
    for name in ("a", "b"):
      (folder / name).write_bytes(40 * (name.encode() + step))
  before = {path.name: path.read_bytes() for path in newer.iterdir()}
  files = damaged_checkpoints.files
  DAMAGES[kind](newer / "a", random.Random(0), files(newer), files(older))
  after = {path.name: path.read_bytes() for path in newer.iterdir()}
  expected = {
    "bits flipped": lambda: len(after["a"]) == 80 and after["b"] == before["b"],
    "cut": lambda: before["a"].startswith(after["a"]) and after["b"] == before["b"],
    "removed": lambda: after == {"b": before["b"]},
    "exchanged": lambda: after == {"a": before["b"], "b": before["a"]},
    "of another step": lambda: after == {**before, "a": (older / "a").read_bytes()},
  }
  assert after != before
  assert expected[kind]()


def test_a_worker_that_dies_or_hangs_is_counted(tmp_path, monkeypatch):
  worker = damaged_checkpoints.Worker()
  monkeypatch.setattr(damaged_checkpoints, "SECONDS", 0.0)
  assert worker.ask(tmp_path)[0] == "hung"
  monkeypatch.setattr(damaged_checkpoints, "SECONDS", 60.0)
  monkeypatch.setattr(damaged_checkpoints, "__file__", str(tmp_path / "missing.py"))
  assert worker.ask(tmp_path) == ("crashed", "exit code 2")


@pytest.mark.slow
def test_run(tmp_path, capsys):
  assert damaged_checkpoints.main(["--count", "10", "--out", str(tmp_path)]) == 0
  found = json.loads((tmp_path / "damaged_checkpoints.json").read_text())
  counts = found["counts"]
  assert sum(counts["all"].values()) == 10
  assert set(counts["all"]) <= {"right", "refused"}
  assert found["bad"] == []
  assert "of another step" in capsys.readouterr().out
