"""What does FP8 bring on the GPU of this machine, and are its numbers right?

    python benchmarks/run_all.py --out DIR                    # on an H100 or H200
    python benchmarks/run_all.py --out DIR --only card gemm   # some of it, in the order given

Runs the tests of ``tests/gpu`` and the benchmarks that time a GPU, one after the other. The most
important come first, so a run that is cut short has them. Each is a process of its own with a time
limit, and writes results as it goes. All share what XLA's autotuning finds: two programs with the
same GEMM run the same kernel. At the end ``summary.json`` and a table have the figures.
``run_all.log`` has what all of them printed. The exit code is 1 if one failed.
"""

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from harness import output
from harness.table import Column, print_table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}  # of the GPU, for one process at a time
NO_TRITON = "--xla_gpu_enable_triton_gemm=false"  # leaves XLA less to autotune
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_PLATFORMS": "cuda,cpu"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Script:
  """A benchmark, or the tests."""

  name: str  # of its JSON, or of its folder in ``--out`` where another has the same JSON
  command: tuple[str, ...]  # of Python; ``{out}`` is where results go
  seconds: float  # after which it is stopped
  # besides this process's own
  environment: Mapping[str, str] = dataclasses.field(default_factory=lambda: MEMORY)
  flags: str = NO_TRITON  # of XLA, besides this process's own


def benchmark(name: str, seconds: float, *options: str) -> Script:
  """A script beside this one."""
  command = (str(HERE / f"{name}.py"), "--out", "{out}", *options)
  return Script(name=name, command=command, seconds=seconds)


def block_with(name: str, flags: str) -> Script:
  """The block, and no model, under other flags of XLA, in a folder of its own."""
  options = ("--rounds", "6", "--seconds", "5", "--variants", "delayed", "current")
  command = (str(HERE / "block.py"), "--out", f"{{out}}/{name}", *options)
  return Script(name=name, command=command, seconds=60, flags=flags)


BLOCK = ("delayed", "current", "rowwise", "block", "flax.linen.fp8_ops")
PYTEST = "-m pytest -q -n 8 -p no:cacheprovider -p no:benchmark tests/gpu"
TESTS = Script(
  name="tests", command=tuple(PYTEST.split()), seconds=90, environment=SHARED, flags=""
)
TRAIN = ("--preset", "h200", "--steps", "120")  # a billion parameters, for a minute
TINY_TRAIN = ("--preset", "micro", "--steps", "20", "--explain", "none")


def training(*options: str) -> Script:
  """The benchmark that compares losses."""
  fixed = ("--checkpoint-every", "0", "--out", "{out}/train_lm")
  return Script(name="train_lm", command=(str(HERE / "train_lm.py"), *options, *fixed), seconds=170)


def trials(*options: str) -> Script:
  """The benchmark that compares the losses of many seeds; alone, it needs ten minutes."""
  command = (str(HERE / "convergence.py"), "--out", "{out}", *options)
  return Script(name="convergence_gpu", command=command, seconds=590)


PAIRS = ("--preset", "gpu", "--arms", "bf16, fp8-sized", "delayed", "--seeds", "4")
TINY_PAIRS = ("--preset", "micro", "--arms", "delayed", "--steps", "16", "--seeds", "1")

SCRIPTS = (
  benchmark("card", 50),
  TESTS,
  benchmark("gemm", 140, "--seconds", "75", "--rounds", "8"),
  benchmark("block", 130, "--seconds", "50", "--rounds", "6", "--variants", *BLOCK),
  benchmark("kernel_times", 80, "--seconds", "70"),
  benchmark("step", 160, "--seconds", "70", "--rounds", "6"),
  benchmark("against_torchao", 130, "--seconds", "110"),
  training(*TRAIN),
  benchmark("crossover", 105, "--seconds", "70"),
  block_with("block_default_flags", ""),
  block_with("block_latency_hiding", f"{NO_TRITON} --xla_gpu_enable_latency_hiding_scheduler=true"),
  block_with("block_without_command_buffers", f"{NO_TRITON} --xla_gpu_enable_command_buffer="),
  trials(*PAIRS),
)


def tiny(script: Script) -> Script:
  """The same in small, on any device, to test the script; the tests stay as they are."""
  if script.name == "train_lm":
    return training(*TINY_TRAIN)
  if script.name == "convergence_gpu":
    return trials(*TINY_PAIRS, "--jobs", "1")
  rounds = () if script.name == "against_torchao" else ("--rounds", "2", "--repeat", "2")
  added = () if script is TESTS else ("--tiny", *rounds)
  return dataclasses.replace(script, command=(*script.command, *added), environment={})


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a script ended."""

  name: str  # of the script
  status: str  # ``"done"``, or why not
  seconds: float = 0.0  # that it took
  failed: bool = False  # whether it should have ended otherwise


def environment_of(script: Script, out: Path) -> dict[str, str]:
  """The package is found beside the benchmarks; XLA remembers which kernels of GEMMs were best."""
  (out / ".autotuned").mkdir(exist_ok=True)
  tuned = f"--xla_gpu_per_fusion_autotune_cache_dir={out / '.autotuned'}"
  own = os.environ
  found = {
    "PYTHONPATH": f"{ROOT}{os.pathsep}{own.get('PYTHONPATH', '')}".rstrip(os.pathsep),
    "PYTHONUNBUFFERED": "1",
    "XLA_FLAGS": f"{own.get('XLA_FLAGS', '')} {tuned} {script.flags}",
  }
  return {**own, **found, **script.environment}


def run(script: Script, out: Path, left: float, log: TextIO) -> Outcome:
  """Runs a script until it ends or its time is up; then its own children end too."""
  limit = min(script.seconds, left)
  if limit < 1:
    return Outcome(script.name, "left out: the time was up", failed=True)
  command = [sys.executable, *(part.format(out=out) for part in script.command)]
  how: dict[str, Any] = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
  start = time.monotonic()
  child = subprocess.Popen(command, cwd=ROOT, env=environment_of(script, out), **how)
  try:
    code = child.wait(limit)
  except subprocess.TimeoutExpired:
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    return Outcome(script.name, f"stopped after {limit:.0f} s", limit, failed=True)
  status = "done" if code == 0 else f"failed with exit code {code}"
  return Outcome(script.name, status, time.monotonic() - start, failed=code != 0)


def run_all(
  scripts: Sequence[Script], out: Path, seconds: float, console: Console
) -> list[Outcome]:
  """Runs scripts one after the other, and says how each ended."""
  out.mkdir(parents=True, exist_ok=True)
  end, outcomes = time.monotonic() + seconds, list[Outcome]()
  with (out / "run_all.log").open("w+", buffering=1) as log:
    for script in scripts:
      begin = log.tell()
      outcome = run(script, out, end - time.monotonic(), log)
      log.seek(begin)
      said = log.read().splitlines()[-15:] if outcome.failed else []
      log.write(f"==== {script.name}: {outcome.status}\n\n")
      output.say(console, f"{script.name}: {outcome.status}, {outcome.seconds:.0f} s", *said)
      outcomes.append(outcome)
  return outcomes


def summarize(outcomes: Sequence[Outcome], out: Path, since: float) -> dict[str, Any]:
  """The figures of all JSON that this run has written, even by a script that was stopped."""
  figures, environments = {}, {}
  for outcome in outcomes:
    own = out / outcome.name / "block.json"
    path = own if own.exists() else out / f"{outcome.name}.json"
    if path.exists() and path.stat().st_mtime >= since:
      content = output.read_json(path.parent, path.stem)
      environments[outcome.name] = content.get("environment")
      figures[outcome.name] = content.get("summary", {})
  return {
    **output.host(),
    "gpus": gpu_names(),
    "scripts": [dataclasses.asdict(outcome) for outcome in outcomes],
    "figures": figures,
    "environments": environments,
  }


def gpu_names() -> list[str]:
  """The GPU of this machine, by NVIDIA's tool: this process must not start JAX on it."""
  return [name] if (name := output.nvidia_smi().get("name")) else []


def show(summary: Mapping[str, Any], console: Console) -> None:
  """Prints one row a figure; speeds and memory have BF16 as 1."""
  text = lambda value: "none" if value is None else f"{value:,.{3 if value < 100 else 0}f}"
  rows = [
    {"case": name, "label": label, "figure": text(value)}
    for name, figures in summary["figures"].items()
    for label, value in figures.items()
  ]
  left = (Column("script", "{case}", left=True), Column("", "{label}", left=True))
  title = f"FP8 beside BF16 = 1, {', '.join(summary['gpus']) or 'no GPU'}"
  print_table(console, title, (*left, Column("figure", "{figure}")), rows)


def main() -> None:
  raw = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
  parser.add_argument("--out", type=Path, required=True, help="folder of JSON and plots")
  parser.add_argument("--seconds", type=float, default=840, help="after which all is stopped")
  named = {script.name: script for script in SCRIPTS}
  only = "some, in the order given"
  parser.add_argument("--only", nargs="+", choices=named, default=list(named), help=only)
  parser.add_argument("--tiny", action="store_true", help="small shapes on any device: a test")
  arguments = parser.parse_args()
  if not arguments.tiny and not gpu_names():
    parser.exit(2, "run_all: needs an NVIDIA GPU; nvidia-smi finds none on this machine.\n")
  console, since, scripts = Console(), time.time(), [named[name] for name in arguments.only]
  scripts = [tiny(script) for script in scripts] if arguments.tiny else scripts
  outcomes = run_all(scripts, arguments.out.resolve(), arguments.seconds, console)
  summary = summarize(outcomes, arguments.out, since)
  output.write_json(arguments.out, "summary", summary)
  show(summary, console)
  sys.exit(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
  main()
