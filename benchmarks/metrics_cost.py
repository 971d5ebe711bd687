"""What do metrics cost on a GPU, where they are in the state?

    python benchmarks/metrics_cost.py        # no GPU needed; about a minute on one CPU core

The layer and the figures of ``recipe_cost.py``: one ``nn.Dense`` of 4096 by 4096, 8192 tokens,
forward and backward, compiled for a described H100 and never run. Each recipe without metrics and
with those of ``fp8.add_metrics``: ``extra`` is the difference. ``ms`` is a roofline, a lower bound
by data-sheet rates without launches and caches.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flax_fp8.doctor import allow_missing_cuda
from lm.report import environment
from recipe_cost import FEATURES, RESULTS, TOKENS, WIDTH, explain_step, figures

TARGET = "h100"
RECIPES = ("delayed", "current", "rowwise", "mxfp8")
COMPARED = ("kernels", "mib_outside_gemms", "temp_mib", "roofline_ms")


def measure(
  names: Sequence[str], sizes: tuple[int, int, int], console: Console
) -> dict[str, dict[str, Any]]:
  """Compiles every recipe without metrics and with them."""
  found: dict[str, dict[str, Any]] = {}
  for name in names:
    with console.status(name):
      without, measured = (
        figures(explain_step(name, TARGET, sizes, with_metrics=on)) for on in (False, True)
      )
    assert measured["gemms"] == without["gemms"], name
    assert measured["fp8_gemms"] == without["fp8_gemms"], name
    extra = {key: measured[key] - without[key] for key in COMPARED}
    found[name] = {"without": without, "with": measured, "extra": extra}
  return found


def table(found: Mapping[str, Any]) -> Table:
  """Without, and what metrics add."""
  grid = Table(title=f"Metrics of one layer's step, compiled for {TARGET.upper()}")
  grid.add_column("")
  for heading in ("kernels", "extra", "MiB", "extra", "temp MiB", "extra", "ms", "extra"):
    grid.add_column(heading, justify="right")
  for name, each in found.items():
    cells = [
      format(each[part][key], ",.2f" if key == "roofline_ms" else ",.0f")
      for key in COMPARED
      for part in ("without", "extra")
    ]
    grid.add_row(name, *cells)
  return grid


def main() -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
  arguments = parser.parse_args()
  allow_missing_cuda()
  console = Console()
  sizes = (TOKENS, WIDTH, FEATURES)
  found = measure(RECIPES, sizes, console)
  console.print(table(found))
  arguments.out.mkdir(parents=True, exist_ok=True)
  named = dict(zip(("tokens", "width", "features"), sizes, strict=True))
  document = {"environment": environment(), "sizes": named, "target": TARGET, "recipes": found}
  (arguments.out / "metrics_cost.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
  main()
