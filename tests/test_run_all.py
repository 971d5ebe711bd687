"""The command that runs the benchmarks: time limits, failures, environments, figures."""

import json
import sys
import time

import pytest
from rich.console import Console

import block
import run_all
from run_all import Script

QUIET = Console(quiet=True)
WRITE = """
import json, os, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
names = ("PYTHONPATH", "XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "JAX_PLATFORMS")
found = {name: os.environ.get(name) for name in names} | {"folder": os.getcwd()}
(out / (pathlib.Path(__file__).stem + ".json")).write_text(json.dumps(found))
print("written")
"""


def script(folder, name, text, *, seconds=60, out="{out}", **others):
  path = folder / f"{name}.py"
  path.write_text(text)
  return Script(name=name, command=(str(path), "--out", out), seconds=seconds, **others)


def run(scripts, out, seconds=60.0):
  return run_all.run_all(scripts, out, seconds, QUIET)


def test_every_script_runs_and_one_that_fails_is_told(tmp_path):
  scripts = [
    script(tmp_path, "breaks", "print('some words'); raise SystemExit(3)"),
    script(tmp_path, "works", WRITE),
  ]
  out = tmp_path / "out"
  breaks, works = run(scripts, out)
  assert (breaks.status, breaks.failed) == ("failed with exit code 3", True)
  assert (works.status, works.failed) == ("done", False)
  assert "some words" in (out / "run_all.log").read_text()
  files = sorted(path.name for path in out.iterdir())
  assert files == [".autotuned", "run_all.log", "works.json"]


def test_children_find_the_package_and_share_what_xla_tried(tmp_path, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--mine")
  run([script(tmp_path, "a", WRITE), script(tmp_path, "b", WRITE, flags="--own")], tmp_path)
  a, b = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
  tuned = f"--xla_gpu_per_fusion_autotune_cache_dir={tmp_path / '.autotuned'}"
  assert a["XLA_FLAGS"].split() == ["--mine", tuned, run_all.NO_TRITON]
  assert b["XLA_FLAGS"].split() == ["--mine", tuned, "--own"]
  assert a["PYTHONPATH"].startswith(str(run_all.ROOT))
  assert a["folder"] == str(run_all.ROOT)
  assert a["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.92"


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


def test_every_script_is_there_and_its_name_is_its_own():
  names = [each.name for each in run_all.SCRIPTS]
  assert len(set(names)) == len(names)
  for each in run_all.SCRIPTS:
    assert each.command[0] == "-m" or each.command[0].endswith(".py")
    assert each is run_all.TESTS or (run_all.HERE / each.command[0]).exists()


def test_the_benchmarks_that_time_recipes_fit_in_eleven_minutes():
  """The first six. What comes after them has what is left of 14 minutes."""
  assert [each.name for each in run_all.SCRIPTS[2:6]] == ["gemm", "block", "kernel_times", "step"]
  assert sum(each.seconds for each in run_all.SCRIPTS[:6]) <= 660
  assert all(set(each.command) >= {"--seconds"} for each in run_all.SCRIPTS[2:6])


def test_variants_of_the_block_exist():
  assert set(run_all.BLOCK) <= set(block.ALL)


def test_the_tests_run_with_xlas_default_flags():
  """What users have who set none."""
  assert run_all.TESTS.flags == ""
  assert run_all.NO_TRITON in run_all.SCRIPTS[0].flags


def test_in_small_every_script_has_its_option():
  for each in map(run_all.tiny, run_all.SCRIPTS):
    is_small = {"--tiny", "micro", "tests/gpu"} & set(each.command)
    assert is_small, each.name


def test_there_is_no_gpu_where_there_is_no_driver(monkeypatch, tmp_path):
  monkeypatch.setenv("PATH", str(tmp_path))
  assert run_all.gpu_names() == []


def main(monkeypatch, *options):
  monkeypatch.setattr(sys, "argv", ["run_all.py", *options])
  with pytest.raises(SystemExit) as stopped:
    run_all.main()
  return stopped.value.code


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(run_all, "gpu_names", list)
  assert main(monkeypatch, "--out", str(tmp_path)) == 2
  assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_some_run_in_the_order_given_and_the_exit_code_tells_of_a_failure(tmp_path, monkeypatch):
  made = [script(tmp_path, name, WRITE) for name in ("a", "b")]
  breaks = script(tmp_path, "c", "raise SystemExit(3)")
  monkeypatch.setattr(run_all, "SCRIPTS", (*made, breaks))
  monkeypatch.setattr(run_all, "gpu_names", lambda: ["a GPU"])
  out = tmp_path / "out"
  assert not main(monkeypatch, "--out", str(out), "--only", "b", "a")
  summary = json.loads((out / "summary.json").read_text())
  assert [each["name"] for each in summary["scripts"]] == ["b", "a"]
  assert summary["gpus"] == ["a GPU"]
  assert main(monkeypatch, "--out", str(out))


def test_the_summary_has_each_scripts_figures_and_none_of_an_older_run(tmp_path):
  contents = {
    "gemm": {"environment": {"date": "now"}, "summary": {"Llama 3 8B: delayed": 1.7}},
    "other_flags/block": {"summary": {"block, delayed: speed": 1.5}},
    "crossover": {"summary": {"rowwise: min_kernel_size": None}},
    "kernel_times": {},
  }
  for name, content in contents.items():
    path = tmp_path / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
  outcomes = [run_all.Outcome(name.split("/")[0], "done") for name in contents]
  summary = run_all.summarize(outcomes, tmp_path, 0)
  assert summary["figures"] == {
    name.split("/")[0]: each.get("summary", {}) for name, each in contents.items()
  }
  assert summary["environments"]["gemm"] == {"date": "now"}
  console = Console(width=120)
  with console.capture() as shown:
    run_all.show(summary, console)
  assert shown.get().count("│\n") == 3
  assert run_all.summarize(outcomes, tmp_path, time.time() + 60)["figures"] == {}


def test_this_process_does_not_start_jax():
  """It would hold the GPU's memory, that its children need."""
  command = "import run_all, sys; assert 'jax' not in sys.modules"
  run_all.subprocess.run([sys.executable, "-c", command], check=True, cwd=run_all.HERE)
