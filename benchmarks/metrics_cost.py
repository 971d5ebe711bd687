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

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import flax_fp8 as fp8
from flax_fp8.doctor import allow_missing_cuda
from lm.report import environment
from recipe_cost import FEATURES, RESULTS, TOKENS, WIDTH, emulated, figures

TARGET = "h100"
RECIPES = ("delayed", "current", "rowwise", "mxfp8")
COMPARED = ("kernels", "mib_outside_gemms", "temp_mib", "roofline_ms")


def explain_step(name: str, with_metrics: bool, sizes: tuple[int, int, int]) -> fp8.Report:
  """Reports on forward and backward of one layer.

  Args:
    name: of a recipe.
    with_metrics: whether its state holds metrics.
    sizes: tokens, width of the input, width of the output.

  Returns:
    The report.
  """
  tokens, width, features = sizes
  cls = emulated(fp8.get_recipe(name))
  layer = nn.Dense(features, use_bias=False, dtype=jnp.bfloat16, dot_general_cls=cls)
  x = jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16)
  grad = jax.ShapeDtypeStruct((tokens, features), jnp.bfloat16)

  def step(variables: Any, x: jax.Array, grad: jax.Array) -> Any:
    out, pull_back = jax.vjp(layer.apply, variables, x)
    return out, pull_back(grad)

  variables = jax.eval_shape(layer.init, jax.random.key(0), x)
  if with_metrics:
    variables = fp8.add_metrics(layer, variables, x)
  return fp8.explain(step, variables, x, grad, target=TARGET, name=name)


def measure(
  names: Sequence[str], sizes: tuple[int, int, int], console: Console
) -> dict[str, dict[str, Any]]:
  """Compiles every recipe without metrics and with them."""
  found: dict[str, dict[str, Any]] = {}
  for name in names:
    with console.status(name):
      without, measured = (figures(explain_step(name, on, sizes)) for on in (False, True))
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
