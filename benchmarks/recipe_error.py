"""How large is the error of each recipe's gradients?

    python benchmarks/recipe_error.py        # no GPU needed; about a minute on one CPU core

Each recipe multiplies the three GEMMs of a layer in bfloat16, at five shapes, on inputs ``x`` of
four distributions. ``error`` is ``norm(got - exact) / norm(exact)``; the exact product is that of
the same bfloat16 operands in float64; tables show the mean over the shapes. ``wgrad/channel`` is
the root mean square of the errors of the weight gradient's rows, one for each channel of ``x``:
outliers' rows count no more than others. Kernels are normal, with a standard deviation of
``1 / sqrt(K)``. Output gradients are 1e-5 times normal values where inputs are normal, else 1e-5
times heavy-tailed ones.

``SQNR`` is that of one quantised tensor, ``10 log10(sum(x**2) / sum((q - x)**2))`` in dB over the
values that are no outliers. A product with the identity, which every recipe holds exactly, gives
the ``q`` that a GEMM sees: fprop sums over the channels of ``x``, wgrad over its rows.
"""

import argparse
import functools
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import flax_fp8 as fp8
from flax_fp8 import ops
from flax_fp8.doctor import allow_missing_cuda
from lm.report import environment

RESULTS = Path(__file__).resolve().parent / "results"
Array: TypeAlias = np.ndarray[Any, Any]
State: TypeAlias = dict[str, dict[str, jax.Array]]


class Row(NamedTuple):
  """A recipe, or None for BF16, and how many batches it has seen before the one that counts."""

  recipe: fp8.Recipe | None
  earlier: int = 0


class Shape(NamedTuple):
  """A layer's: ``x`` is ``[*rows, K]``, the kernel ``[K, *columns]``."""

  rows: tuple[int, ...]
  K: int
  columns: tuple[int, ...]


ROWS = {
  "BF16": Row(None),
  "delayed, first step": Row(fp8.DelayedScaling()),
  "delayed": Row(fp8.DelayedScaling(), earlier=3),
  "delayed, margin 2": Row(fp8.DelayedScaling(margin=2), earlier=3),
  "current": Row(fp8.Float8CurrentScaling()),
  "current, E4M3": Row(fp8.Float8CurrentScaling(fp8_format=fp8.Format.E4M3)),
  "rowwise": Row(fp8.Float8RowwiseScaling()),
  "block": Row(fp8.Float8BlockScaling()),
  "mxfp8": Row(fp8.MXFP8BlockScaling()),
  "mxfp8, rounding down": Row(fp8.MXFP8BlockScaling(scale_rounding="down")),
}
LINES = {name: ROWS[name] for name in ("current", "rowwise", "block", "mxfp8")}
SHAPES = {
  "square": Shape((512,), 512, (512,)),
  "wide up": Shape((512,), 256, (1024,)),
  "wide down": Shape((512,), 1024, (256,)),
  "attention projection": Shape((4, 128), 512, (8, 64)),
  "tall, no multiples of 128": Shape((1000,), 200, (72,)),
}
INPUTS = {
  "normal": "normal",
  "heavy tails": "Student's t with 3 degrees of freedom",
  "channels x100": "normal, 1 channel in 128 times 100",
  "channels x10000": "normal, 1 channel in 128 times 10000",
}
FIGURES = ("out", "dgrad", "wgrad", "wgrad/channel")
PLACES = ("one channel, in fprop", "one channel, in wgrad", "one value, in fprop")
FACTORS = tuple(10.0 ** (step / 2) for step in range(13))


# Inputs.


def outliers(inputs: str, channels: int) -> Array:
  """Which channels are scaled up, and by how much: a factor for each."""
  factors = np.ones(channels)
  if inputs.startswith("channels"):
    factors[:: min(128, channels)] = float(inputs.split("x")[1])
  return factors


def draw_input(rng: np.random.Generator, inputs: str, size: tuple[int, ...]) -> Array:
  """A batch of one of the distributions of ``INPUTS``."""
  if inputs == "heavy tails":
    return rng.standard_t(3, size)
  return rng.normal(size=size) * outliers(inputs, size[-1])


def draw_batch(rng: np.random.Generator, inputs: str, shape: Shape) -> tuple[jax.Array, ...]:
  """The layer's input and output gradient, in bfloat16."""
  size = (*shape.rows, *shape.columns)
  grad = rng.normal(size=size) if inputs == "normal" else rng.standard_t(3, size)
  x = draw_input(rng, inputs, (*shape.rows, shape.K))
  return jnp.asarray(x, jnp.bfloat16), jnp.asarray(1e-5 * grad, jnp.bfloat16)


# Products.


@functools.partial(jax.jit, static_argnums=0)
def products(
  recipe: fp8.Recipe | None, state: State, x: jax.Array, w: jax.Array, grad: jax.Array
) -> tuple[tuple[jax.Array, ...], State]:
  """The three products of a layer, and its new state."""
  dims = (((x.ndim - 1,), (0,)), ((), ()))

  def layer(state: State, x: jax.Array, w: jax.Array) -> jax.Array:
    if recipe is None:
      return jax.lax.dot_general(x, w, dims)
    return ops.dot_general(x, w, dims, recipe=recipe, state=state)

  out, pull_back = jax.vjp(layer, state, x, w)
  new_state, *gradients = pull_back(grad)
  return (out, *gradients), new_state


def fresh(recipe: fp8.Recipe | None) -> State:
  """The state before the first batch."""
  return {} if recipe is None else ops.init_state(recipe)


def exact_products(x: jax.Array, w: jax.Array, grad: jax.Array) -> tuple[Array, ...]:
  """The same in float64, as matrices."""
  x64, w64, grad64 = (np.asarray(each, np.float64) for each in (x, w, grad))
  rows, columns = x64.reshape(-1, x.shape[-1]), w64.reshape(w.shape[0], -1)
  grads = grad64.reshape(len(rows), -1)
  return rows @ columns, grads @ columns.T, rows.T @ grads


def relative(got: jax.Array, exact: Array, axis: int | None = None) -> float:
  """Of norms; with an axis, the root mean square of the errors along it."""
  difference = np.asarray(got, np.float64).reshape(exact.shape) - exact
  ratios = np.linalg.norm(difference, axis=axis) / np.linalg.norm(exact, axis=axis)
  return float(np.sqrt(np.mean(ratios**2)))


def errors(row: Row, inputs: str, shape: Shape, seed: int = 0) -> dict[str, float]:
  """The errors of one recipe at one shape, in the order of ``FIGURES``."""
  rng = np.random.default_rng(seed)
  w = jnp.asarray(
    rng.normal(size=(shape.K, *shape.columns)) / math.sqrt(shape.K), dtype=jnp.bfloat16
  )
  state = fresh(row.recipe)
  for _ in range(row.earlier):
    x, grad = draw_batch(rng, inputs, shape)
    _, state = products(row.recipe, state, x, w, grad)
  x, grad = draw_batch(np.random.default_rng(seed + 1), inputs, shape)  # the same for all rows
  got, _ = products(row.recipe, state, x, w, grad)
  exact = exact_products(x, w, grad)
  found = [relative(*both) for both in zip(got, exact, strict=True)]
  return dict(zip(FIGURES, (*found, relative(got[2], exact[2], axis=1)), strict=True))


# Single tensors.


def seen_by_gemm(row: Row, batches: Sequence[Array], *, wgrad: bool = False) -> Array:
  """Quantises the last of some matrices, as the input of fprop or of wgrad, and dequantises it."""
  state = fresh(row.recipe)
  got = None
  for batch in batches[-1 - row.earlier :]:
    x = jnp.asarray(batch, jnp.float32)
    rows, channels = x.shape
    w, grad = jnp.eye(channels), jnp.zeros((rows, channels))
    if wgrad:
      w, grad = jnp.zeros((channels, rows)), jnp.eye(rows)
    got, state = products(row.recipe, state, x, w, grad)
  assert got is not None
  return np.asarray(got[2].T if wgrad else got[0], np.float64)


def sqnr(row: Row, batches: Sequence[Array], ordinary: Array, *, wgrad: bool = False) -> float:
  """Signal to quantisation noise in dB, of the last batch, over those of its values that count."""
  x = batches[-1].astype(np.float32).astype(np.float64)
  noise = seen_by_gemm(row, batches, wgrad=wgrad) - x
  return float(10 * np.log10(np.sum(x[ordinary] ** 2) / np.sum(noise[ordinary] ** 2)))


def sqnr_on(row: Row, inputs: str, size: tuple[int, int], *, wgrad: bool) -> float:
  """SQNR on one of the distributions of ``INPUTS``."""
  rng = np.random.default_rng(0)
  batches = [draw_input(rng, inputs, size) for _ in range(4)]
  ordinary = np.broadcast_to(outliers(inputs, size[1]) == 1, size)
  return sqnr(row, batches, ordinary, wgrad=wgrad)


def sqnr_beside(row: Row, place: str, factor: float, size: tuple[int, int]) -> float:
  """SQNR of normal values, one channel or one value among which is multiplied by a factor."""
  x = np.random.default_rng(0).normal(size=size)
  x[0, 0] = 1
  outlier = np.zeros(size, bool)
  outlier[: 1 if place.startswith("one value") else None, :1] = True
  batch = np.where(outlier, factor * x, x)
  return sqnr(row, [batch], ~outlier, wgrad=place.endswith("wgrad"))


# Results.


def measure(shapes: Mapping[str, Shape], size: tuple[int, int], console: Console) -> dict[str, Any]:
  """Everything: errors by input, recipe and shape; SQNR by input and recipe, and by outlier."""
  quantizing = {name: row for name, row in ROWS.items() if row.recipe}
  with console.status("multiplying"):
    found: dict[str, Any] = {name: {inputs: {} for inputs in INPUTS} for name in ROWS}
    for (name, row), (shape_name, shape), inputs in itertools.product(
      ROWS.items(), shapes.items(), INPUTS
    ):
      found[name][inputs][shape_name] = errors(row, inputs, shape)
  with console.status("quantising"):
    tensors = {
      name: {
        f"{inputs}, {gemm}": sqnr_on(row, inputs, size, wgrad=gemm == "wgrad")
        for inputs, gemm in itertools.product(INPUTS, ("fprop", "wgrad"))
      }
      for name, row in quantizing.items()
    }
  with console.status("scaling outliers"):
    beside = {
      place: {
        name: [sqnr_beside(row, place, factor, size) for factor in FACTORS]
        for name, row in LINES.items()
      }
      for place in PLACES
    }
  outlier_sqnr = {"factors": FACTORS, "places": beside}
  return {"errors": found, "sqnr": tensors, "outlier_sqnr": outlier_sqnr}


def error_rows(found: Mapping[str, Any], inputs: str) -> list[list[str]]:
  """One row a recipe: its mean errors over the shapes, in percent, and where it is worst."""
  rows: list[list[str]] = []
  for name, by_inputs in found.items():
    cases = by_inputs[inputs]
    means = [statistics.fmean(case[key] for case in cases.values()) for key in FIGURES]
    figures = [(case[key], key, shape) for shape, case in cases.items() for key in FIGURES]
    worst, key, shape = max(figures)
    cells = [f"{100 * mean:.2f}" for mean in means]
    rows.append([name, *cells, f"{100 * worst:.2f} ({key}, {shape})"])
  return rows


def tables(document: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
  """Title, headings and rows of each table."""
  headings = ["recipe", *FIGURES, "worst"]
  made = [
    (f"Errors in %: inputs {what}", headings, error_rows(document["errors"], inputs))
    for inputs, what in INPUTS.items()
  ]
  sqnrs = document["sqnr"]
  rows = [[name, *(f"{value:.1f}" for value in by.values())] for name, by in sqnrs.items()]
  columns = next(iter(sqnrs.values()))
  return [*made, ("SQNR in dB of an input of each GEMM", ["recipe", *columns], rows)]


def markdown(made: Iterable[tuple[str, list[str], list[list[str]]]]) -> str:
  """The tables for a page of documentation."""
  parts: list[str] = []
  for title, headings, rows in made:
    rule = ["---", *["---:"] * (len(headings) - 1)]
    lines = (f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows))
    parts.append("\n".join([title, "", *lines]))
  return "\n\n".join(parts) + "\n"


def draw(outlier_sqnr: Mapping[str, Any]) -> Figure:
  """Draws SQNR against the outliers' factor, one line a recipe."""
  figure = Figure(figsize=(11, 3.6), layout="constrained")
  panels = figure.subplots(1, len(PLACES), sharey=True)
  for axes, (place, lines) in zip(panels, outlier_sqnr["places"].items(), strict=True):
    for name, values in lines.items():
      axes.plot(outlier_sqnr["factors"], values, "o-", markersize=3, label=name)
    axes.set(xscale="log", title=place, xlabel="outlier, times the other values")
  panels[0].set(ylabel="SQNR of the other values, dB", ylim=(-2, None))
  panels[0].legend()
  return figure


def main() -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", type=Path, default=RESULTS, help="folder of JSON, table and picture")
  arguments = parser.parse_args()
  allow_missing_cuda()
  console = Console()
  document = {"environment": environment()} | measure(SHAPES, (256, 1024), console)
  made = tables(document)
  for title, headings, rows in made:
    grid = Table(title=title)
    for heading in headings:
      grid.add_column(heading, justify="left" if heading == "recipe" else "right")
    for row in rows:
      grid.add_row(*row)
    console.print(grid)
  arguments.out.mkdir(parents=True, exist_ok=True)
  (arguments.out / "recipe_error.json").write_text(json.dumps(document, indent=1) + "\n")
  (arguments.out / "recipe_error.md").write_text(markdown(made))
  draw(document["outlier_sqnr"]).savefig(arguments.out / "recipe_error.png", dpi=120)


if __name__ == "__main__":
  main()
