"""Questions about a layer, a block and stacks: forward and backward of a module."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax

import flax_fp8 as fp8
from flax_fp8.meta_dtype import to_float32
from harness import plot
from harness.models import Block, Heads, Mlp, Stack, SwiGLU, dense
from harness.names import BF16, BLOCK, FLAX
from harness.programs import loss_of
from harness.sizes import LLAMA, Shape
from harness.table import Column
from harness.variants import OTHERS, RECIPES, VARIANTS, Variant
from questions import base
from questions.base import Case, Figures, array, extra, figures, question

LAYER = Shape(8192, 4096, 4096)
FOUR = {**base.THREE, BLOCK: VARIANTS[BLOCK]}


def explain_step(
  module: nn.Module,
  x: jax.ShapeDtypeStruct,
  target: str,
  *,
  loss: bool = False,
  max_grad: bool = False,
  metrics: bool = False,
  descend: bool = False,
) -> Figures:
  """Forward and backward of a layer or of parts of a block, whose output gradient is an argument.

  Args:
    module: what is differentiated.
    x: its input.
    target: the GPU.
    loss: differentiate a loss of the output instead, as one does with whole models.
    max_grad: cast the state, as ``fp8.value_and_grad`` does.
    metrics: add ``fp8.add_metrics`` to the state.
    descend: take a step of gradient descent too.
  """
  variables: Any = jax.eval_shape(module.init, jax.random.key(0), x)
  variables = fp8.add_metrics(module, variables, x) if metrics else variables
  apply = loss_of(module) if loss else module.apply
  grad = jax.eval_shape(apply, variables, x)

  def step(variables: Any, x: jax.Array, grad: Any) -> Any:
    cast = fp8.as_max_grad(variables) if max_grad else variables
    out, pull_back = jax.vjp(apply, cast, x)
    grads, x_grad = jax.tree.map(to_float32, pull_back(grad))
    if not descend:
      return out, (grads, x_grad)
    overwrite, grads = fp8.partition_for_grad_overwrite(grads)
    updates = jax.tree.map(lambda grad: -1e-3 * grad, grads)
    return out, x_grad, fp8.apply_updates(variables, updates, overwrite)

  return figures(fp8.explain(step, variables, x, grad, target=target))


def layer(shape: Shape, variant: Variant, target: str, *, metrics: bool = False) -> Figures:
  """Forward and backward of a layer whose parameters are float32."""
  module = dense(shape.features, variant.in_float32)
  return explain_step(module, array(shape.tokens, shape.width), target, metrics=metrics)


def floor_mib(shape: Shape) -> float:
  """MiB that quantizing a layer's three tensors must move: bfloat16 in, two FP8 layouts out."""
  tokens, width, features = shape.tokens, shape.width, shape.features
  return 4 * (tokens * width + width * features + tokens * features) / base.MIB


@question(
  *(base.GEMMS, base.KERNELS, base.MOVED, extra("over BF16", "mib_outside_gemms")),
  *(Column("floor", "{floor_mib:,.0f}"), base.TEMP, base.TEMP_OF_BF16),
)
def traffic() -> Iterator[Case]:
  """What moves besides GEMMs, in a layer, a Llama block without attention, and stacks of MLPs?

  All in bfloat16, forward and backward. A layer's output gradient is an argument. Block and stacks
  have a loss, half the sum of squares of the output. ``floor`` reads each tensor once and writes
  each of its two FP8 layouts once.
  """
  for shape in (LAYER, Shape(15872, 4096, 16384)):
    for name, variant in FOUR.items():
      known = {"floor_mib": floor_mib(shape)} if variant.is_fp8 else {}
      module, x = dense(shape.features, variant), array(shape.tokens, shape.width)
      measure = functools.partial(explain_step, module, x, max_grad=name == "delayed")
      yield f"Dense {shape.width} x {shape.features}", name, measure, known
  stacks: dict[str, Any] = {
    "Llama 3 8B block": (Block, 1, {}),
    "8 MLPs, unrolled": (Mlp, 8, {}),
    "8 MLPs, nn.scan": (Mlp, 8, {"scan": True}),
    "8 MLPs, nn.scan, remat": (Mlp, 8, {"scan": True, "remat": True}),
  }
  for case, (block, length, how) in stacks.items():
    for name, variant in FOUR.items():
      arguments = (LLAMA, variant, "mix") if block is Block else (variant,)
      module, x = Stack(block, arguments, length, **how), array(8192, 4096 if length == 1 else 2048)
      asked = {"loss": True, "max_grad": name == "delayed"}
      yield case, name, functools.partial(explain_step, module, x, **asked), {}


ASKED: dict[str, Variant] = {
  BF16: Variant(),
  FLAX: VARIANTS[FLAX],
  "delayed": RECIPES["delayed"],
  "delayed, first step": Variant(recipe=fp8.DelayedScaling(first_step="current")),
  "delayed, overflow": Variant(recipe=fp8.DelayedScaling(overflow="current")),
  "current": RECIPES["current"],
  "rowwise": RECIPES["rowwise"],
  "rowwise, BF16 wgrad": Variant(recipe=fp8.Float8RowwiseScaling(high_precision=("wgrad",))),
  BLOCK: VARIANTS[BLOCK],
  **OTHERS,
}


@question(
  *(base.GEMMS, base.KERNELS, base.MOVED, extra("extra MiB", "mib_outside_gemms")),
  *(base.TEMP, base.MS),
  targets=("h100", "b200"),
)
def recipe_cost() -> Iterator[Case]:
  """What does each recipe cost?

  One Dense of 4096 by 4096, 8192 tokens, float32 parameters, forward and backward from a given
  output gradient.
  """
  for name, variant in ASKED.items():
    yield "Dense 4096 x 4096", name, functools.partial(layer, LAYER, variant), {}


@question(
  *(base.KERNELS, extra("extra", "kernels"), base.MOVED, extra("extra", "mib_outside_gemms")),
  *(base.TEMP, extra("extra", "temp_mib"), base.MS, extra("extra", "roofline_ms", "+.2f")),
)
def metrics_cost() -> Iterator[Case]:
  """What do the metrics of ``fp8.add_metrics`` cost?

  The layer of ``recipe_cost``, without metrics and with them.
  """
  for name, metrics in itertools.product(("delayed", "current", "rowwise", "mxfp8"), (False, True)):
    measure = functools.partial(layer, LAYER, ASKED[name], metrics=metrics)
    yield name, f"{name}, metrics" if metrics else name, measure, {}


@question(base.GEMMS, base.KERNELS, base.MOVED, base.TEMP, base.MS)
def fused_cost() -> Iterator[Case]:
  """What do fused projections save?

  Llama 3 8B's widths, 8192 tokens, float32 parameters; forward, backward from given output
  gradients, and a step of gradient descent.
  """
  variants = {BF16: Variant()}
  for name in ("delayed", "current"):
    variants[f"{name}, three layers"] = own = RECIPES[name]
    variants[f"{name}, fused"] = dataclasses.replace(own, fused="joint")
    variants[f"{name}, fused, separate scales"] = dataclasses.replace(own, fused="separate")
  modules: dict[str, Any] = {"query, key, value": Heads, "SwiGLU": SwiGLU}
  for (case, cls), (name, variant) in itertools.product(modules.items(), variants.items()):
    module, x = cls(LLAMA, variant.in_float32), array(8192, 4096)
    yield case, name, functools.partial(explain_step, module, x, descend=True), {}


SWEEPS: dict[str, tuple[int, ...]] = {
  "tokens": tuple(2**n for n in range(10, 17)),
  "width": tuple(2**n for n in range(9, 15)),
  "features": tuple(2**n for n in range(9, 15)),
  "layers": tuple(2**n for n in range(6)),
  "history": (1, 16, 256, 1024, 16384),
}


def draw_growth(content: Mapping[str, Any]) -> Any:
  """Roofline above and temporary memory below, against each size."""
  title = "Roofline and temporary memory of a layer, and of stacks of MLPs"
  figure = plot.make_figure(title, content, (15, 6))
  sweeps = [sweep for sweep in SWEEPS if any(row["sweep"] == sweep for row in content["rows"])]
  axes = figure.subplots(2, len(sweeps), squeeze=False)
  units = {"roofline_ms": "roofline, ms", "temp_mib": "temporary memory, MiB"}
  for (column, sweep), (line, (key, unit)) in itertools.product(
    enumerate(sweeps), enumerate(units.items())
  ):
    rows = [row for row in content["rows"] if row["sweep"] == sweep]
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    curves = {name: [r[key] for r in rows if r["variant"] == name] for name in base.THREE}
    names = {"xlabel": sweep, "ylabel": "" if column else unit}
    plot.lines(axes[line][column], sizes, curves, log=True, **names)
  plot.legend(figure)
  return figure


@question(base.MS, base.MS_OF_BF16, base.TEMP, base.TEMP_OF_BF16, draw=draw_growth)
def growth() -> Iterator[Case]:
  """How do time and memory grow with tokens, widths, layers and the length of the history?

  A layer of 4096 by 4096 and 8192 tokens, one size changed at a time, and stacks of MLPs under
  ``nn.scan``; all in bfloat16, forward and backward. The stacks have a loss, as in ``traffic``.
  """
  for sweep, values in SWEEPS.items():
    for size, name in itertools.product(values, base.THREE):
      measure = functools.partial(grown, sweep, size, name)
      yield f"{sweep} {size:,}", name, measure, {"sweep": sweep, "size": size}


def grown(sweep: str, size: int, name: str, target: str) -> Figures:
  """A layer, or a stack, with one size changed."""
  variant = base.THREE[name]
  if sweep == "history" and name == "delayed":
    variant = Variant(recipe=fp8.DelayedScaling(amax_history_len=size))
  if sweep == "history" and name == FLAX:
    variant = Variant(flax=True, history=size)
  sizes = {"tokens": 8192, "width": 4096, "features": 4096} | {sweep: size}
  module: nn.Module = dense(sizes["features"], variant)
  if sweep == "layers":
    module, sizes["width"] = Stack(Mlp, (variant,), size, scan=True), 2048
  x = array(sizes["tokens"], sizes["width"])
  how = {"loss": sweep == "layers", "max_grad": name == "delayed"}
  return explain_step(module, x, target, **how)


@question(base.MS_OF_BF16, extra("launches", "kernels"))
def size_rule() -> Iterator[Case]:
  """From what size of a kernel does FP8 pay?

  Square layers, float32 parameters, forward and backward. Below 1, FP8 is faster.
  ``launches`` are kernels beyond BF16's. Fp8Config(min_kernel_size=...) is the rule that follows.
  """
  for tokens, side in itertools.product((2048, 16384), (256, 512, 1024, 2048, 4096, 8192)):
    for name in (BF16, *RECIPES):
      measure = functools.partial(layer, Shape(tokens, side, side), VARIANTS[name])
      yield f"{tokens:,} tokens, {side} x {side}", name, measure, {}
