"""What every script does that measures a GPU: options, refusal, JSON, picture."""

import argparse
import json
import os
import pkgutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from flax_fp8.capability import capability
from lm.files import whole_file, write_text
from lm.report import environment
from timed.compiling import on_gpu
from timed.options import Options

RESULTS = Path(__file__).resolve().parents[1] / "results"
NO_MEASUREMENT = "no measurement: small shapes, to test the script"
NVIDIA_SMI = "name,driver_version,power.limit,clocks.max.sm,memory.total"


def read_options(doc: str | None, name: str) -> Options:
  """Reads the command line, and refuses to time anything but a GPU with FP8."""
  parser = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", type=Path, default=RESULTS, help="folder of JSON and picture")
  parser.add_argument("--rounds", type=positive, default=10, help="each runs every variant once")
  parser.add_argument("--repeat", type=positive, default=10, help="steps in a run, at least")
  parser.add_argument("--tiny", action="store_true", help="small shapes on any device: a test")
  threads = min(os.cpu_count() or 1, 8)
  help_threads = "that compile; with 1, nothing disturbs XLA as it tries algorithms out"
  parser.add_argument("--threads", type=positive, default=threads, help=help_threads)
  parser.add_argument("--seconds", type=float, default=3600, help="then nothing new begins")
  parser.add_argument("--replot", action="store_true", help="draw the JSON in --out, and end")
  parser.add_argument("--variants", nargs="+", default=[], help="some, by name, besides BF16")
  options = Options(**vars(parser.parse_args()))
  if not options.tiny and not options.replot and (reason := no_gpu()):
    parser.exit(2, f"{name}: {reason} --tiny runs small shapes here, as a test of the script.\n")
  return options


def positive(text: str) -> int:
  """A number of rounds, say."""
  if (value := int(text)) < 1:
    raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
  return value


def no_gpu() -> str:
  """Why nothing can be timed here; empty where it can."""
  device = jax.devices()[0]
  if not on_gpu():
    return (
      f"needs a GPU that multiplies FP8; got {device.device_kind!r}, and the time that emulation "
      "takes would say nothing."
    )
  able, reason = capability(device)
  return "" if able else f"needs a GPU that multiplies FP8; got {device.device_kind!r}: {reason}."


def driver() -> dict[str, str]:
  """What nvidia-smi says of the GPU; empty where it does not."""
  command = ["nvidia-smi", f"--query-gpu={NVIDIA_SMI}", "--format=csv,noheader"]
  try:
    found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
  except (OSError, subprocess.SubprocessError):
    return {}
  values = found.splitlines()[0].split(", ") if found.strip() else []
  return dict(zip(NVIDIA_SMI.split(","), values, strict=False))


def xla_flags() -> str:
  """XLA's flags, but for the folder of this machine in which it keeps what it tried."""
  flags = os.getenv("XLA_FLAGS", "").split()
  return " ".join(flag for flag in flags if "autotune_cache_dir" not in flag)


def document(options: Options, **results: Any) -> dict[str, Any]:
  """What the JSON says besides results: where, when and how."""
  timed = on_gpu() and not options.tiny
  return {
    "measurement": timed,
    "note": "" if timed else NO_MEASUREMENT,
    "environment": environment() | {"nvidia_smi": driver(), "xla_flags": xla_flags()},
    "method": {"rounds": options.rounds, "repeat": options.repeat},
    "failures": list(options.failures),
    **results,
  }


def write_json(folder: Path, name: str, content: Mapping[str, Any]) -> None:
  """Writes ``NAME.json``, whole or not at all."""
  write_text(folder / f"{name}.json", json.dumps(content, indent=1) + "\n")


def write_plot(
  folder: Path, name: str, draw: Callable[[Any, Any], None], content: Any, console: Console
) -> None:
  """Draws ``NAME.png`` if matplotlib is there, and else says how to draw it later."""
  try:
    figure = pkgutil.resolve_name("matplotlib.figure:Figure")(layout="constrained")
  except ImportError:
    line = f"No picture: matplotlib is not installed. Later: {name}.py --replot --out {folder}"
    console.print(line, highlight=False, soft_wrap=True)
    return
  draw(figure, content)
  if content["note"]:
    figure.suptitle(content["note"], fontsize="small")
  with whole_file(folder / f"{name}.png") as beside:
    figure.savefig(beside, dpi=120)


def replot(folder: Path, name: str, draw: Callable[[Any, Any], None], console: Console) -> None:
  """Draws from JSON."""
  content = json.loads((folder / f"{name}.json").read_text())
  write_plot(folder, name, draw, content, console)


def console() -> Console:
  """A console that is wide enough for the tables where it is no terminal."""
  made = Console()
  return made if made.is_terminal else Console(width=120)


def print_note(content: Mapping[str, Any], console: Console) -> None:
  """Says so where the numbers are no measurement."""
  if content["note"]:
    console.print(content["note"], highlight=False)


def table(title: str, left: str, content: Mapping[str, Mapping[str, Any]]) -> Table:
  """One row a program of each case."""
  grid = Table(title=title)
  grid.add_column(left)
  grid.add_column("")
  for heading in ("ms", "TFLOP/s", "speedup", "quartiles", "FP8 GEMMs", "peak MiB"):
    grid.add_column(heading, justify="right")
  for case, programs in content.items():
    for index, (name, each) in enumerate(programs.items()):
      last = index == len(programs) - 1
      grid.add_row("" if index else case, name, *cells(each), end_section=last)
  return grid


def cells(each: Mapping[str, Any]) -> list[str]:
  """The numbers of a row; a mark where a GEMM is not what it should be."""
  speedup = each["speedup"]
  gemms = f"{each['fp8_gemms']:g}/{each['gemms']:g}" if "gemms" in each else "-"
  return [
    f"{each['ms']['median']:.3f}",
    f"{each['tflops']['median']:,.0f}",
    f"{speedup['median']:.3f}",
    f"{speedup['low']:.3f}-{speedup['high']:.3f}",
    gemms + (" (!)" if each["problems"] else ""),
    f"{each['peak_mib']:,.0f}" if "peak_mib" in each else "-",
  ]


def print_problems(
  failures: Iterable[str], content: Mapping[str, Mapping[str, Any]], console: Console
) -> None:
  """Prints what did not run, and each GEMM that is not what was asked for."""
  for failure in failures:
    console.print(f"FAILED {failure}", highlight=False, markup=False, soft_wrap=True)
  for case, programs in content.items():
    for name, each in programs.items():
      for problem in each["problems"]:
        line = f"(!) {case}, {name}: {problem}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
