"""How large is the error of each recipe's gradients?

    python benchmarks/recipe_error.py        # no GPU needed; about a minute on one CPU core

Each recipe computes the three GEMMs of a layer in bfloat16, at five shapes, on inputs ``x`` of four
distributions. ``error`` is ``norm(got - exact) / norm(exact)``. The exact product is that of the
same bfloat16 operands in float64. Tables show the mean over the shapes. ``wgrad/channel`` is the
root mean square of the errors of the weight gradient's rows, one per channel of ``x``, so that
outlier rows weigh no more than others. Kernels are normal, with a standard deviation of ``1 /
sqrt(K)``. Output gradients are 1e-5 times normal values for normal inputs, else 1e-5 times
heavy-tailed ones.

``SQNR`` describes one quantized tensor: ``10 log10(sum(x**2) / sum((q - x)**2))`` in dB over the
values that are no outliers. A product with the identity, which every recipe represents exactly,
gives the ``q`` that a GEMM sees: fprop sums over the channels of ``x``, wgrad over its rows.
"""

import functools
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import flax_fp8 as fp8
from flax_fp8 import ops
from flax_fp8.doctor import allow_missing_cuda
from harness.environment import environment
from harness.output import make_console, make_parser, read_json, redraw, write_json, write_text
from harness.plot import legend, lines, make_figure
from harness.table import Column, markdown, print_table

Array = np.ndarray[Any, Any]
State = dict[str, dict[str, jax.Array]]


class Row(NamedTuple):
  """A recipe, None for BF16, and how many batches it has seen before the measured one."""

  recipe: fp8.Recipe | None
  earlier: int = 0


class Shape(NamedTuple):
  """A layer's sizes: ``x`` is ``[*rows, K]``, the kernel ``[K, *columns]``."""

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


def outliers(inputs: str, channels: int) -> Array:
  """A factor for each channel."""
  factors = np.ones(channels)
  if inputs.startswith("channels"):
    factors[:: min(128, channels)] = float(inputs.split("x")[1])
  return factors


def draw_input(rng: np.random.Generator, inputs: str, size: tuple[int, ...]) -> Array:
  if inputs == "heavy tails":
    return rng.standard_t(3, size)
  return rng.normal(size=size) * outliers(inputs, size[-1])


def draw_batch(rng: np.random.Generator, inputs: str, shape: Shape) -> tuple[jax.Array, ...]:
  """The layer's input and output gradient, in bfloat16."""
  size = (*shape.rows, *shape.columns)
  grad = rng.normal(size=size) if inputs == "normal" else rng.standard_t(3, size)
  x = draw_input(rng, inputs, (*shape.rows, shape.K))
  return jnp.asarray(x, jnp.bfloat16), jnp.asarray(1e-5 * grad, jnp.bfloat16)


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
  return {} if recipe is None else ops.init_state(recipe)


def exact_products(x: jax.Array, w: jax.Array, grad: jax.Array) -> tuple[Array, ...]:
  """The same in float64, as matrices."""
  x64, w64, grad64 = (np.asarray(each, np.float64) for each in (x, w, grad))
  rows, columns = x64.reshape(-1, x.shape[-1]), w64.reshape(w.shape[0], -1)
  grads = grad64.reshape(len(rows), -1)
  return rows @ columns, grads @ columns.T, rows.T @ grads


def relative(got: jax.Array, exact: Array, axis: int | None = None) -> float:
  """The relative error; with an axis, the root mean square of the errors along it."""
  difference = np.asarray(got, np.float64).reshape(exact.shape) - exact
  ratios = np.linalg.norm(difference, axis=axis) / np.linalg.norm(exact, axis=axis)
  return float(np.sqrt(np.mean(ratios**2)))


def errors(row: Row, inputs: str, shape: Shape, seed: int = 0) -> dict[str, float]:
  """The errors of one recipe at one shape, by ``FIGURES``."""
  rng, last = np.random.default_rng(seed), np.random.default_rng(seed + 1)
  kernel = rng.normal(size=(shape.K, *shape.columns)) / math.sqrt(shape.K)
  w, state = jnp.asarray(kernel, dtype=jnp.bfloat16), fresh(row.recipe)
  for _ in range(row.earlier):
    x, grad = draw_batch(rng, inputs, shape)
    _, state = products(row.recipe, state, x, w, grad)
  x, grad = draw_batch(last, inputs, shape)  # the same for all rows
  got, _ = products(row.recipe, state, x, w, grad)
  exact = exact_products(x, w, grad)
  found = [relative(*both) for both in zip(got, exact, strict=True)]
  return dict(zip(FIGURES, (*found, relative(got[2], exact[2], axis=1)), strict=True))


def seen_by_gemm(row: Row, batches: Sequence[Array], *, wgrad: bool = False) -> Array:
  """Quantizes the last of some matrices, as the input of fprop or wgrad, and dequantizes it."""
  state, got = fresh(row.recipe), None
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
  """SQNR in dB of the last batch, over its ordinary values."""
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
  """SQNR of normal values beside an outlier channel or value, multiplied by a factor."""
  x = np.random.default_rng(0).normal(size=size)
  x[0, 0] = 1
  outlier = np.zeros(size, bool)
  outlier[: 1 if place.startswith("one value") else None, :1] = True
  batch = np.where(outlier, factor * x, x)
  return sqnr(row, [batch], ~outlier, wgrad=place.endswith("wgrad"))


def measure(shapes: Mapping[str, Shape], size: tuple[int, int]) -> dict[str, Any]:
  """Errors by recipe, input and shape; SQNR by recipe and input, and by outlier."""
  gemms = tuple(itertools.product(INPUTS, ("fprop", "wgrad")))
  of_shapes = lambda row, inputs: {name: errors(row, inputs, shapes[name]) for name in shapes}
  at = lambda row, place: [sqnr_beside(row, place, factor, size) for factor in FACTORS]
  beside = {place: {name: at(row, place) for name, row in LINES.items()} for place in PLACES}
  return {
    "environment": environment(),
    "errors": {
      name: {inputs: of_shapes(row, inputs) for inputs in INPUTS} for name, row in ROWS.items()
    },
    "sqnr": {
      name: {f"{on}, {gemm}": sqnr_on(row, on, size, wgrad=gemm == "wgrad") for on, gemm in gemms}
      for name, row in ROWS.items()
      if row.recipe
    },
    "outlier_sqnr": {"factors": FACTORS, "places": beside},
  }


def error_row(name: str, cases: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
  """A recipe's mean errors over the shapes, in percent, and the largest one."""
  means = {key: 100 * statistics.fmean(case[key] for case in cases.values()) for key in FIGURES}
  worst, key, shape = max((case[key], key, at) for at, case in cases.items() for key in FIGURES)
  return {"recipe": name, **means, "worst": f"{100 * worst:.2f} ({key}, {shape})"}


def tables(document: Mapping[str, Any]) -> list[tuple[str, list[Column], list[dict[str, Any]]]]:
  """Title, columns and rows of each table."""
  first, last = Column("recipe", "{recipe}", left=True), Column("worst", "{worst}")
  columns = [first, *(Column(key, f"{{{key}:.2f}}") for key in FIGURES), last]
  found = [
    (f"Errors in %: inputs {what}", columns, [error_row(n, by[on]) for n, by in errors.items()])
    for errors in [document["errors"]]
    for on, what in INPUTS.items()
  ]
  rows = [{"recipe": name, **by} for name, by in document["sqnr"].items()]
  of_sqnr = [first, *(Column(key, f"{{{key}:.1f}}") for key in list(rows[0])[1:])]
  return [*found, ("SQNR in dB of an input of each GEMM", of_sqnr, rows)]


def draw(document: Mapping[str, Any]) -> Any:
  """Draws SQNR against the outlier's factor, one line per recipe."""
  figure = make_figure("SQNR of the values beside an outlier", document, (11, 4))
  panels = figure.subplots(1, len(PLACES), sharey=True)
  outlier = document["outlier_sqnr"]
  for axes, (place, curves) in zip(panels, outlier["places"].items(), strict=True):
    lines(axes, outlier["factors"], curves, title=place, xlabel="outlier, times the other values")
    axes.set_xscale("log")
  panels[0].set(ylabel="SQNR of the other values, dB", ylim=(-2, None))
  legend(figure)
  return figure


def main(argv: list[str] | None = None) -> None:
  arguments = make_parser(__doc__).parse_args(argv)
  allow_missing_cuda()
  if not arguments.redraw:
    write_json(arguments.out, "recipe_error", measure(SHAPES, (256, 1024)))
  found = tables(read_json(arguments.out, "recipe_error"))
  for title, columns, rows in found:
    print_table(make_console(), title, columns, rows, group=None)
  text = "\n".join(f"{title}\n\n{markdown(columns, rows)}" for title, columns, rows in found)
  write_text(arguments.out / "recipe_error.md", text)
  redraw(arguments.out, "recipe_error", draw)


if __name__ == "__main__":
  main()
