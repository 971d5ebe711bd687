"""What does XLA make of FP8 programs? Everything here is compiled for a described GPU, never run.

    python benchmarks/compiled.py QUESTION               # no GPU needed; minutes on one CPU core
    python benchmarks/compiled.py traffic --cases 'Dense*' --variants delayed --target b200

QUESTION is one of

{questions}
Each program is compiled in BF16, with ``flax.linen.fp8_ops`` and with recipes of ``flax_fp8``. The
table compares each with the first program of its case. ``kernels`` are all that run, GEMMs too.
``MiB`` are read and written by kernels other than GEMMs. ``temp MiB`` is what the program allocates
beside its arguments and results. ``ms`` is a roofline,

    sum over kernels of max(FLOPs / peak rate, bytes / memory bandwidth)

by data-sheet rates: a lower bound without launches. It compares programs and predicts no time.
"""

import dataclasses
import functools
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

import flax_fp8 as fp8
from flax_fp8.doctor import allow_missing_cuda
from flax_fp8.meta_dtype import to_float32
from harness import output, plot
from harness.environment import environment
from harness.models import FLOAT32_PARAMS, Block, Decoder, Heads, Mlp, Stack, SwiGLU, dense
from harness.names import BF16, FLAX, label
from harness.sizes import Shape, Sizes
from harness.table import Column, Row, print_table
from harness.variants import OTHERS, RECIPES, VARIANTS, Variant
from lm.config import PRESETS
from lm.model import ModelShape
from lm.step import optimizer, train_step

MIB, GIB = 2**20, 2**30
THREE = {name: VARIANTS[name] for name in (BF16, FLAX, "delayed")}
Figures: TypeAlias = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
  """A program to compile.

  Attributes:
    case: its name.
    variant: name of its GEMMs' variant.
    measure: compiles it for a GPU and returns its figures.
    known: figures that need no compiler.
  """

  case: str
  variant: str
  measure: Callable[[str], Figures]
  known: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
  """One question.

  Attributes:
    asks: the question and its programs, for the help.
    cases: the programs; the first of each case is what the others are compared with.
    columns: of the table, after case and variant.
    targets: GPUs, unless ``--target`` names others.
    note: how the numbers were made.
    draw: draws the JSON; None where a table is enough.
  """

  asks: str
  cases: Callable[[], Iterable[Case]]
  columns: tuple[Column, ...]
  targets: tuple[str, ...] = ("h100",)
  note: str = output.COMPILED
  draw: Callable[[Mapping[str, Any]], Any] | None = None


def figures(report: fp8.Report) -> Figures:
  """The numbers of a compiled program."""
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


def extra(heading: str, key: str, form: str = "+,.0f") -> Column:
  """What a program has beyond the first of its case."""
  first = lambda row: row is row["base"]
  return Column(
    heading, lambda row: "" if first(row) else format(row[key] - row["base"][key], form)
  )


def ratio(heading: str, key: str) -> Column:
  """A figure over that of the first program of its case."""
  cell = lambda row: f"{row[key] / row['base'][key]:.2f}" if row["base"][key] >= 0.01 else "-"
  return Column(heading, cell)


GEMMS = Column("FP8 GEMMs", "{fp8_gemms}/{gemms}")
KERNELS = Column("kernels", "{kernels:,}")
MOVED = Column("MiB", "{mib_outside_gemms:,.0f}")
TEMP = Column("temp MiB", "{temp_mib:,.0f}")
MS = Column("ms", "{roofline_ms:.2f}")


def explain_step(
  module: nn.Module,
  x: jax.ShapeDtypeStruct,
  target: str,
  *,
  max_grad: bool = False,
  metrics: bool = False,
  descend: bool = False,
) -> Figures:
  """Forward and backward of a module, from an output gradient that is an argument.

  Args:
    module: what is differentiated.
    x: its input.
    target: the GPU.
    max_grad: cast the state, as ``fp8.value_and_grad`` does.
    metrics: add ``fp8.add_metrics`` to the state.
    descend: take a step of gradient descent too.
  """
  variables: Any = jax.eval_shape(module.init, jax.random.key(0), x)
  variables = fp8.add_metrics(module, variables, x) if metrics else variables
  grad = jax.eval_shape(module.apply, variables, x)

  def step(variables: Any, x: jax.Array, grad: Any) -> Any:
    cast = fp8.as_max_grad(variables) if max_grad else variables
    out, pull_back = jax.vjp(module.apply, cast, x)
    grads, x_grad = jax.tree.map(to_float32, pull_back(grad))
    if not descend:
      return out, (grads, x_grad)
    overwrite, grads = fp8.partition_for_grad_overwrite(grads)
    updates = jax.tree.map(lambda grad: -1e-3 * grad, grads)
    return out, x_grad, fp8.apply_updates(variables, updates, overwrite)

  return figures(fp8.explain(step, variables, x, grad, target=target))


def array(*shape: int) -> jax.ShapeDtypeStruct:
  """A bfloat16 array."""
  return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def layer(shape: Shape, variant: Variant, target: str, *, metrics: bool = False) -> Figures:
  """Forward and backward of a layer whose parameters are float32."""
  module = dense(shape.features, variant, dtypes=FLOAT32_PARAMS)
  return explain_step(module, array(shape.tokens, shape.width), target, metrics=metrics)


def traffic() -> Iterator[Case]:
  """Layers, a block, and stacks of eight MLPs."""
  llama = Sizes()
  stack = lambda variant, **how: Stack(Mlp, (variant,), 8, **how)
  block = lambda variant: Stack(Block, (llama, variant, "mix"))
  layers = (Shape(8192, 4096, 4096), Shape(15872, 4096, 16384))
  models: Mapping[str, tuple[Any, jax.ShapeDtypeStruct, Figures]] = {
    f"Dense {each.width} x {each.features}": (
      functools.partial(dense, each.features),
      array(each.tokens, each.width),
      {"floor_mib": layer_floor(each)},
    )
    for each in layers
  } | {
    "Llama 3 8B block": (block, array(8192, 4096), {}),
    "8 MLPs, unrolled": (stack, array(8192, 2048), {}),
    "8 MLPs, nn.scan": (functools.partial(stack, scan=True), array(8192, 2048), {}),
    "8 MLPs, nn.scan, remat": (
      functools.partial(stack, scan=True, remat=True),
      array(8192, 2048),
      {},
    ),
  }
  for (case, (make, x, known)), (name, variant) in itertools.product(models.items(), THREE.items()):
    ours = variant.recipe is not None
    measure = functools.partial(explain_step, make(variant), x, max_grad=ours)
    yield Case(case, name, measure, known if variant.is_fp8 else {})


def layer_floor(shape: Shape) -> float:
  """MiB that quantizing a layer's three tensors must move: bfloat16 in, two FP8 layouts out."""
  tokens, width, features = shape.tokens, shape.width, shape.features
  return 4 * (tokens * width + width * features + tokens * features) / MIB


LAYER = Shape(8192, 4096, 4096)
# The H100 has no MXFP8: these may be emulated there.
ASKED: dict[str, Variant] = {
  BF16: Variant(),
  FLAX: VARIANTS[FLAX],
  "delayed": RECIPES["delayed"],
  "delayed, first step": Variant(recipe=fp8.DelayedScaling(first_step="current")),
  "delayed, overflow": Variant(recipe=fp8.DelayedScaling(overflow="current")),
  "current": RECIPES["current"],
  "rowwise": RECIPES["rowwise"],
  "rowwise, BF16 wgrad": Variant(recipe=fp8.Float8RowwiseScaling(high_precision=("wgrad",))),
  **OTHERS,
}


def recipe_cost() -> Iterator[Case]:
  """One layer with every recipe."""
  for name, variant in ASKED.items():
    yield Case("Dense 4096 x 4096", name, functools.partial(layer, LAYER, variant))


def metrics_cost() -> Iterator[Case]:
  """One layer without metrics and with those of ``fp8.add_metrics``."""
  for name, metrics in itertools.product(("delayed", "current", "rowwise", "mxfp8"), (False, True)):
    measure = functools.partial(layer, LAYER, ASKED[name], metrics=metrics)
    yield Case(name, f"{name}, metrics" if metrics else name, measure)


def fused_cost() -> Iterator[Case]:
  """Query, key and value, and SwiGLU."""
  variants = {BF16: Variant()}
  for name in ("delayed", "current"):
    own = RECIPES[name]
    variants |= {
      f"{name}, three layers": own,
      f"{name}, fused": dataclasses.replace(own, fused="joint"),
      f"{name}, fused, separate scales": dataclasses.replace(own, fused="separate"),
    }
  modules: dict[str, Any] = {"query, key, value": Heads, "SwiGLU": SwiGLU}
  for (case, module), (name, variant) in itertools.product(modules.items(), variants.items()):
    made = module(Sizes(), variant, float32=True)
    yield Case(case, name, functools.partial(explain_step, made, array(8192, 4096), descend=True))


KEPT = "all kept"
JAX = jax.checkpoint_policies
# For each policy what BF16 and Flax take, and what ours take in its place.
POLICIES: dict[str, tuple[Any, Any]] = {
  "nothing_saveable": (JAX.nothing_saveable, JAX.nothing_saveable),
  "dots_saveable": (JAX.dots_saveable, fp8.remat_policies.dots_saveable),
  "save_fp8_inputs": (None, fp8.remat_policies.save_fp8_inputs),
  "everything_saveable": (JAX.everything_saveable, JAX.everything_saveable),
}


def memory() -> Iterator[Case]:
  """Eight MLPs: under ``nn.scan``, unrolled, and under ``nn.scan`` with each policy."""
  stacks: dict[str, Any] = {KEPT: ({"scan": True},) * 2, "unrolled": ({},) * 2} | {
    name: tuple(policy and {"scan": True, "remat": True, "policy": policy} for policy in both)
    for name, both in POLICIES.items()
  }
  for (case, hows), (name, variant) in itertools.product(stacks.items(), THREE.items()):
    how = hows[variant.recipe is not None]
    if how is not None:
      yield Case(case, name, functools.partial(gradients, variant, how))


def gradients(variant: Variant, how: Mapping[str, Any], target: str) -> Figures:
  """Gradients of the loss of eight MLPs by their float32 parameters."""
  model, x = Stack(Mlp, (variant, True), 8, **how), array(8192, 2048)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  differentiate: Any = jax.value_and_grad if variant.recipe is None else fp8.value_and_grad
  return figures(fp8.explain(differentiate(loss_of(model)), variables, x, target=target))


def loss_of(model: nn.Module) -> Callable[[Any, jax.Array], jax.Array]:
  """The mean of squares of a model's output."""

  def loss(variables: Any, x: jax.Array) -> jax.Array:
    out: Any = model.apply(variables, x)
    return jnp.mean(jnp.square(out.astype(jnp.float32)))

  return loss


def again(row: Row) -> str:
  """GEMMs of a layer that the backward pass computes again."""
  return f"{(row['gemms'] - 6 * 8) / 8:.0f}"


def of_kept(row: Row) -> str:
  """Temporary memory over BF16's where everything is kept."""
  first = row["first"]
  return f"{row['temp_mib'] / first['temp_mib']:.2f}" if first["case"] == KEPT else ""


def microbatches() -> Iterator[Case]:
  """16,384 tokens in microbatches, by four scanned and rematted MLPs."""
  for tokens, (name, variant) in itertools.product((1024, 2048, 4096, 8192, 16384), THREE.items()):
    yield Case(f"{tokens:,}", name, functools.partial(accumulate, tokens, variant))


def accumulate(tokens: int, variant: Variant, target: str) -> Figures:
  """Gradients accumulated over microbatches of so many tokens."""
  model = Stack(Mlp, (variant, True), 4, scan=True, remat=True)
  x = array(16384 // tokens, tokens, 2048)
  variables = jax.eval_shape(model.init, jax.random.key(0), x.update(shape=x.shape[1:]))
  add: Any = add_by_hand if variant.recipe is None else fp8.accumulate_gradients
  step = lambda variables, x: add(loss_of(model), variables, x)
  return figures(fp8.explain(step, variables, x, target=target))


def add_by_hand(loss: Any, variables: Any, microbatches: jax.Array) -> Any:
  """Adds gradients as one does without this package; each microbatch overwrites the state."""

  def step(carry: Any, x: jax.Array) -> Any:
    state, total = carry
    value, grads = jax.value_and_grad(loss)({**variables, **state}, x)
    state = {key: grads[key] for key in state}
    return (state, jax.tree.map(jnp.add, total, grads["params"])), value

  state = {name: value for name, value in variables.items() if name != "params"}
  nothing = jax.tree.map(jnp.zeros_like, variables["params"])
  (state, total), values = lax.scan(step, (state, nothing), microbatches)
  return jnp.mean(values), {**state, "params": total}


SWEEPS: dict[str, tuple[int, ...]] = {
  "tokens": tuple(2**n for n in range(10, 17)),
  "width": tuple(2**n for n in range(9, 15)),
  "features": tuple(2**n for n in range(9, 15)),
  "layers": tuple(2**n for n in range(6)),
  "history": (1, 16, 256, 1024, 16384),
}


def growth() -> Iterator[Case]:
  """A layer, one size changed at a time, and stacks of MLPs under ``nn.scan``."""
  for sweep, values in SWEEPS.items():
    for size, name in itertools.product(values, THREE):
      measure = functools.partial(grown, sweep, size, name)
      yield Case(f"{sweep} {size:,}", name, measure, {"sweep": sweep, "size": size})


def grown(sweep: str, size: int, name: str, target: str) -> Figures:
  """A layer of 4096 by 4096 and 8192 tokens, or a stack, with one size changed."""
  variant = THREE[name]
  if sweep == "history" and name == "delayed":
    variant = Variant(recipe=fp8.DelayedScaling(amax_history_len=size))
  if sweep == "history" and name == FLAX:
    variant = Variant(flax=True, history=size)
  sizes = {"tokens": 8192, "width": 4096, "features": 4096} | {sweep: size}
  module: nn.Module = dense(sizes["features"], variant)
  if sweep == "layers":
    module, sizes["width"] = Stack(Mlp, (variant,), size, scan=True), 2048
  x, ours = array(sizes["tokens"], sizes["width"]), variant.recipe is not None
  return explain_step(module, x, target, max_grad=ours)


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
    curves = {name: [r[key] for r in rows if r["variant"] == name] for name in THREE}
    names = {"xlabel": sweep, "ylabel": unit if column == 0 else ""}
    plot.lines(axes[line][column], sizes, curves, log=True, **names)
  plot.legend(figure)
  return figure


def size_rule() -> Iterator[Case]:
  """Square layers with each recipe."""
  sides = (256, 512, 1024, 2048, 4096, 8192)
  for tokens, side in itertools.product((2048, 16384), sides):
    for name, variant in {BF16: Variant(), **RECIPES}.items():
      measure = functools.partial(layer, Shape(tokens, side, side), variant)
      yield Case(f"{tokens:,} tokens, {side} x {side}", name, measure)


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a step is split over eight GPUs.

  Attributes:
    data: devices that share the batch.
    model: devices that share a kernel, as in tensor parallelism.
    fsdp: whether the devices that share the batch also share the kernels.
  """

  data: int
  model: int
  fsdp: bool

  @property
  def mesh(self) -> AbstractMesh:
    """The devices."""
    return AbstractMesh((self.data, self.model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

  def place(self, path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
    """A leaf of the train state, as it is split; only kernels are, and not the head's."""
    names, spec = [str(getattr(key, "key", key)) for key in path], P()
    if names[-1] == "kernel" and "head" not in names:
      split = ("data" if self.fsdp else None, "model")
      split = tuple(reversed(split)) if names[-2] in ("out", "down") else split
      spec = P(*(None,) * (leaf.ndim - 2), *split)
    sharding = NamedSharding(self.mesh, spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


LAYOUTS = {
  "data parallel": Layout(8, 1, fsdp=False),
  "FSDP": Layout(8, 1, fsdp=True),
  "tensor parallel": Layout(1, 8, fsdp=False),
  "FSDP and tensor parallel": Layout(4, 2, fsdp=True),
}
WIDE = ModelShape(d_model=2048, d_ff=8192, layers=12, heads=16, kv_heads=8)


def collectives(shape: ModelShape = WIDE, length: int = 1024) -> Iterator[Case]:
  """A train step of ``train_lm.py``'s decoder on eight GPUs."""
  for scan, (name, layout) in itertools.product((False, True), LAYOUTS.items()):
    for variant in (BF16, "delayed"):
      model = Decoder(shape, VARIANTS[variant].dot_general_cls, scan, split=True)
      case = f"{'nn.scan' if scan else 'unrolled'}, {name}"
      yield Case(case, variant, functools.partial(travelled, model, layout, length))


def make_state(model: Decoder, rows: int, length: int) -> fp8.TrainState:
  """The train state of a decoder, with the optimizer of ``train_lm.py``."""
  config = dataclasses.replace(PRESETS["tiny"], shape=model.shape)
  variables = model.init(jax.random.key(0), jnp.zeros((rows, length), jnp.int32))
  return fp8.TrainState.create(apply_fn=model.apply, params=variables, tx=optimizer(config))


def travelled(model: Decoder, layout: Layout, length: int, target: str) -> Figures:
  """What travels in a train step over 16 windows."""
  with jax.sharding.use_abstract_mesh(layout.mesh):
    state = jax.eval_shape(lambda: make_state(model, layout.data, length))
  state = jax.tree_util.tree_map_with_path(layout.place, state)
  rows = NamedSharding(layout.mesh, P("data"))
  windows = jax.ShapeDtypeStruct((16, length + 1), jnp.uint8, sharding=rows)
  out = jax.tree.map(lambda leaf: leaf.sharding, state), NamedSharding(layout.mesh, P())
  step = jax.jit(train_step, donate_argnums=0, out_shardings=out)
  return sent(fp8.explain(step, state, windows, target=target, mesh=layout.mesh))


def sent(report: fp8.Report) -> Figures:
  """Sums up a program's collectives; those in a loop count as often as the loop runs."""
  counts: Counter[str] = Counter()
  gib: dict[str, float] = defaultdict(float)
  amax = [each for each in report.collectives if each.reduction == "maximum"]
  for each in report.collectives:
    if each.reduction != "maximum":
      counts[f"{each.kind} {each.dtype}"] += each.times
      gib[f"{each.kind} {each.dtype}"] += each.sent / GIB
  return {
    "amax": sum(each.times for each in amax),
    "amax_bytes": sum(each.times * each.bytes for each in amax),
    "counts": dict(sorted(counts.items())),
    "gib": {name: round(size, 3) for name, size in sorted(gib.items())},
    "gib_sent": round(sum(each.sent for each in report.collectives) / GIB, 3),
    "fp8_gemms": report.fp8_gemms,
    "gemms": report.total_gemms,
  }


def parts(row: Row) -> str:
  """GiB by collective."""
  return ", ".join(f"{name} {size:.2f}" for name, size in row["gib"].items() if size >= 0.01)


def explain_cost() -> Iterator[Case]:
  """A train step at Llama 3 8B's widths and 8192 tokens."""
  for scan, layers in itertools.product((True, False), (1, 2, 4, 8, 12)):
    case = f"{layers} layers, {'nn.scan' if scan else 'unrolled'}"
    known = {"layers": layers, "scan": scan}
    yield Case(case, "delayed", functools.partial(in_child, layers, scan), known)


def in_child(layers: int, scan: bool, target: str) -> Figures:
  """Explains a step in a process of its own."""
  code = f"import compiled; compiled.explain_here({layers}, {scan}, {target!r})"
  environ = os.environ | {"JAX_PLATFORMS": "cpu"}
  where: dict[str, Any] = {"env": environ, "cwd": output.ROOT / "benchmarks"}
  done = subprocess.run(
    [sys.executable, "-c", code], **where, stdout=subprocess.PIPE, text=True, check=True
  )
  return json.loads(done.stdout.splitlines()[-1])


def explain_here(layers: int, scan: bool, target: str) -> None:
  """Prints what it costs to explain a train step, from the call to the printed report."""
  allow_missing_cuda()
  shape = ModelShape(d_model=4096, d_ff=14336, layers=layers, heads=32, kv_heads=8)
  model = Decoder(shape, fp8.Fp8DotGeneral, scan)
  state = jax.eval_shape(lambda: make_state(model, 1, 4096))
  windows = jax.ShapeDtypeStruct((2, 4097), jnp.uint8)
  begun = time.perf_counter()
  report = fp8.explain(jax.jit(train_step, donate_argnums=0), state, windows, target=target)
  text = str(report)
  seconds = time.perf_counter() - begun
  assert report.fp8_gemms == 21 * layers, text  # seven projections, three GEMMs each
  who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
  gib = sum(resource.getrusage(each).ru_maxrss for each in who) / MIB  # Linux counts KiB
  counts = {"gemms": report.total_gemms, "kernels": report.launches}
  print(json.dumps({"seconds": seconds, "gib": gib, **counts}))


def draw_explain_cost(content: Mapping[str, Any]) -> Any:
  """Seconds and GiB against the number of layers."""
  figure = plot.make_figure("fp8.explain of a train step at Llama 3 8B's widths", content, (8, 3.5))
  for axes, key, unit in zip(
    figure.subplots(1, 2), ("seconds", "gib"), ("seconds", "memory, GiB"), strict=True
  ):
    for scan, name, style in ((True, "nn.scan", "o-"), (False, "unrolled", "s--")):
      rows = [row for row in content["rows"] if row["scan"] is scan]
      points = [[row["layers"] for row in rows], [row[key] for row in rows]]
      axes.plot(*points, style, color=plot.color("delayed"), label=f"{label('delayed')}, {name}")
    axes.set(xlabel="layers", ylabel=unit, ylim=(0, None))
  plot.legend(figure)
  return figure


LAYER_TEXT = "One Dense of 4096 by 4096, 8192 tokens, float32 parameters, forward and backward."
QUESTIONS = {
  "traffic": Question(
    asks="What moves besides GEMMs, in a layer, a block and a stack? All in bfloat16, forward and "
    "backward; ``floor`` reads each tensor once and writes each of its two FP8 layouts once.",
    cases=traffic,
    columns=(
      *(GEMMS, KERNELS, MOVED, extra("over BF16", "mib_outside_gemms")),
      *(Column("floor", "{floor_mib:,.0f}"), TEMP, ratio("of BF16", "temp_mib")),
    ),
  ),
  "recipe_cost": Question(
    asks=f"What does each recipe cost? {LAYER_TEXT}",
    cases=recipe_cost,
    columns=(GEMMS, KERNELS, MOVED, extra("extra MiB", "mib_outside_gemms"), TEMP, MS),
    targets=("h100", "b200"),
  ),
  "fused_cost": Question(
    asks="What do fused projections save? Llama 3 8B's widths, 8192 tokens, float32 parameters; "
    "forward, backward and a step of gradient descent.",
    cases=fused_cost,
    columns=(GEMMS, KERNELS, MOVED, TEMP, MS),
  ),
  "metrics_cost": Question(
    asks=f"What do metrics cost? {LAYER_TEXT}",
    cases=metrics_cost,
    columns=(
      *(KERNELS, extra("extra", "kernels"), MOVED, extra("extra", "mib_outside_gemms")),
      *(TEMP, extra("extra", "temp_mib"), MS, extra("extra", "roofline_ms", "+.2f")),
    ),
  ),
  "memory": Question(
    asks="How much temporary memory does a step take, by policy of recomputation? Gradients of "
    "eight MLPs 2048/8192 after an RMSNorm, 8192 tokens, float32 parameters; ``again`` are GEMMs "
    "of a layer that the backward pass computes once more.",
    cases=memory,
    columns=(
      *(TEMP, ratio("of BF16", "temp_mib"), Column(f"of BF16, {KEPT}", of_kept)),
      *(Column("again", again), MOVED),
    ),
  ),
  "microbatches": Question(
    asks="What does it cost to split a batch into microbatches? Gradients of four scanned and "
    "rematted MLPs 2048/8192 over 16,384 tokens, float32 parameters; a case is the tokens of one.",
    cases=microbatches,
    columns=(MS, ratio("of BF16", "roofline_ms"), MOVED, TEMP),
  ),
  "growth": Question(
    asks="How do time and memory grow with tokens, widths, layers and the length of the history? "
    "All in bfloat16, forward and backward; a plot too.",
    cases=growth,
    columns=(MS, ratio("of BF16", "roofline_ms"), TEMP, ratio("of BF16", "temp_mib")),
    draw=draw_growth,
  ),
  "size_rule": Question(
    asks="From what size of a kernel does FP8 pay? Ratios below 1 say so; ``launches`` are kernels "
    "beyond BF16's. Fp8Config(min_kernel_size=...) is the rule that follows.",
    cases=size_rule,
    columns=(ratio("of BF16's ms", "roofline_ms"), extra("launches", "kernels")),
  ),
  "collectives": Question(
    asks="What travels between eight GPUs in a train step? 12 layers of width 2048, 16 windows of "
    "1024 bytes; ``amax`` are all-reduces of a maximum; GiB are sent by one device, in rings.",
    cases=collectives,
    columns=(
      *(Column("amax", "{amax}"), Column("bytes", "{amax_bytes:,}")),
      *(Column("GiB sent", "{gib_sent:.2f}"), Column("GiB by collective", parts, left=True)),
    ),
  ),
  "explain_cost": Question(
    asks="What does it cost to explain a train step? Llama 3 8B's widths, 8192 tokens; seconds and "
    "resident memory of both processes, on this machine's CPU; a plot too.",
    cases=explain_cost,
    columns=(
      *(Column("GEMMs", "{gemms:,}"), KERNELS),
      *(Column("seconds", "{seconds:.1f}"), Column("GiB", "{gib:.2f}")),
    ),
    targets=("h200",),
    note="explained on two CPU cores",
    draw=draw_explain_cost,
  ),
}


def matches(name: str, patterns: Sequence[str] | None) -> bool:
  """Whether a name is one of some globs."""
  return not patterns or any(fnmatch(name, pattern) for pattern in patterns)


def choose(
  question: Question, patterns: Sequence[str] | None, variants: Sequence[str] | None
) -> list[Case]:
  """The cases that are asked for; the first program of each is always among them."""
  chosen, seen = list[Case](), set[str]()
  for each in question.cases():
    if matches(each.case, patterns) and (each.case not in seen or matches(each.variant, variants)):
      chosen.append(each)
    seen.add(each.case)
  return chosen


def measure(cases: Sequence[Case], targets: Iterable[str], console: Console) -> list[Figures]:
  """Compiles each case for each GPU: one row each.

  Raises:
    ValueError: a baseline is not BF16. No ratio to it would mean anything.
  """
  rows: list[Figures] = []
  for target, each in itertools.product(targets, cases):
    name = f"{each.case}, {each.variant} for {target}"
    with console.status(name):
      found = each.measure(target)
    if each.variant == BF16 and found.get("operands", ["bf16"]) != ["bf16"]:
      raise ValueError(f"{name}: the baseline must be BF16; got {found['operands']}.")
    names = {"case": each.case, "variant": each.variant, "target": target}
    rows.append({**names, **found, **each.known})
  return rows


def compared(rows: Iterable[Figures]) -> list[Figures]:
  """Rows with the first row of all, and the first of their case and target, the baseline."""
  linked = [dict(row) for row in rows]
  bases: dict[Any, Figures] = {}
  for row in linked:
    base = bases.setdefault((row["target"], row["case"]), row)
    row.update(base=base, first=linked[0])
  return linked


def case_name(row: Row) -> str:
  """The case, in its first row."""
  return f"{row['case']} ({row['target'].upper()})" if row is row["base"] else ""


def variant_name(row: Row) -> str:
  """The variant; a mark where the report has doubts."""
  return label(row["variant"]) + (" (?)" if row.get("doubts") else "")


def show(name: str, content: Mapping[str, Any], console: Console) -> None:
  """Prints the table, and what the reports doubt."""
  question, rows = QUESTIONS[name], compared(content["rows"])
  left = (Column("case", case_name, left=True), Column("variant", variant_name, left=True))
  print_table(console, f"{name}: {content['note']}", (*left, *question.columns), rows)
  for row in rows:
    lines = [f"(?) {row['case']}, {row['variant']}: {doubt}" for doubt in row.get("doubts", ())]
    output.say(console, *lines)


def questions() -> str:
  """The questions, for the help."""
  return "".join(f"{name}:\n  {each.asks}\n\n" for name, each in QUESTIONS.items())


def main() -> None:
  """Answers one question."""
  parser = output.make_parser((__doc__ or "").format(questions=questions()))
  parser.add_argument("question", choices=QUESTIONS, metavar="QUESTION")
  parser.add_argument("--cases", nargs="+", metavar="GLOB", help="only cases of these names")
  parser.add_argument("--variants", nargs="+", metavar="GLOB", help="only these, and the baseline")
  parser.add_argument("--target", nargs="+", metavar="GPU", help="as fp8.explain knows them")
  arguments = parser.parse_args()
  name, console = arguments.question, output.make_console()
  question = QUESTIONS[name]
  if not arguments.redraw:
    allow_missing_cuda()
    targets = arguments.target or question.targets
    rows = measure(choose(question, arguments.cases, arguments.variants), targets, console)
    made = {"environment": environment(), "note": question.note, "target": ", ".join(targets)}
    output.write_json(arguments.out, name, {**made, "rows": rows})
  show(name, output.read_json(arguments.out, name), console)
  if question.draw:
    output.redraw(arguments.out, name, question.draw)


if __name__ == "__main__":
  main()
