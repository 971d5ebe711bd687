"""How do time and memory grow with tokens, widths, layers and the length of the history?

    python benchmarks/growth.py              # no GPU needed; about eight minutes on one CPU core

A layer of 4096 by 4096 and 8192 tokens, one size changed at a time, and stacks of the blocks of
``traffic.py`` under ``nn.scan``, forward and backward, all in bfloat16, compiled for a described
GPU in BF16, with ``flax.linen.fp8_ops`` and with ``flax_fp8``; never run. ``ms`` is a roofline, a
lower bound by data-sheet rates, without launches; ``MiB`` is temporary memory.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
from flax.linen import fp8_ops as flax_fp8_ops
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import flax_fp8 as fp8
from flax_fp8.doctor import allow_missing_cuda
from lm.files import write_text
from lm.report import environment
from recipe_cost import figures
from traffic import RESULTS, Case, Stack, dense, explain_case

NAMES = ("BF16", "flax.linen.fp8_ops", "flax_fp8")


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of a program.

  Attributes:
    tokens: rows of the input, M.
    width: of the input, K.
    features: of the result, N.
    layers: None for one layer, else blocks of a stack.
    history: amaxes that delayed scaling keeps.
  """

  tokens: int = 8192
  width: int = 4096
  features: int = 4096
  layers: int | None = None
  history: int = 1024


LAYER = Sizes()
SWEEPS: dict[str, list[Sizes]] = {
  "tokens": [dataclasses.replace(LAYER, tokens=2**n) for n in range(10, 17)],
  "width": [dataclasses.replace(LAYER, width=2**n) for n in range(9, 15)],
  "features": [dataclasses.replace(LAYER, features=2**n) for n in range(9, 15)],
  "layers": [Sizes(width=2048, layers=2**n) for n in range(6)],
  "history": [dataclasses.replace(LAYER, history=length) for length in (1, 16, 256, 1024, 16384)],
}


def module(name: str, history: int) -> Callable[..., Any] | None:
  """The class of a variant's contractions, with histories of a length."""
  if name == "flax_fp8":
    return fp8.DelayedScaling(amax_history_len=history).dot_general_cls
  if name == "flax.linen.fp8_ops":
    return functools.partial(flax_fp8_ops.Fp8DotGeneral, amax_history_length=history)
  return None


def make_model(sizes: Sizes, name: str, _: Any) -> nn.Module:
  """Makes the layer, or the stack."""
  cls = module(name, sizes.history)
  if sizes.layers is None:
    return dense(sizes.features, cls)
  return Stack(cls, scan=True, length=sizes.layers)


def measure(sweeps: dict[str, list[Sizes]], target: str, console: Console) -> dict[str, Any]:
  """Compiles every size of every sweep in every variant."""
  found: dict[str, Any] = {}
  for sweep, all_sizes in sweeps.items():
    for sizes in all_sizes:
      point: dict[str, Any] = {"size": getattr(sizes, sweep)}
      for name in NAMES:
        with console.status(f"{sweep} {point['size']}, {name}"):
          case = Case(functools.partial(make_model, sizes, name), sizes.tokens, sizes.width)
          point[name] = figures(explain_case(case, name, target))
      assert point["BF16"]["operands"] == ["bf16"]
      found.setdefault(sweep, []).append(point)
  return found


def table(found: dict[str, Any], target: str) -> Table:
  """One row a size."""
  grid = Table(title=f"Roofline and temporary memory over BF16's as compiled for {target.upper()}")
  headings = ("sweep", "size", *(f"{name}, {unit}" for unit in ("ms", "MiB") for name in NAMES[1:]))
  for heading in headings:
    grid.add_column(heading, justify="left" if heading == "sweep" else "right")
  for sweep, points in found.items():
    for point in points:
      ratios = [
        f"{point[name][key] / point['BF16'][key]:.2f}" if point["BF16"][key] >= 0.01 else "-"
        for key in ("roofline_ms", "temp_mib")
        for name in NAMES[1:]
      ]
      first, last = point is points[0], point is points[-1]
      grid.add_row(sweep if first else "", f"{point['size']:,}", *ratios, end_section=last)
  return grid


def draw(found: dict[str, Any]) -> Figure:
  """Draws milliseconds above and MiB below, against each size."""
  figure = Figure(figsize=(3.2 * len(found), 5.6), layout="constrained")
  grid = figure.subplots(2, len(found), squeeze=False)
  for column, (sweep, points) in enumerate(found.items()):
    for row, (key, unit) in enumerate((("roofline_ms", "roofline, ms"), ("temp_mib", "temp, MiB"))):
      axes = grid[row][column]
      for name in NAMES:
        axes.plot([p["size"] for p in points], [p[name][key] for p in points], "o-", label=name)
      axes.set_xscale("log", base=2)
      axes.set(xlabel=sweep, ylim=(0, None), ylabel=unit if column == 0 else "")
  grid[0][0].legend(fontsize="small")
  return figure


def main() -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--target", default="h100")
  parser.add_argument("--sweeps", nargs="+", default=list(SWEEPS), choices=SWEEPS)
  parser.add_argument("--out", type=Path, default=RESULTS, help="folder of JSON and picture")
  arguments = parser.parse_args()
  allow_missing_cuda()
  console = Console()
  found = measure({name: SWEEPS[name] for name in arguments.sweeps}, arguments.target, console)
  console.print(table(found, arguments.target))
  arguments.out.mkdir(parents=True, exist_ok=True)
  result = {"environment": environment(), "target": arguments.target, "sweeps": found}
  write_text(arguments.out / "growth.json", json.dumps(result, indent=2) + "\n")
  draw(found).savefig(arguments.out / "growth.png", dpi=120)


if __name__ == "__main__":
  main()
