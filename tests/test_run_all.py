"""The command that runs the benchmarks: time limits, failures, and what is left without a GPU."""

import json
import os
import sys
import time

import pytest
from rich.console import Console

import run_all
from run_all import Script

QUIET = Console(quiet=True)
WRITE = """
import json, os, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
found = {"path": os.environ["PYTHONPATH"], "platforms": os.environ.get("JAX_PLATFORMS")}
(out / (pathlib.Path(__file__).stem + ".json")).write_text(json.dumps(found))
print("written")
"""


def script(folder, name, text, *, seconds=60, needs_gpu=True):
  path = folder / f"{name}.py"
  path.write_text(text)
  return Script(path, (), seconds, needs_gpu)


def run(scripts, out, seconds=60.0, beside=False):
  return run_all.run_all(scripts, out, seconds, QUIET, beside=beside)


@pytest.mark.parametrize("beside", [False, True])
def test_every_script_runs_and_one_that_fails_is_told(tmp_path, beside):
  scripts = [
    script(tmp_path, "breaks", "print('some words'); raise SystemExit(3)"),
    script(tmp_path, "works", WRITE),
    script(tmp_path, "compiles", WRITE, needs_gpu=False),
  ]
  out = tmp_path / "out"
  breaks, works, compiles = run(scripts, out, beside=beside)
  assert (breaks.status, breaks.failed) == ("failed with exit code 3", True)
  assert (works.status, works.failed) == ("done", False)
  assert not compiles.failed
  assert "some words" in (out / "run_all.log").read_text()
  files = sorted(path.name for path in out.iterdir())
  assert files == ["compiles.json", "run_all.log", "works.json"]


def test_children_find_the_package_and_what_needs_no_gpu_leaves_it_alone(tmp_path, monkeypatch):
  monkeypatch.delenv("JAX_PLATFORMS")
  scripts = [script(tmp_path, "a", WRITE), script(tmp_path, "b", WRITE, needs_gpu=False)]
  run(scripts, tmp_path)
  timed, compiled = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
  root = str(run_all.HERE.parent)
  assert timed["path"].split(os.pathsep)[0] == root
  assert (timed["platforms"], compiled["platforms"]) == (None, "cpu")


def test_a_script_that_hangs_is_stopped_with_its_own_children(tmp_path):
  """And what comes after it has its turn, as long as there is time."""
  child = "import time; time.sleep(60)"
  hangs = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
  scripts = [script(tmp_path, "hangs", hangs, seconds=1.5), script(tmp_path, "next", WRITE)]
  start = time.monotonic()
  first, second = run(scripts, tmp_path)
  assert (first.status, first.failed) == ("stopped after 2 s", True)
  assert second.status == "done"
  assert time.monotonic() - start < 30
  late = run(scripts, tmp_path, seconds=0.5)
  assert [outcome.status for outcome in late] == ["left out: the time was up"] * 2
  assert all(outcome.failed for outcome in late)


def test_a_script_that_is_not_there_is_no_failure(tmp_path):
  (outcome,) = run([Script(tmp_path / "none.py", (), 9, False)], tmp_path)
  assert (outcome.status, outcome.failed) == ("left out: there is no such script", False)


def test_time_limits_leave_room_for_all_within_nine_minutes():
  timed = sum(script.seconds for script in run_all.SCRIPTS if script.needs_gpu)
  assert timed <= run_all.TOTAL <= 9 * 60 - 15


def test_there_is_no_gpu_where_there_is_no_driver(monkeypatch, tmp_path):
  monkeypatch.setenv("PATH", str(tmp_path))
  assert run_all.gpu_names() == []


def test_without_a_gpu_only_what_needs_none_runs(tmp_path, monkeypatch, capsys):
  timed = script(tmp_path, "gemm", "raise SystemExit(9)")
  compiled = script(tmp_path, "traffic", WRITE, needs_gpu=False)
  monkeypatch.setattr(run_all, "SCRIPTS", (timed, compiled))
  monkeypatch.setattr(run_all, "gpu_names", list)
  monkeypatch.setattr(sys, "argv", ["run_all.py", "--out", str(tmp_path / "out")])
  with pytest.raises(SystemExit) as stopped:
    run_all.main()
  assert not stopped.value.code
  assert "gemm: left out, it needs a GPU" in capsys.readouterr().out
  summary = json.loads((tmp_path / "out" / "summary.json").read_text())
  assert [each["name"] for each in summary["scripts"]] == ["traffic"]
  assert summary["gpus"] == []


def test_the_exit_code_tells_of_a_failure(tmp_path, monkeypatch):
  breaks = script(tmp_path, "traffic", "raise SystemExit(3)", needs_gpu=False)
  monkeypatch.setattr(run_all, "SCRIPTS", (breaks,))
  monkeypatch.setattr(sys, "argv", ["run_all.py", "--out", str(tmp_path)])
  with pytest.raises(SystemExit) as stopped:
    run_all.main()
  assert stopped.value.code


def test_the_summary_has_each_scripts_figures_and_none_of_an_older_run(tmp_path):
  speed = {"median": 1.5, "low": 1.4, "high": 1.6}
  contents = {
    "gemm": {
      "environment": {"date": "now"},
      "summary": {"Transformer Engine": {"delayed": {"geometric_mean": 1.7}}},
      "bare_sums": {"a layer": {"speedup": speed}},
    },
    "block": {"found": {"block": {"delayed": {"speedup": speed, "peak_to_bf16": 0.9}}}},
    "crossover": {"rules": {"rowwise": {"min_kernel_size": None, "worst_with_rule": 1.0}}},
  }
  for name, content in contents.items():
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
  outcomes = [run_all.Outcome(name, "done") for name in contents]
  summary = run_all.summarize(outcomes, tmp_path, 0)
  assert summary["figures"]["gemm"] == {
    "Transformer Engine: delayed": 1.7,
    "a layer: bare GEMMs": 1.5,
  }
  assert summary["figures"]["block"]["block, delayed: peak memory"] == 0.9
  assert summary["figures"]["crossover"]["rowwise: min_kernel_size"] is None
  assert summary["environments"]["gemm"] == {"date": "now"}
  assert run_all.table(summary).row_count == 6
  later = run_all.summarize(outcomes, tmp_path, time.time() + 60)
  assert later["figures"] == {}


def test_this_process_does_not_start_jax():
  """It would hold the GPU's memory, that its children need."""
  command = "import run_all, sys; assert 'jax' not in sys.modules"
  run_all.subprocess.run([sys.executable, "-c", command], check=True, cwd=run_all.HERE)
