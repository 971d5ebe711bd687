"""From what size of a kernel does a layer take no longer in FP8 than in BF16?

    python benchmarks/crossover.py           # needs an H100 or H200; about a minute

Square layers without bias, all in bfloat16, forward and backward, with several numbers of tokens.
A layer stands alone, so its output gradient is an argument.
The rule is that of ``fp8.Fp8Config(min_kernel_size=...)``: layers with a smaller kernel stay BF16.
The smallest measured size is chosen from which no layer is slower than BF16 in the odd rounds. The
even rounds give the worst speedup with that rule, where layers below it are BF16 itself, at 1. It
should be at least 0.98. ``compiled.py size_rule`` asks the roofline the same.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from harness import plot, timed
from harness.clock import in_all, speedups
from harness.names import BF16
from harness.options import Options
from harness.programs import layer_programs
from harness.sizes import Shape
from harness.variants import RECIPES

ODD, EVEN = slice(0, None, 2), slice(1, None, 2)  # rounds
SIDES = (512, 1024, 2048, 4096, 8192)
TOKENS = (8192, 2048, 16384)
TINY_SIDES, TINY_TOKENS = (16, 32), (16,)


def cases(tokens: int, sides: Sequence[int], options: Options) -> dict[str, Any]:
  """Square layers in BF16 and with each recipe."""
  names, shapes = options.choose((BF16, *RECIPES)), [Shape(tokens, side, side) for side in sides]
  return {
    f"{tokens} tokens, {each.width}": layer_programs(each, names, timed.steps(each.flops, options))
    for each in shapes
  }


def groups(options: Options) -> timed.Groups:
  """All numbers of tokens, the usual one first."""
  sides, counts = (TINY_SIDES, TINY_TOKENS) if options.tiny else (SIDES, TOKENS)
  return {f"{n} tokens": functools.partial(cases, n, sides, options) for n in counts}


def sizes_of(found: timed.Found) -> list[dict[str, Any]]:
  """Tokens, side and variants of each case."""
  return [
    dict(zip(("tokens", "side"), map(int, re.findall(r"\d+", case)), strict=True), variants=each)
    for case, each in found.items()
  ]


def speed(each: Mapping[str, Any], recipe: str, half: slice) -> float:
  """The median speedup over BF16 in some of the rounds."""
  rounds = {name: each["variants"][name]["ms_rounds"] for name in (BF16, recipe)}
  ratios = speedups(rounds[BF16], rounds[recipe])
  return median(ratios[half] or ratios)


def rule(sizes: Sequence[Mapping[str, Any]], recipe: str) -> dict[str, Any]:
  """Finds the smallest side from which FP8 is never slower, and judges it by other rounds.

  Returns:
    ``min_kernel_size`` for ``fp8.Fp8Config``, None if BF16 is faster at the largest size too; the
    smallest side of each number of tokens; the worst speedup with the rule, and without.
  """
  smallest = smallest_side(sizes, recipe)
  of = lambda tokens: [each for each in sizes if each["tokens"] == tokens]
  counts = sorted({each["tokens"] for each in sizes})
  speeds = {(n, each["side"]): speed(each, recipe, EVEN) for n in counts for each in of(n)}
  taken = [each for (_, side), each in speeds.items() if smallest and side >= smallest]
  return {
    "min_kernel_size": smallest and smallest**2,
    **{f"smallest side, {n} tokens": smallest_side(of(n), recipe) for n in counts},
    "worst speed with it": min([1.0, *taken]),
    "worst speed without": min(speeds.values()),
  }


def smallest_side(sizes: Iterable[Mapping[str, Any]], recipe: str) -> int | None:
  """The smallest side from which no layer is slower than in BF16."""
  slower = {each["side"] for each in sizes if speed(each, recipe, ODD) < 1}
  return min((s for each in sizes if (s := each["side"]) > max(slower, default=0)), default=None)


def summarize(found: timed.Found) -> dict[str, Any]:
  """The rules of the recipes that ran at every size."""
  return {
    f"{name}: {what}": value
    for name in in_all(found.values())[1:]
    for what, value in rule(sizes_of(found), name).items()
  }


def draw(content: Mapping[str, Any]) -> Any:
  """Draws speed against the kernel's side, a panel for each number of tokens."""
  sizes, names = sizes_of(content["found"]), in_all(content["found"].values())
  counts = sorted({each["tokens"] for each in sizes})
  figure = plot.make_figure("Speed of square layers over BF16", content, (4 * len(counts) + 1, 4))
  for axes, tokens in zip(figure.subplots(1, len(counts), squeeze=False)[0], counts, strict=True):
    own = {each["side"]: each["variants"] for each in sizes if each["tokens"] == tokens}
    curves = {name: [v[name]["speedup"]["median"] for v in own.values()] for name in names}
    named = {"xlabel": "K = N", "ylabel": "speed, BF16 = 1", "title": f"{tokens:,} tokens"}
    plot.lines(axes, list(own), curves, log=True, **named)
  plot.legend(figure)
  return figure


def main() -> None:
  timed.run(__doc__, "crossover", groups, summarize, draw)


if __name__ == "__main__":
  main()
