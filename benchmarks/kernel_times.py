"""Where does the time of a Transformer block go on the GPU, kernel by kernel?

    python benchmarks/kernel_times.py        # needs an H100 or H200; about a minute

Traces a few steps of ``block.py``'s block and its loss with JAX's profiler, in each variant, and
sets each kernel's time beside the roofline that ``fp8.explain`` gives it:

    ratio = measured seconds / max(FLOPs / peak rate, bytes / memory bandwidth)

Kernels are summed by what they are for (FP8 GEMM, quantize, transpose, ...). ``idle`` is the time
in which no kernel runs. Command buffers are switched off: the profiler cannot name kernels in them.
"""

import os
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

import flax_fp8 as fp8
from block import attention, program
from flax_fp8.explain.roofline import kernel_seconds
from harness import output, timed
from harness.compiling import MIB, Kept
from harness.options import Options, on_gpu
from harness.programs import Arrays, Program
from harness.sizes import llama
from harness.table import Column, print_table
from harness.variants import VARIANTS

REPEAT = 3
OTHER = "not in the report"
LARGEST = 12


class Event(NamedTuple):
  """One run of a kernel on the GPU."""

  op: str  # the instruction of the compiled program that launched it; empty if the trace has none
  kernel: str  # its own name
  start: float  # nanoseconds
  duration: float  # nanoseconds


def read_trace(folder: Path) -> list[Event]:
  """The kernels of a trace, from the first GPU's streams."""
  (path,) = folder.glob("**/*.xplane.pb")
  profile: Any = jax.profiler.ProfileData.from_file(str(path))
  planes = [plane for plane in profile.planes if re.fullmatch(r"/device:GPU:\d+", plane.name)]
  lines = [line for plane in planes[:1] for line in plane.lines if line.name.startswith("Stream")]
  return [read_event(event) for line in lines for event in line.events]


def read_event(event: Any) -> Event:
  op = dict(event.stats).get("hlo_op", "")
  return Event(str(op), event.name, event.start_ns, event.duration_ns)


def busy(events: Iterable[Event]) -> tuple[float, float]:
  """Nanoseconds in which some kernel runs, and those from the first kernel to the last."""
  in_order = sorted(events, key=lambda event: event.start)
  total, first = 0.0, in_order[0].start if in_order else 0.0
  end = first
  for event in in_order:
    total += max(0.0, event.start + event.duration - max(end, event.start))
    end = max(end, event.start + event.duration)
  return total, end - first


def compile_program(name: str, made: Program) -> tuple[fp8.Report, Any]:
  """The report of a program, and the program; on a CPU the report is for a described GPU."""
  kept: Any = Kept(made.fn)
  if on_gpu():
    return fp8.explain(kept, *made.shapes, name=name), kept
  kept.lower(*made.shapes).compile()
  return fp8.explain(made.fn, *made.shapes, name=name, target="h100"), kept


def trace(compiled: Any, shapes: Any) -> list[Event]:
  """Runs a program twice, and traces the third run."""
  arguments = Arrays().fill(shapes)
  for _ in range(2):
    jax.block_until_ready(compiled(*arguments))
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready(compiled(*arguments))
    return read_trace(Path(folder))


def compare(report: fp8.Report, events: Sequence[Event], repeat: int) -> dict[str, Any]:
  """Sets what was measured beside the roofline, in milliseconds of one step."""
  ms = lambda nanoseconds: nanoseconds / 1e6 / repeat
  target = report.target
  measured: defaultdict[str, float] = defaultdict(float)
  for event in events:
    measured[event.op] += event.duration
  kernels: list[dict[str, Any]] = [
    {
      "name": kernel.name,
      "class": kernel.kind.value,
      "times": kernel.times / repeat,
      "mib": (kernel.read + kernel.written) / MIB,
      "gflop": kernel.flops / 1e9,
      "ms": ms(measured.pop(kernel.name, 0.0)),
      "roofline_ms": 1e3 * kernel_seconds(kernel, target) / repeat if target else None,
    }
    for kernel in report.kernels
  ]
  kernels += [{"name": op, "class": OTHER, "ms": ms(time)} for op, time in measured.items()]
  working, span = busy(events)
  return {
    "ms": ms(span),
    "idle_ms": ms(span - working),
    "launches": len(events) / repeat,
    "classes": by_class(kernels),
    "kernels": sorted(kernels, key=lambda each: -each["ms"]),
    "symbols": symbols(events, repeat),
  }


def by_class(kernels: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
  """Measured and roofline milliseconds of each class."""
  found: dict[str, dict[str, float]] = {}
  for each in kernels:
    total = found.setdefault(each["class"], {"ms": 0.0, "roofline_ms": 0.0, "times": 0.0})
    for key in total:
      total[key] += each.get(key) or 0.0
  return found


def symbols(events: Iterable[Event], repeat: int) -> list[dict[str, Any]]:
  """The kernels that an instruction launched, by their own names, for those of libraries."""
  times: defaultdict[tuple[str, str], float] = defaultdict(float)
  for event in events:
    times[event.op, event.kernel] += event.duration
  return [
    {"op": op, "kernel": kernel[:200], "ms": time / 1e6 / repeat}
    for (op, kernel), time in sorted(times.items(), key=lambda item: -item[1])[:60]
  ]


def measure_all(options: Options, content: timed.Content, write: Callable[[], None]) -> None:
  """All variants, compiled together and traced one after the other."""
  end = time.monotonic() + options.seconds
  names = options.choose(VARIANTS)
  content |= {"attention": attention(), "found": {}, "left_out": []}
  programs = {name: program("block", *llama(options.tiny), name, REPEAT) for name in names}
  with ThreadPoolExecutor(options.threads) as pool:
    made = dict(zip(names, pool.map(compile_program, names, programs.values()), strict=True))
  for name, (report, kept) in made.items():
    if time.monotonic() > end:
      content["left_out"].append(name)
      continue
    events = trace(kept.compiled, programs[name].shapes)
    content["found"][name] = compare(report, events, REPEAT)
    write()


COLUMNS = (
  *(Column("class", "{class}", left=True), Column("times", "{times:.0f}")),
  *(Column("ms", "{ms:.3f}"), Column("roofline ms", "{roofline_ms:.3f}")),
  Column("ratio", lambda r: f"{r['ms'] / r['roofline_ms']:.2f}" if r["roofline_ms"] else "-"),
)


def show(content: Mapping[str, Any], console: Console) -> None:
  """Prints each variant's classes and its largest kernels outside of GEMMs."""
  for name, found in content["found"].items():
    title = f"{name}: {found['ms']:.3f} ms a step, {found['idle_ms']:.3f} ms of it idle"
    in_order = sorted(found["classes"].items(), key=lambda item: -item[1]["ms"])
    rows = [{"class": kind, **each} for kind, each in in_order]
    print_table(console, f"{title}, {found['launches']:.0f} kernels", COLUMNS, rows, None)
    for each in [each for each in found["kernels"] if "GEMM" not in each["class"]][:LARGEST]:
      times = f"{each['ms']:8.3f} ms  {each.get('mib', 0):8.1f} MiB"
      output.say(console, f"{times}  {each['class']}  {each['name']}")


def main() -> None:
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
  timed.script(__doc__, "kernel_times", measure_all, show)


if __name__ == "__main__":
  main()
