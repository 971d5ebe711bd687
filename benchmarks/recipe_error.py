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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import flax_fp8 as fp8
from flax_fp8 import ops
from flax_fp8.doctor import allow_missing_cuda
from harness.environment import environment
from harness.output import make_console, make_parser, read_json, redraw, say, write_json, write_text
from harness.plot import legend, lines, make_figure
from harness.table import Column, markdown

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
    factors[::128] = float(inputs.split("x")[1])
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


def last_products(row: Row, batches: Iterable[Sequence[jax.Array]]) -> tuple[jax.Array, ...]:
  """The products of the last of some batches ``(x, w, grad)``; those before it fill the state."""
  state, got = {} if row.recipe is None else ops.init_state(row.recipe), ()
  for batch in batches:
    got, state = products(row.recipe, state, *batch)
  return got


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


def errors(row: Row, inputs: str, shape: Shape) -> dict[str, float]:
  """The errors of one recipe at one shape, by ``FIGURES``."""
  rng, last = np.random.default_rng(0), np.random.default_rng(1)  # the last is that of all rows
  kernel = rng.normal(size=(shape.K, *shape.columns)) / math.sqrt(shape.K)
  w = jnp.asarray(kernel, dtype=jnp.bfloat16)
  drawn = [draw_batch(each, inputs, shape) for each in (*[rng] * row.earlier, last)]
  batches = [(x, w, grad) for x, grad in drawn]
  got, exact = last_products(row, batches), exact_products(*batches[-1])
  found = [relative(*both) for both in zip(got, exact, strict=True)]
  return dict(zip(FIGURES, (*found, relative(got[2], exact[2], axis=1)), strict=True))


def seen_by_gemm(row: Row, inputs: Sequence[Array], *, wgrad: bool = False) -> Array:
  """Quantizes the last of some matrices, as the input of fprop or wgrad, and dequantizes it."""
  rows, channels = inputs[-1].shape
  others = (jnp.eye(channels), jnp.zeros((rows, channels)))
  if wgrad:
    others = (jnp.zeros((channels, rows)), jnp.eye(rows))
  seen = [(jnp.asarray(x, jnp.float32), *others) for x in inputs[-1 - row.earlier :]]
  out, _, gradient = last_products(row, seen)
  return np.asarray(gradient.T if wgrad else out, np.float64)


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
  of_shapes = lambda row, on: {name: errors(row, on, shape) for name, shape in shapes.items()}
  of_gemm = lambda row, on, gemm: sqnr_on(row, on, size, wgrad=gemm == "wgrad")
  of_place = lambda row, place: [sqnr_beside(row, place, factor, size) for factor in FACTORS]
  gemms = tuple(itertools.product(INPUTS, ("fprop", "wgrad")))
  return {
    "environment": environment(),
    "errors": {name: {on: of_shapes(row, on) for on in INPUTS} for name, row in ROWS.items()},
    "sqnr": {
      name: {f"{on}, {gemm}": of_gemm(row, on, gemm) for on, gemm in gemms}
      for name, row in ROWS.items()
      if row.recipe
    },
    "outlier_sqnr": {
      "factors": FACTORS,
      "places": {p: {name: of_place(row, p) for name, row in LINES.items()} for p in PLACES},
    },
  }


def error_row(name: str, cases: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
  """A recipe's mean errors over the shapes, in percent, and the largest one."""
  means = {key: 100 * statistics.fmean(case[key] for case in cases.values()) for key in FIGURES}
  worst, key, shape = max((case[key], key, at) for at, case in cases.items() for key in FIGURES)
  return {"recipe": name, **means, "worst": f"{100 * worst:.2f} ({key}, {shape})"}


def tables(document: Mapping[str, Any]) -> list[tuple[str, list[Column], list[dict[str, Any]]]]:
  """Title, columns and rows of each table."""
  errors, of_sqnr = document["errors"], document["sqnr"]
  first, worst = Column("recipe", "{recipe}", left=True), Column("worst", "{worst}")
  columns = [first, *(Column(key, f"{{{key}:.2f}}") for key in FIGURES), worst]
  found = [
    (f"Errors in %: inputs {what}", columns, [error_row(n, by[on]) for n, by in errors.items()])
    for on, what in INPUTS.items()
  ]
  columns = [first, *(Column(key, f"{{{key}:.1f}}") for key in of_sqnr["current"])]
  rows = [{"recipe": name, **by} for name, by in of_sqnr.items()]
  return [*found, ("SQNR in dB of an input of each GEMM", columns, rows)]


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
  text = "\n".join(f"{title}\n\n{markdown(columns, rows)}" for title, columns, rows in found)
  say(make_console(), text)
  write_text(arguments.out / "recipe_error.md", text)
  redraw(arguments.out, "recipe_error", draw)


if __name__ == "__main__":
  main()
