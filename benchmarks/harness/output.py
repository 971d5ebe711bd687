"""Files that benchmarks write: JSON with its environment, complete or absent."""

import argparse
import datetime
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
COMPILED = "compiled, not timed"
NO_MEASUREMENT = "no measurement: small shapes, to test the script"
NVIDIA_SMI = "name,driver_version,power.limit,clocks.max.sm,memory.total"


def make_parser(doc: str | None) -> argparse.ArgumentParser:
  """A command line with ``--out`` and ``--redraw``; its help is the module's docstring."""
  raw = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
  parser.add_argument("--out", type=Path, default=RESULTS, help="folder of JSON and plot")
  redraw = "draw the JSON in --out, measure nothing"
  parser.add_argument("--redraw", "--replot", action="store_true", help=redraw)
  return parser


def positive(text: str) -> int:
  """Parses an integer that must be at least 1."""
  if (value := int(text)) < 1:
    raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
  return value


def make_console(width: int = 120) -> Console:
  """A console, wide enough for tables where it is not a terminal."""
  console = Console()
  return console if console.is_terminal else Console(width=width)


def say(console: Console, *lines: str) -> None:
  """Prints lines as they are: no markup, no wrapping."""
  for line in lines:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def say_what_is_missing(console: Console, content: Mapping[str, Any]) -> None:
  """Prints what was left out, and what failed."""
  say(console, *(f"left out, the time was up: {name}" for name in content["left_out"]))
  say(console, *(f"FAILED {failure}" for failure in content["failures"]))


@contextmanager
def whole_file(path: Path) -> Generator[Path]:
  """Gives a path to write to, and renames it to ``path`` when the block ends without an error."""
  path.parent.mkdir(parents=True, exist_ok=True)
  beside = path.with_name(f".part-{path.name}")
  yield beside
  beside.replace(path)


def write_text(path: Path, text: str) -> None:
  with whole_file(path) as beside:
    beside.write_text(text)


def write_json(folder: Path, name: str, content: Mapping[str, Any]) -> None:
  write_text(folder / f"{name}.json", json.dumps(content, indent=1) + "\n")


def read_json(folder: Path, name: str) -> dict[str, Any]:
  return json.loads((folder / f"{name}.json").read_text())


def redraw(folder: Path, name: str, draw: Callable[[Any], Any]) -> None:
  """Draws ``NAME.png`` from ``NAME.json``, with the Matplotlib figure that ``draw`` returns."""
  save(draw(read_json(folder, name)), folder, name)


def save(figure: Any, folder: Path, name: str) -> None:
  with whole_file(folder / f"{name}.png") as beside:
    figure.savefig(beside, dpi=120)


def command() -> str:
  """The command that runs, without ``--out`` and folders of this machine."""
  script = Path(sys.argv[0]).resolve()
  path = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
  words = iter(sys.argv[1:])
  kept = [word for word in words if word != "--out" or not next(words, "")]
  return shlex.join(["python", str(path), *(word for word in kept if word)])


def host() -> dict[str, str]:
  """When, by which command, and with which Python something was measured."""
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  return {"date": now, "command": command(), "python": platform.python_version()}


def nvidia_smi() -> dict[str, str]:
  """What nvidia-smi says about the GPU; empty without a GPU."""
  query = ["nvidia-smi", f"--query-gpu={NVIDIA_SMI}", "--format=csv,noheader"]
  try:
    found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
  except (OSError, subprocess.SubprocessError):
    return {}
  values = found.splitlines()[0].split(", ") if found.strip() else []
  return dict(zip(NVIDIA_SMI.split(","), values, strict=False))
