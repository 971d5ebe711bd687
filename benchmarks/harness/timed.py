"""A script that times a GPU: it compiles groups of programs, runs each case's in turn, reports.

    def groups(options): return {"layers": lambda: {"MLP up": {"BF16": program, ...}, ...}}
    timed.run(__doc__, "gemm", groups, summarize, draw)

JSON has ``found``, figures by case and variant, and ``summary``, a label and a number each.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
from rich.console import Console

from harness import clock, output, plot
from harness.compiling import MIB, BaselineError, Ready, prepare_all
from harness.environment import environment
from harness.names import BF16, base, label
from harness.options import Options, on_gpu, read_options
from harness.programs import Arrays, Program
from harness.table import CASE, TIMES, Column, Row, print_table, rows_of

Content: TypeAlias = dict[str, Any]
Found: TypeAlias = Mapping[str, Mapping[str, Any]]  # figures by case and variant
Draw: TypeAlias = Callable[[Mapping[str, Any]], Any]
# Names of groups, and what makes their programs by case and variant: compiled together.
Groups: TypeAlias = Mapping[str, Callable[[], Mapping[str, Mapping[str, Program]]]]


def run(
  doc: str | None,
  name: str,
  groups: Callable[[Options], Groups],
  summarize: Callable[[Found], Mapping[str, Any]],
  draw: Draw | None = None,
  *,
  arrays: Callable[[Options], Arrays] | None = None,
  others: Callable[[Options], Content] = lambda options: {},
  show: Callable[[Content, Console], None] | None = None,
) -> None:
  """Is all of a script that times programs.

  Args:
    doc: its docstring.
    name: of its JSON and plot.
    groups: its programs; the most important first.
    summarize: what follows from the figures so far.
    draw: draws the JSON.
    arrays: makes the arguments of a group's programs; None makes new ones for each case.
    others: what else the JSON has, perhaps with a ``summary`` of its own.
    show: prints the JSON; None for ``show_found``.
  """

  def measure_all(options: Options, content: Content, write: Callable[[], None]) -> None:
    content |= {"found": {}, "summary": {}, "left_out": [], **others(options)}
    deadline = clock.Deadline(options.seconds)
    for group, make in groups(options).items():
      if deadline.passed():
        content["left_out"].append(group)
        continue
      try:
        shared = arrays(options) if arrays else None
        for case, found in measure_group(make(), options, shared):
          content["found"][case] = found
          content["summary"] |= summarize(content["found"])
          write()
      except BaselineError:
        raise
      except Exception as error:
        options.fail(group, error)

  script(doc, name, measure_all, show or show_found, draw)


def script(
  doc: str | None,
  name: str,
  measure_all: Callable[[Options, Content, Callable[[], None]], None],
  show: Callable[[Content, Console], None],
  draw: Draw | None = None,
) -> None:
  """Reads the command line, measures, writes JSON as it grows, prints and draws it."""
  options, console = read_options(doc, name), output.make_console()
  if not options.redraw:
    content: Content = {}
    write = lambda: output.write_json(options.out, name, describe(options) | content)
    with console.status(name):
      measure_all(options, content, write)
    write()
  content = output.read_json(options.out, name)
  output.say(console, *filter(None, [content["note"]]))
  show(content, console)
  output.say(console, *(f"left out, the time was up: {part}" for part in content["left_out"]))
  output.say(console, *(f"FAILED {failure}" for failure in content["failures"]))
  if draw and content["found"]:
    draw_plot(options, name, draw, console)
  if not content["found"]:
    sys.exit(1)


def describe(options: Options) -> Content:
  """Where, when and how the numbers of the JSON were made."""
  measured = on_gpu() and not options.tiny
  flags = os.getenv("XLA_FLAGS", "").split()
  kept = " ".join(flag for flag in flags if "autotune_cache_dir" not in flag)  # a folder here
  return {
    "measurement": measured,
    "note": "" if measured else output.NO_MEASUREMENT,
    "environment": environment() | {"nvidia_smi": output.nvidia_smi(), "xla_flags": kept},
    "method": {"rounds": options.rounds, "repeat": options.repeat},
    "failures": options.failures,
  }


def draw_plot(options: Options, name: str, draw: Draw, console: Console) -> None:
  """Draws the JSON; without Matplotlib, prints how to draw it later."""
  try:
    output.redraw(options.out, name, draw)
  except ImportError:
    line = f"No plot: matplotlib is not installed. Later: {name}.py --redraw --out {options.out}"
    output.say(console, line)


def measure_group(
  cases: Mapping[str, Mapping[str, Program]], options: Options, arrays: Arrays | None
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Compiles all programs of a group, then yields each case and its figures."""
  programs = {(case, name): each for case, own in cases.items() for name, each in own.items()}
  ready = prepare_all(programs, options)
  for case in cases:
    own = {name: each for (of, name), each in ready.items() if of == case}
    yield case, measure(own, options, arrays)


def measure(
  ready: Mapping[str, Ready], options: Options, arrays: Arrays | None = None
) -> dict[str, Any]:
  """Runs the programs of one case in turn.

  Args:
    ready: the programs, ``BF16`` among them.
    options: the rounds. An FP8 program that does not run is noted there, and left out.
    arrays: makes the arguments; None makes new ones.

  Returns:
    For each program: ms per step, TFLOP/s of its GEMMs, speedup over BF16 (all with quartiles), ms
    of each round, and what is known without running it.
  """
  arrays = arrays or Arrays()
  given = {name: arrays.fill(each.program.shapes) for name, each in ready.items()}
  runs = {
    name: functools.partial(lambda name: jax.block_until_ready(ready[name].run(*given[name])), name)
    for name in ready
  }
  in_order = sorted(runs, key=lambda name: ready[name].figures.get("temp_mib", 0.0))
  allocated = {name: _allocated(name, runs[name], ready[name], options) for name in in_order}
  able = {name: run for name, run in runs.items() if allocated[name] is not None}
  times = clock.interleave(able, options.rounds)
  per_step = {name: [t / ready[name].program.repeat for t in times[name]] for name in able}
  found: dict[str, dict[str, Any]] = {
    name: clock.figures(per_step[name], per_step[BF16], ready[name].program.flops)
    | ready[name].figures
    | {"repeat": ready[name].program.repeat, "flops": ready[name].program.flops}
    | (allocated[name] or {})
    for name in able
  }
  for name, each in found.items():
    each["tokens_per_second"] = 1e3 * ready[name].program.tokens / each["ms"]["median"]
    if "peak_mib" in each:
      each["peak_to_bf16"] = each["peak_mib"] / found[BF16]["peak_mib"]
  return found


def _allocated(
  name: str, run: Callable[[], object], ready: Ready, options: Options
) -> dict[str, float] | None:
  """Runs a program once, and asks JAX's allocator what that took beside its arguments.

  Returns:
    ``allocated_mib``, of results and temporaries, where the peak so far was exceeded: programs come
    in the order of their temporaries. None if the program does not run; that is noted.
  """
  before = _allocator()
  try:
    run()
  except Exception as error:
    if not ready.program.is_fp8:
      raise
    options.fail(name, error)
    return None
  after = _allocator()
  if after.get("peak_bytes_in_use", 0) <= before.get("peak_bytes_in_use", 0):
    return {}
  return {"allocated_mib": (after["peak_bytes_in_use"] - before["bytes_in_use"]) / MIB}


def _allocator() -> dict[str, int]:
  return jax.devices()[0].memory_stats() or {}


def steps(flops: int, options: Options) -> int:
  return options.repeat if options.tiny else clock.steps(flops, options.repeat)


def gemms(row: Row) -> str:
  """FP8 GEMMs of all; a mark where a GEMM is not what it should be."""
  count = f"{row['fp8_gemms']:g}/{row['gemms']:g}" if "gemms" in row else "-"
  return count + (" (!)" if row.get("problems") else "")


VARIANT = Column("", lambda row: label(row["variant"]), left=True)
COLUMNS = (CASE, VARIANT, *TIMES, Column("FP8 GEMMs", gemms))


def show_found(content: Content, console: Console) -> None:
  """Prints all programs, each GEMM that is not what was asked for, and the summary."""
  rows = rows_of(content["found"])
  print_table(console, "Forward and backward, timed", COLUMNS, rows)
  lines = [f"(!) {r['case']}, {r['variant']}: {each}" for r in rows for each in r["problems"]]
  numbers = {name: each for name, each in content["summary"].items() if each is not None}
  output.say(console, *lines, *(f"{name}: {each:,.3f}" for name, each in numbers.items()))


def bars(axes: Any, found: Found, ylabel: str, key: str = "speedup") -> None:
  """Draws a group of bars for each case: a figure of each variant, with its quartiles."""
  names = [name for name in clock.in_all(found.values()) if name == base(name)]
  width = 0.9 / len(names)
  for index, name in enumerate(names):
    values = [each[name][key] for each in found.values()]
    spreads = [v if isinstance(v, dict) else {"median": v, "low": v, "high": v} for v in values]
    middle = [each["median"] for each in spreads]
    ends = [[each["median"] - each["low"] for each in spreads]]
    ends.append([each["high"] - each["median"] for each in spreads])
    places = [place + index * width for place in range(len(found))]
    axes.bar(places, middle, width, yerr=ends, color=plot.color(name), label=label(name))
  axes.axhline(1, color="black", linewidth=0.8)
  names = [case.replace(": ", "\n") for case in found]
  axes.set_xticks([place + 0.36 for place in range(len(found))], names, fontsize="x-small")
  axes.set_ylabel(ylabel)


def bar_plot(title: str, size: tuple[float, float]) -> Draw:
  """Makes what draws the speed of each variant and case; bare GEMMs are left out."""

  def draw(content: Mapping[str, Any]) -> Any:
    figure = plot.make_figure(title, content, size)
    found = {case: each for case, each in content["found"].items() if ", bare " not in case}
    bars(figure.subplots(), found, "speed, BF16 = 1")
    plot.legend(figure)
    return figure

  return draw


def models_summary(found: Found) -> dict[str, float]:
  """Speed, peak memory over BF16's and tokens per second of each case and variant."""
  keys = {"peak memory": "peak_to_bf16", "tokens/s": "tokens_per_second"}
  summary: dict[str, float] = {}
  for row in rows_of(found):
    name = f"{row['case']}, {row['variant']}"
    summary[f"{name}: speed"] = row["speedup"]["median"]
    summary |= {f"{name}: {what}": row[key] for what, key in keys.items() if key in row}
  return summary
