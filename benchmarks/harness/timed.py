"""A script that times a GPU: it compiles groups of programs, runs each case's in turn, reports.

    def groups(options): return {"layers": lambda: {"MLP up": {"BF16": program, ...}, ...}}
    timed.run(__doc__, "gemm", groups, summarize, draw)

JSON has ``found``, figures by case and variant, and ``summary``, a label and a number each.
"""

import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np
from rich.console import Console

from harness import clock, output, plot
from harness.compiling import Ready, prepare_all
from harness.environment import environment
from harness.names import BF16, base, label
from harness.options import Options, on_gpu, read_options
from harness.programs import Arrays, Program
from harness.table import CASE, TIMES, Column, Row, print_table, rows_of

Content: TypeAlias = dict[str, Any]
Found: TypeAlias = Mapping[str, Mapping[str, Any]]  # figures by case and variant
Show: TypeAlias = Callable[[Content, Console], None]
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
  arrays: Callable[[Options], Arrays] = lambda options: Arrays(),
  others: Callable[[Options], Content] = lambda options: {},
  show: Show | None = None,
) -> None:
  """Is all of a script that times programs: ``groups`` makes them, the most important first.

  ``summarize`` says what follows from the figures so far. ``arrays`` makes the arguments of a
  group's programs. ``others`` is what else the JSON has, perhaps with a ``summary`` of its own.
  """

  def measure_all(options: Options, content: Content, write: Callable[[], None]) -> None:
    content |= {"found": {}, "summary": {}, "left_out": [], **others(options)}
    end = time.monotonic() + options.seconds
    for group, make in groups(options).items():
      if time.monotonic() > end:
        content["left_out"].append(group)
        continue
      for case, found in measure_group(make(), options, arrays(options)):
        content["found"][case] = found
        content["summary"] |= summarize(content["found"])
        write()

  script(doc, name, measure_all, show or show_found, draw)


def script(
  doc: str | None,
  name: str,
  measure_all: Callable[[Options, Content, Callable[[], None]], None],
  show: Show,
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
  output.say_what_is_missing(console, content)
  if draw:
    output.redraw(options.out, name, draw)


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


def measure_group(
  cases: Mapping[str, Mapping[str, Program]], options: Options, arrays: Arrays
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Compiles all programs of a group, then yields each case and its figures."""
  programs = {(case, name): each for case, own in cases.items() for name, each in own.items()}
  ready = prepare_all(programs, options)
  for case in cases:
    own = {name: each for (of, name), each in ready.items() if of == case}
    yield case, measure(own, options, arrays)


def measure(ready: Mapping[str, Ready], options: Options, arrays: Arrays) -> dict[str, Any]:
  """Runs the programs of one case in turn, ``BF16`` among them.

  Returns:
    For each program: ms per step, TFLOP/s of its GEMMs, speedup over BF16 (all with quartiles), ms
    of each round, and what is known without running it. FP8 programs that do not run are left out,
    and noted in the options.
  """
  runs = dict[str, Callable[[], object]]()
  for name, each in ready.items():
    with options.noting(name, each.program.is_fp8):
      given = arrays.fill(each.program.shapes)
      run = functools.partial(
        lambda run, given: jax.block_until_ready(run(*given)), each.run, given
      )
      run()
      runs[name] = run
  times = clock.interleave(runs, options.rounds)
  per_step = {name: [t / ready[name].program.repeat for t in times[name]] for name in runs}
  found = dict[str, dict[str, Any]]()
  for name, seconds in per_step.items():
    program, known = ready[name].program, ready[name].figures
    own = found[name] = clock.figures(seconds, per_step[BF16], program.flops) | known
    own |= {"repeat": program.repeat, "flops": program.flops}
    own["tokens_per_second"] = 1e3 * program.tokens / own["ms"]["median"]
    own["peak_to_bf16"] = own["peak_mib"] / ready[BF16].figures["peak_mib"]
  return found


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
  """Draws a group of bars for each case: a figure of each variant that it has, with quartiles."""
  names = dict.fromkeys(name for each in found.values() for name in each if name == base(name))
  width = 0.9 / len(names)
  for index, name in enumerate(names):
    having = [number for number, each in enumerate(found.values()) if name in each]
    values = [each[name][key] for each in found.values() if name in each]
    spreads = [v if isinstance(v, dict) else clock.spread([v]) for v in values]
    middle, low, high = ([each[at] for each in spreads] for at in ("median", "low", "high"))
    ends = [np.subtract(middle, low), np.subtract(high, middle)]
    places = np.array(having) + index * width
    axes.bar(places, middle, width, yerr=ends, color=plot.color(name), label=label(name))
  axes.axhline(1, color="black", linewidth=0.8)
  cases = [case.replace(": ", "\n") for case in found]
  axes.set_xticks(np.arange(len(found)) + 0.36, cases, fontsize="x-small")
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
