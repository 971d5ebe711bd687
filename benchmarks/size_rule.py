"""From what size of a kernel on does FP8 pay?

    python benchmarks/size_rule.py           # no GPU needed; about a minute on one CPU core

One ``nn.Dense`` of K by N without bias, forward and backward, parameters in float32, the rest in
bfloat16, compiled for a described GPU in BF16 and with each recipe, and never run. The answer is

    ratio = roofline seconds FP8 / roofline seconds BF16

below 1 where FP8 pays. A roofline is a lower bound by data-sheet rates: it has what quantising
reads and writes, but no launches; ``launches`` are the kernels that FP8 has beyond BF16, each a few
microseconds on its own. ``Fp8Config(min_kernel_size=...)`` is the rule that follows.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flax_fp8.doctor import allow_missing_cuda
from lm.report import environment
from recipe_cost import explain_step

RESULTS = Path(__file__).resolve().parent / "results"
SIDES = (256, 512, 1024, 2048, 4096, 8192)
RECIPES = ("delayed", "current", "rowwise")


def measure(target: str, tokens: int, side: int) -> dict[str, Any]:
  """Ratios and launches of a square kernel."""
  sizes = (tokens, side, side)
  bf16 = explain_step("BF16", target, sizes)
  found: dict[str, Any] = {"tokens": tokens, "side": side}
  for recipe in RECIPES:
    report = explain_step(recipe, target, sizes)
    assert report.seconds is not None
    assert bf16.seconds is not None
    found[recipe] = {
      "ratio": report.seconds / bf16.seconds,
      "launches": report.launches - bf16.launches,
    }
  return found


def table(target: str, found: list[dict[str, Any]]) -> Table:
  """The table of one GPU."""
  grid = Table(title=f"FP8 / BF16, roofline of forward and backward, {target.upper()}")
  for heading in ("tokens", "K = N", *RECIPES, "launches"):
    grid.add_column(heading, justify="right")
  for each in found:
    ratios = [f"{each[recipe]['ratio']:.2f}" for recipe in RECIPES]
    launches = "/".join(str(each[recipe]["launches"]) for recipe in RECIPES)
    grid.add_row(str(each["tokens"]), str(each["side"]), *ratios, f"+{launches}")
  return grid


def main() -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--target", default="h100")
  parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 16384])
  parser.add_argument("--sides", type=int, nargs="+", default=SIDES)
  parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
  arguments = parser.parse_args()
  allow_missing_cuda()
  console = Console()
  found: list[dict[str, Any]] = []
  for tokens in arguments.tokens:
    for side in arguments.sides:
      with console.status(f"{tokens} tokens, {side} x {side}"):
        found.append(measure(arguments.target, tokens, side))
  console.print(table(arguments.target, found))
  arguments.out.mkdir(parents=True, exist_ok=True)
  document = {"environment": environment(), "target": arguments.target, "sizes": found}
  (arguments.out / "size_rule.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
  main()
