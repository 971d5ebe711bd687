"""From what size of a kernel on does a layer take no longer in FP8 than in BF16?

    python benchmarks/crossover.py           # needs an H100 or H200; about a minute

Square layers without bias, all in bfloat16, forward and backward, of several numbers of tokens. The
rule is that of ``fp8.Fp8Config(min_kernel_size=...)``: layers whose kernel has fewer elements stay
BF16. The smallest size is chosen, of those measured, from which on no layer is slower than BF16 in
the odd rounds; the even rounds tell the worst speedup with that rule on, where layers below it are
BF16 itself, at 1. It should be 0.98 at least. ``size_rule.py`` asks the roofline the same.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from timed import script
from timed.clock import speedups
from timed.compiling import prepare_all
from timed.measure import Deadline, measure, steps
from timed.options import Options
from timed.programs import Program
from timed.variants import BF16, RECIPES, VARIANTS

SIDES = (512, 1024, 2048, 4096, 8192)
TOKENS = (8192, 2048, 16384)
TINY_SIDES, TINY_TOKENS = (16, 32), (16,)
BAR = 0.98


def programs(tokens: int, side: int, options: Options) -> dict[str, Program]:
  """A square layer in BF16 and with each recipe."""
  flops = 6 * tokens * side**2
  x = jax.ShapeDtypeStruct((tokens, side), jnp.bfloat16)
  return {
    name: VARIANTS[name].program(
      VARIANTS[name].dense(side), x, repeat=steps(flops, options), flops=flops
    )
    for name in options.choose((BF16, *RECIPES))
  }


def measure_all(options: Options, console: Console) -> dict[str, Any]:
  """All numbers of tokens, the usual one first; JSON is written after each."""
  deadline = Deadline(options.seconds)
  sides, counts = (TINY_SIDES, TINY_TOKENS) if options.tiny else (SIDES, TOKENS)
  results: dict[str, Any] = {"sizes": [], "rules": {}, "left_out": []}
  for tokens in counts:
    if deadline.passed():
      results["left_out"].append(f"{tokens} tokens")
      continue
    with console.status(f"{tokens} tokens"):
      results["sizes"] += measure_tokens(tokens, sides, options)
    results["rules"] = rules(results["sizes"])
    script.write_json(options.out, "crossover", script.document(options, **results))
  return script.document(options, **results)


def measure_tokens(tokens: int, sides: Sequence[int], options: Options) -> list[dict[str, Any]]:
  """Compiles all sizes, then measures one after the other."""
  made = {
    (side, name): program
    for side in sides
    for name, program in programs(tokens, side, options).items()
  }
  ready, found = prepare_all(made, options), []
  for side in sides:
    own = {name: each for (of, name), each in ready.items() if of == side}
    measured = measure(own, options)
    found.append({"tokens": tokens, "side": side, "variants": measured})
  return found


def speed(each: Mapping[str, Any], recipe: str, half: slice) -> float:
  """The median speedup over BF16 in some of the rounds."""
  rounds = {name: each["variants"][name]["ms_rounds"] for name in (BF16, recipe)}
  ratios = speedups(rounds[BF16], rounds[recipe])
  return median(ratios[half] or ratios)


def rules(sizes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Of each recipe, the rule that follows and how it does."""
  return {recipe: rule(sizes, recipe) for recipe in recipes_of(sizes)}


def recipes_of(sizes: Sequence[Mapping[str, Any]]) -> list[str]:
  """The recipes that ran at every size."""
  return [name for name in RECIPES if all(name in each["variants"] for each in sizes)]


def rule(sizes: Sequence[Mapping[str, Any]], recipe: str) -> dict[str, Any]:
  """Finds the smallest side from which on FP8 is never slower, and judges it by other rounds.

  Returns:
    ``min_kernel_size`` for ``fp8.Fp8Config``, None if BF16 is faster at the largest size too; the
    smallest side of each number of tokens; the worst speedup with the rule on, and without.
  """
  odd, even = slice(0, None, 2), slice(1, None, 2)
  smallest = smallest_side(sizes, recipe, odd)
  taken = [each for each in sizes if smallest is not None and each["side"] >= smallest]
  worst = min([1.0, *(speed(each, recipe, even) for each in taken)])
  counts = sorted({each["tokens"] for each in sizes})
  return {
    "min_kernel_size": smallest and smallest**2,
    "smallest_side": {
      str(tokens): smallest_side([e for e in sizes if e["tokens"] == tokens], recipe, odd)
      for tokens in counts
    },
    "worst_with_rule": worst,
    "worst_without": min(speed(each, recipe, even) for each in sizes),
    "holds": worst >= BAR,
  }


def smallest_side(sizes: Iterable[Mapping[str, Any]], recipe: str, half: slice) -> int | None:
  """The smallest side from which on no layer is slower than in BF16."""
  found = None
  in_order = sorted(sizes, key=lambda each: each["side"], reverse=True)
  for side, group in itertools.groupby(in_order, key=lambda each: each["side"]):
    if any(speed(each, recipe, half) < 1 for each in group):
      break
    found = side
  return found


def table(content: Mapping[str, Any]) -> Table:
  """One row a size: speedups with quartiles."""
  sizes = content["sizes"]
  recipes = recipes_of(sizes)
  grid = Table(title="Speed of forward and backward, BF16 = 1")
  for heading in ("tokens", "K = N", "BF16 ms", *recipes):
    grid.add_column(heading, justify="right")
  for each in sizes:
    speeds = [each["variants"][recipe]["speedup"] for recipe in recipes]
    marks = [" (!)" if each["variants"][recipe]["problems"] else "" for recipe in recipes]
    cells = [
      f"{s['median']:.2f} ({s['low']:.2f}-{s['high']:.2f}){mark}"
      for s, mark in zip(speeds, marks, strict=True)
    ]
    bf16 = f"{each['variants'][BF16]['ms']['median']:.3f}"
    grid.add_row(str(each["tokens"]), str(each["side"]), bf16, *cells)
  return grid


def show(content: Mapping[str, Any], console: Console) -> None:
  """Prints the table and the rules."""
  script.print_note(content, console)
  console.print(table(content))
  for recipe, each in content["rules"].items():
    size = each["min_kernel_size"]
    says = f"Fp8Config(min_kernel_size={size})" if size else "BF16 is faster at every size"
    judged = f"at worst {each['worst_with_rule']:.3f} with it, {each['worst_without']:.3f} without"
    holds = "holds" if each["holds"] else "DOES NOT HOLD"
    console.print(f"{recipe}: {says}; {judged}; {BAR} {holds}", highlight=False)
  for name in content["left_out"]:
    console.print(f"left out, the time was up: {name}", highlight=False)
  cases = {f"{e['tokens']} tokens, {e['side']}": e["variants"] for e in content["sizes"]}
  script.print_problems(content["failures"], cases, console)


def draw(figure: Any, content: Mapping[str, Any]) -> None:
  """Draws speed against the kernel's side, a line for each recipe and number of tokens."""
  figure.set_size_inches(8, 5)
  axes, styles = figure.subplots(), ("-", "--", ":", "-.")
  counts = sorted({each["tokens"] for each in content["sizes"]})
  for (column, recipe), (row, tokens) in itertools.product(
    enumerate(content["rules"]), enumerate(counts)
  ):
    own = [each for each in content["sizes"] if each["tokens"] == tokens]
    speeds = [each["variants"][recipe]["speedup"]["median"] for each in own]
    looks: Any = {"color": f"C{column}", "linestyle": styles[row % len(styles)], "marker": "o"}
    axes.plot([e["side"] for e in own], speeds, label=f"{recipe}, {tokens} tokens", **looks)
  axes.axhline(1, color="black", linewidth=0.8)
  axes.set_xscale("log", base=2)
  axes.set_xlabel("K = N")
  axes.set_ylabel("speed, BF16 = 1")
  axes.legend(fontsize="small")


def main() -> None:
  """Runs the benchmark."""
  options, console = script.read_options(__doc__, "crossover"), script.console()
  if options.replot:
    script.replot(options.out, "crossover", draw, console)
    return
  content = measure_all(options, console)
  show(content, console)
  script.write_plot(options.out, "crossover", draw, content, console)


if __name__ == "__main__":
  main()
