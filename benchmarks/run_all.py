"""What does FP8 bring on the GPU of this machine, and are its numbers right?

    python benchmarks/run_all.py --out DIR                    # on an H100 or H200
    python benchmarks/run_all.py --out DIR --only card gemm   # some of it, in the order given

Runs the tests of ``tests/gpu`` and the benchmarks that time a GPU, one after the other, the most
important first: a run that is cut short has them. Each is a process of its own with a time limit,
and writes what it finds as it goes. All share what XLA finds out about GEMMs as it tries kernels:
two programs with the same GEMM run the same kernel. At the end ``summary.json`` and a table have
the figures; ``run_all.log`` has what all printed.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from lm.files import write_text

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TOTAL = 840.0  # seconds, of all
MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}  # of the GPU, for one process at a time
NO_TRITON = "--xla_gpu_enable_triton_gemm=false"  # trying Triton's GEMMs out takes minutes
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_PLATFORMS": "cuda,cpu"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Script:
  """A benchmark, or the tests.

  Attributes:
    name: of its JSON, or of its folder in ``--out`` where another has the same JSON.
    command: of Python; ``{out}`` is where results go.
    seconds: after which it is stopped.
    environment: besides this process's own.
    flags: of XLA, besides this process's own.
  """

  name: str
  command: tuple[str, ...]
  seconds: float
  environment: Mapping[str, str] = dataclasses.field(default_factory=lambda: MEMORY)
  flags: str = NO_TRITON


def benchmark(name: str, seconds: float, *options: str) -> Script:
  """A script beside this one."""
  command = (str(HERE / f"{name}.py"), "--out", "{out}", *options)
  return Script(name=name, command=command, seconds=seconds)


def block_with(name: str, flags: str) -> Script:
  """The block, and no model, under other flags of XLA, in a folder of its own."""
  options = ("--rounds", "6", "--seconds", "5", "--variants", "delayed", "current")
  command = (str(HERE / "block.py"), "--out", f"{{out}}/{name}", *options)
  return Script(name=name, command=command, seconds=60, flags=flags)


TRAIN = ("--preset", "h200", "--remat", "--steps", "120")  # a billion parameters, for a minute
TINY_TRAIN = ("--preset", "micro", "--steps", "20", "--explain", "none")


def training(*options: str) -> Script:
  """The benchmark that compares losses."""
  fixed = ("--checkpoint-every", "0", "--out", "{out}/train_lm")
  command = (str(HERE / "train_lm.py"), *options, *fixed)
  return Script(name="train_lm", command=command, seconds=170)


BLOCK = ("delayed", "current", "rowwise", "delayed, fused", "flax.linen.fp8_ops")
TESTS = Script(
  name="tests",
  command=(
    "-m",
    "pytest",
    "-q",
    "-n",
    "8",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:benchmark",
    "tests/gpu",
  ),
  seconds=90,
  environment=SHARED,
  flags="",
)
SCRIPTS = (
  benchmark("card", 50),
  TESTS,
  benchmark("gemm", 120, "--seconds", "60", "--rounds", "8"),
  benchmark("block", 130, "--seconds", "50", "--rounds", "6", "--variants", *BLOCK),
  benchmark("kernel_times", 80, "--seconds", "70"),
  benchmark("step", 150, "--seconds", "70", "--rounds", "6"),
  benchmark("against_torchao", 130, "--seconds", "110"),
  training(*TRAIN),
  benchmark("crossover", 105, "--seconds", "70"),
  block_with("block_default_flags", ""),
  block_with("block_latency_hiding", f"{NO_TRITON} --xla_gpu_enable_latency_hiding_scheduler=true"),
  block_with("block_without_command_buffers", f"{NO_TRITON} --xla_gpu_enable_command_buffer="),
)


def tiny(script: Script) -> Script:
  """The same in small, on any device, to test the script; the tests as they are."""
  if script.name == "train_lm":
    return training(*TINY_TRAIN)
  added = () if script is TESTS else ("--tiny", "--rounds", "2", "--repeat", "2")
  return dataclasses.replace(script, command=(*script.command, *added), environment={})


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a script ended.

  Attributes:
    name: of the script.
    status: ``"done"``, or why not.
    seconds: that it took.
    failed: whether it should have ended otherwise.
  """

  name: str
  status: str
  seconds: float = 0.0
  failed: bool = False


def gpu_names() -> list[str]:
  """The GPUs of this machine, by NVIDIA's tool: this process must not start JAX on any."""
  command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
  try:
    found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
  except (OSError, subprocess.SubprocessError):
    return []
  return found.stdout.split("\n")[:-1]


def environment_of(script: Script, out: Path) -> dict[str, str]:
  """The package is found beside the benchmarks; XLA remembers which kernels of GEMMs were best."""
  paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
  tuned = out / ".autotuned"
  tuned.mkdir(exist_ok=True)
  flags = f"--xla_gpu_per_fusion_autotune_cache_dir={tuned} {script.flags}"
  found = {
    "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    "PYTHONUNBUFFERED": "1",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
  }
  return {**os.environ, **found, **script.environment}


def run(script: Script, out: Path, left: float, log: TextIO) -> Outcome:
  """Runs a script until it ends or its time is up."""
  limit = min(script.seconds, left)
  if limit < 1:
    return Outcome(script.name, "left out: the time was up", failed=True)
  command = [sys.executable, *(part.format(out=out) for part in script.command)]
  start = time.monotonic()
  child = subprocess.Popen(
    command,
    cwd=ROOT,
    env=environment_of(script, out),
    stdout=log,
    stderr=subprocess.STDOUT,
    start_new_session=True,
  )
  try:
    code = child.wait(limit)
  except subprocess.TimeoutExpired:
    stop(child)
    return Outcome(script.name, f"stopped after {limit:.0f} s", limit, failed=True)
  status = "done" if code == 0 else f"failed with exit code {code}"
  return Outcome(script.name, status, time.monotonic() - start, failed=code != 0)


def stop(child: subprocess.Popen[bytes]) -> None:
  """Ends a script and the processes that it started."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(child.pid, signal.SIGKILL)
  child.wait()


def run_all(
  scripts: Sequence[Script], out: Path, seconds: float, console: Console
) -> list[Outcome]:
  """Runs scripts one after the other, and says how each ended."""
  out.mkdir(parents=True, exist_ok=True)
  (out / "run_all.log").write_text("")
  end, outcomes = time.monotonic() + seconds, list[Outcome]()
  for script in scripts:
    with (out / f".{script.name}.log").open("w+") as log:
      outcome = run(script, out, end - time.monotonic(), log)
      log.seek(0)
      printed = log.read()
    (out / f".{script.name}.log").unlink()
    with (out / "run_all.log").open("a") as whole:
      whole.write(f"==== {script.name}: {outcome.status}\n{printed}\n")
    said = printed.splitlines()[-15:] if outcome.failed else []
    line = f"{script.name}: {outcome.status}, {outcome.seconds:.0f} s"
    console.print("\n".join([line, *said]), highlight=False, markup=False, soft_wrap=True)
    outcomes.append(outcome)
  return outcomes


def gemm_figures(content: Mapping[str, Any]) -> dict[str, float]:
  """Means over layers, and each layer's bare GEMMs."""
  return {
    f"{group}: {name}": each["geometric_mean"]
    for group, variants in content["summary"].items()
    for name, each in variants.items()
  } | {
    f"{layer}: bare GEMMs": each["speedup"]["median"]
    for layer, each in content.get("bare_sums", {}).items()
  }


def block_figures(content: Mapping[str, Any]) -> dict[str, float]:
  """Speed and peak memory, of the block and of the model."""
  found = {}
  for kind, variants in content["found"].items():
    for name, each in variants.items():
      found[f"{kind}, {name}: speed"] = each["speedup"]["median"]
      found[f"{kind}, {name}: peak memory"] = each["peak_to_bf16"]
  return found


def card_figures(content: Mapping[str, Any]) -> dict[str, float]:
  """Rates of GEMMs and memory."""
  rates = {name: each["tflops"]["median"] for name, each in content.get("gemms", {}).items()}
  found = {f"{name}: TFLOP/s": rate for name, rate in rates.items()}
  if "bandwidth" in content:
    found["memory: TB/s"] = content["bandwidth"]["bytes_per_second"]["median"] / 1e12
  return found


def crossover_figures(content: Mapping[str, Any]) -> dict[str, float | None]:
  """The rule of each recipe, and the worst speed with it."""
  found = {}
  for recipe, each in content["rules"].items():
    found[f"{recipe}: min_kernel_size"] = each["min_kernel_size"]
    found[f"{recipe}: worst speed with it"] = each["worst_with_rule"]
  return found


FIGURES = {
  "card": card_figures,
  "gemm": gemm_figures,
  "block": block_figures,
  "step": block_figures,
  "crossover": crossover_figures,
}


def written(name: str, out: Path) -> tuple[Path, str]:
  """The JSON that a script writes, and what kind of figures it has."""
  own = out / name / "block.json"
  return (own, "block") if own.exists() else (out / f"{name}.json", name)


def summarize(outcomes: Sequence[Outcome], out: Path, since: float) -> dict[str, Any]:
  """The figures of all JSON that this run has written, a stopped script's too."""
  figures, environments = {}, {}
  for outcome in outcomes:
    path, kind = written(outcome.name, out)
    if not path.exists() or path.stat().st_mtime < since:
      continue
    content = json.loads(path.read_text())
    environments[outcome.name] = content.get("environment")
    if kind in FIGURES:
      figures[outcome.name] = FIGURES[kind](content)
  return {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "gpus": gpu_names(),
    "scripts": [dataclasses.asdict(outcome) for outcome in outcomes],
    "figures": figures,
    "environments": environments,
  }


def table(summary: Mapping[str, Any]) -> Table:
  """One row a figure; speeds and memory have BF16 as 1."""
  grid = Table(title=f"FP8 beside BF16 = 1, {', '.join(summary['gpus']) or 'no GPU'}")
  grid.add_column("script")
  grid.add_column("")
  grid.add_column("figure", justify="right")
  for name, figures in summary["figures"].items():
    for index, (label, value) in enumerate(figures.items()):
      shown = "none" if value is None else f"{value:,.3f}" if value < 100 else f"{value:,.0f}"
      grid.add_row("" if index else name, label, shown, end_section=index == len(figures) - 1)
  return grid


def main() -> None:
  """Runs the benchmarks; the exit code is 1 if one failed."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", type=Path, required=True, help="folder of JSON and pictures")
  parser.add_argument("--seconds", type=float, default=TOTAL, help="after which all is stopped")
  named = {script.name: script for script in SCRIPTS}
  parser.add_argument(
    "--only", nargs="+", choices=named, default=list(named), help="some, in order"
  )
  parser.add_argument("--tiny", action="store_true", help="small shapes on any device: a test")
  arguments = parser.parse_args()
  if not arguments.tiny and not gpu_names():
    parser.exit(2, "run_all: needs an NVIDIA GPU; nvidia-smi finds none on this machine.\n")
  console, since, scripts = Console(), time.time(), [named[name] for name in arguments.only]
  scripts = [tiny(script) for script in scripts] if arguments.tiny else scripts
  outcomes = run_all(scripts, arguments.out.resolve(), arguments.seconds, console)
  summary = summarize(outcomes, arguments.out, since)
  write_text(arguments.out / "summary.json", json.dumps(summary, indent=1) + "\n")
  if summary["figures"]:
    console.print(table(summary))
  sys.exit(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
  main()
