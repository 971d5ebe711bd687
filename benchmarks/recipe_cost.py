"""What does each recipe cost on a GPU?

    python benchmarks/recipe_cost.py         # no GPU needed; about a minute on one CPU core

One ``nn.Dense`` of 4096 by 4096 without bias, 8192 tokens, parameters in float32, the rest in
bfloat16: forward and backward, from an output gradient that is an argument. Each variant is
compiled for a described H100 and a described B200, and never run: counts, bytes and memory are
those of the compiled program. ``ms`` is a roofline, a lower bound by data-sheet rates without
launches and caches: it compares programs, it predicts no time. ``MiB`` are read and written by
kernels other than GEMMs, ``extra MiB`` those beyond BF16's.
"""

import argparse
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import fp8_ops as flax_fp8_ops
from rich.console import Console
from rich.table import Table

import flax_fp8 as fp8
from flax_fp8.doctor import allow_missing_cuda
from lm.report import environment

RESULTS = Path(__file__).resolve().parent / "results"
TARGETS = ("h100", "b200")
TOKENS, WIDTH, FEATURES = 8192, 4096, 4096
MIB = 2**20


def emulated(recipe: fp8.Recipe) -> Callable[..., Any]:
  """A recipe's module that asks no device: the H100 has no MXFP8."""
  return functools.partial(fp8.Fp8DotGeneral, recipe=recipe, emulate=True)


VARIANTS: dict[str, Callable[..., Any] | None] = {
  "BF16": None,
  "flax.linen.fp8_ops": flax_fp8_ops.Fp8DotGeneral,
  "delayed": emulated(fp8.DelayedScaling()),
  "delayed, first step": emulated(fp8.DelayedScaling(first_step="current")),
  "delayed, overflow": emulated(fp8.DelayedScaling(overflow="current")),
  "current": emulated(fp8.Float8CurrentScaling()),
  "rowwise": emulated(fp8.Float8RowwiseScaling()),
  "rowwise, BF16 wgrad": emulated(fp8.Float8RowwiseScaling(high_precision=("wgrad",))),
  "block": emulated(fp8.Float8BlockScaling()),
  "mxfp8": emulated(fp8.MXFP8BlockScaling()),
}


def explain_step(
  name: str,
  target: str,
  sizes: tuple[int, int, int] = (TOKENS, WIDTH, FEATURES),
  *,
  with_metrics: bool = False,
) -> fp8.Report:
  """Reports on forward and backward of one layer.

  Args:
    name: of ``VARIANTS``.
    target: a GPU that ``fp8.explain`` knows.
    sizes: tokens, width of the input, width of the output.
    with_metrics: measures in each step what FP8 does.

  Returns:
    The report.
  """
  tokens, width, features = sizes
  layer = nn.Dense(features, use_bias=False, dtype=jnp.bfloat16, dot_general_cls=VARIANTS[name])
  x = jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16)
  grad = jax.ShapeDtypeStruct((tokens, features), jnp.bfloat16)

  def step(variables: Any, x: jax.Array, grad: jax.Array) -> Any:
    out, pull_back = jax.vjp(layer.apply, variables, x)
    return out, pull_back(grad)

  variables = jax.eval_shape(layer.init, jax.random.key(0), x)
  if with_metrics:
    variables = fp8.add_metrics(layer, variables, x)
  return fp8.explain(step, variables, x, grad, target=target, name=name)


def figures(report: fp8.Report) -> dict[str, Any]:
  """The numbers of one variant on one GPU."""
  assert report.seconds is not None
  return {
    "fp8_gemms": report.fp8_gemms,
    "gemms": report.total_gemms,
    "kernels": report.launches,
    "mib_outside_gemms": report.bytes_outside_gemms / MIB,
    "temp_mib": report.memory.temp / MIB,
    "roofline_ms": 1e3 * report.seconds,
    "operands": sorted({gemm.lhs for gemm in report.gemms} | {gemm.rhs for gemm in report.gemms}),
    "refusals": sorted(report.refusals),
    "doubts": list(report.doubts),
  }


def measure(
  targets: Sequence[str], names: Sequence[str], sizes: tuple[int, int, int], console: Console
) -> dict[str, dict[str, Any]]:
  """Compiles every variant for every GPU."""
  found: dict[str, dict[str, Any]] = {}
  for target in targets:
    found[target] = {}
    for name in names:
      with console.status(f"{name} on {target}"):
        found[target][name] = figures(explain_step(name, target, sizes))
    baseline = found[target]["BF16"]
    assert baseline["operands"] == ["bf16"], baseline  # no speed over another dtype than BF16
    for each in found[target].values():
      each["extra_mib"] = each["mib_outside_gemms"] - baseline["mib_outside_gemms"]
  return found


HEADINGS = ("FP8 GEMMs", "kernels", "MiB", "extra MiB", "temp MiB", "ms")


def rows(found: Mapping[str, Any]) -> list[list[str]]:
  """One row a variant, of one GPU; a mark where the report had its doubts."""
  made: list[list[str]] = []
  for name, each in found.items():
    mib = [f"{each[key]:,.0f}" for key in ("mib_outside_gemms", "extra_mib", "temp_mib")]
    gemms = f"{each['fp8_gemms']}/{each['gemms']}"
    doubt = " (?)" if each["doubts"] else ""
    ms = f"{each['roofline_ms']:.2f}"
    made.append([name, gemms + doubt, str(each["kernels"]), *mib, ms + doubt])
  return made


def markdown(found: Mapping[str, Any]) -> str:
  """The tables for a page of documentation."""
  parts: list[str] = []
  for target, variants in found.items():
    head = [
      f"| {target.upper()} | {' | '.join(HEADINGS)} |",
      "|---" + "|---:" * len(HEADINGS) + "|",
    ]
    parts.append("\n".join([*head, *(f"| {' | '.join(cells)} |" for cells in rows(variants))]))
  return "\n\n".join(parts) + "\n"


def table(target: str, found: Mapping[str, Any]) -> Table:
  """The table of one GPU."""
  grid = Table(title=f"Forward and backward of one layer, compiled for {target.upper()}")
  grid.add_column("")
  for heading in HEADINGS:
    grid.add_column(heading, justify="right")
  for cells in rows(found):
    grid.add_row(*cells)
  return grid


def main() -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--targets", nargs="+", default=TARGETS)
  parser.add_argument("--out", type=Path, default=RESULTS, help="folder of JSON and table")
  arguments = parser.parse_args()
  allow_missing_cuda()
  console = Console()
  sizes = (TOKENS, WIDTH, FEATURES)
  found = measure(arguments.targets, tuple(VARIANTS), sizes, console)
  for target, variants in found.items():
    console.print(table(target, variants))
    doubts = {f"{name}: {doubt}" for name, each in variants.items() for doubt in each["doubts"]}
    for line in sorted(doubts):
      console.print(f"(?) {line}", highlight=False, markup=False, soft_wrap=True)
  arguments.out.mkdir(parents=True, exist_ok=True)
  named = dict(zip(("tokens", "width", "features"), sizes, strict=True))
  document = {"environment": environment(), "sizes": named, "targets": found}
  (arguments.out / "recipe_cost.json").write_text(json.dumps(document, indent=1) + "\n")
  (arguments.out / "recipe_cost.md").write_text(markdown(found))


if __name__ == "__main__":
  main()
