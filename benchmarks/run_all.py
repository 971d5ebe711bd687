"""What does FP8 bring on the GPU of this machine, in nine minutes?

    python benchmarks/run_all.py --out DIR   # on an H100 or H200

Runs ``gemm.py``, ``block.py`` and ``crossover.py`` one after the other on the GPU, the most
important first, and beside them, or after them on a machine of few cores, ``memory.py`` and
``traffic.py``, which compile for a described H100 and need no GPU. Each is a process of its own
with a time limit, and writes what it finds as it goes. At the end ``summary.json`` and a table have
the figures of the timed ones; ``run_all.log`` has what all printed. Without a GPU, those that need
none run.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from lm.files import write_text

HERE = Path(__file__).resolve().parent
TOTAL = 520.0  # seconds, of all
CORES = 8  # from which on compiling beside the timed scripts does not disturb them


@dataclasses.dataclass(frozen=True)
class Script:
  """A benchmark.

  Attributes:
    path: of the script.
    options: besides ``--out``.
    seconds: after which it is stopped.
    needs_gpu: whether it times a GPU.
  """

  path: Path
  options: tuple[str, ...]
  seconds: float
  needs_gpu: bool

  @property
  def name(self) -> str:
    """As its JSON is called."""
    return self.path.stem


SCRIPTS = (
  Script(HERE / "gemm.py", ("--seconds", "140"), 200, True),
  Script(HERE / "block.py", ("--seconds", "90", "--rounds", "8"), 210, True),
  Script(HERE / "crossover.py", ("--seconds", "70"), 105, True),
  Script(HERE / "memory.py", (), 300, False),
  Script(HERE / "traffic.py", (), 400, False),
)


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


def environment_of(script: Script) -> dict[str, str]:
  """The package is found beside the benchmarks; what needs no GPU does not touch it."""
  paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
  found = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
  return os.environ | found | ({} if script.needs_gpu else {"JAX_PLATFORMS": "cpu"})


def run(script: Script, out: Path, left: float, log: TextIO) -> Outcome:
  """Runs a script until it ends or its time is up."""
  if not script.path.exists():
    return Outcome(script.name, "left out: there is no such script")
  limit = min(script.seconds, left)
  if limit < 1:
    return Outcome(script.name, "left out: the time was up", failed=True)
  command = [sys.executable, str(script.path), "--out", str(out), *script.options]
  start = time.monotonic()
  child = subprocess.Popen(
    command,
    env=environment_of(script),
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


def run_lane(scripts: Sequence[Script], out: Path, end: float, console: Console) -> list[Outcome]:
  """Runs scripts one after the other, and says how each ended."""
  outcomes: list[Outcome] = []
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


def run_all(
  scripts: Sequence[Script], out: Path, seconds: float, console: Console, *, beside: bool
) -> list[Outcome]:
  """Runs the scripts that need a GPU and those that do not, in two lanes or in one."""
  out.mkdir(parents=True, exist_ok=True)
  (out / "run_all.log").write_text("")
  end = time.monotonic() + seconds
  timed = [script for script in scripts if script.needs_gpu]
  compiled = [script for script in scripts if not script.needs_gpu]
  lanes = [timed, compiled] if beside else [[*timed, *compiled]]
  with ThreadPoolExecutor(len(lanes)) as pool:
    done = pool.map(lambda lane: run_lane(lane, out, end, console), lanes)
    return [outcome for lane in done for outcome in lane]


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


def crossover_figures(content: Mapping[str, Any]) -> dict[str, float | None]:
  """The rule of each recipe, and the worst speed with it."""
  found = {}
  for recipe, each in content["rules"].items():
    found[f"{recipe}: min_kernel_size"] = each["min_kernel_size"]
    found[f"{recipe}: worst speed with it"] = each["worst_with_rule"]
  return found


FIGURES = {"gemm": gemm_figures, "block": block_figures, "crossover": crossover_figures}


def summarize(outcomes: Sequence[Outcome], out: Path, since: float) -> dict[str, Any]:
  """The figures of all JSON that this run has written, a stopped script's too."""
  figures, environments = {}, {}
  for outcome in outcomes:
    path = out / f"{outcome.name}.json"
    if not path.exists() or path.stat().st_mtime < since:
      continue
    content = json.loads(path.read_text())
    environments[outcome.name] = content.get("environment")
    if outcome.name in FIGURES:
      figures[outcome.name] = FIGURES[outcome.name](content)
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
  arguments = parser.parse_args()
  console, since, gpus = Console(), time.time(), gpu_names()
  scripts = [script for script in SCRIPTS if gpus or not script.needs_gpu]
  for script in SCRIPTS:
    if script not in scripts:
      console.print(f"{script.name}: left out, it needs a GPU and there is none")
  beside = (os.cpu_count() or 1) >= CORES
  outcomes = run_all(scripts, arguments.out, arguments.seconds, console, beside=beside)
  summary = summarize(outcomes, arguments.out, since)
  write_text(arguments.out / "summary.json", json.dumps(summary, indent=1) + "\n")
  if summary["figures"]:
    console.print(table(summary))
  sys.exit(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
  main()
