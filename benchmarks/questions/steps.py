"""Questions about steps: remat, microbatches, a step on a mesh, and the cost of ``explain``."""

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
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_fp8 as fp8
from flax_fp8.doctor import allow_missing_cuda
from harness import output, plot
from harness.models import Decoder, Mlp, Stack
from harness.names import BF16, label
from harness.programs import loss_of
from harness.sizes import LLAMA
from harness.table import Column, Row
from harness.variants import VARIANTS, Variant
from lm.config import PRESETS
from lm.model import Block, ModelShape
from lm.step import optimizer, train_step
from questions import base
from questions.base import Case, Figures, array, figures, question

GIB = 2**30
KEPT = "all kept"
JAX, OURS = jax.checkpoint_policies, fp8.remat_policies
# For each policy what BF16 and Flax take, and what ours take in its place.
POLICIES: dict[str, tuple[Any, Any]] = {
  "nothing_saveable": (JAX.nothing_saveable, JAX.nothing_saveable),
  "dots_saveable": (JAX.dots_saveable, OURS.dots_saveable),
  "save_fp8_inputs": (None, OURS.save_fp8_inputs),
  "everything_saveable": (JAX.everything_saveable, JAX.everything_saveable),
}


def of_kept(row: Row) -> str:
  """Temporary memory over BF16's where everything is kept, which is the first case."""
  first = row["first"]
  return f"{row['temp_mib'] / first['temp_mib']:.2f}" if first["case"] == KEPT else ""


@question(
  *(base.TEMP, base.TEMP_OF_BF16, Column(f"of BF16, {KEPT}", of_kept)),
  *(Column("again", lambda row: f"{(row['gemms'] - 6 * 8) / 8:.0f}"), base.MOVED),
)
def memory() -> Iterator[Case]:
  """How much temporary memory does a step take, by policy of recomputation?

  Gradients of eight MLPs 2048/8192 after an RMSNorm, 8192 tokens, float32 parameters. ``again`` are
  GEMMs of a layer that the backward pass computes once more.
  """
  stacks: dict[str, Any] = {KEPT: ({"scan": True},) * 2, "unrolled": ({},) * 2} | {
    name: tuple(policy and {"scan": True, "remat": True, "policy": policy} for policy in both)
    for name, both in POLICIES.items()
  }
  for (case, hows), (name, variant) in itertools.product(stacks.items(), base.THREE.items()):
    how = hows[name == "delayed"]
    if how is not None:
      yield case, name, functools.partial(gradients, variant, how), {}


def gradients(variant: Variant, how: Mapping[str, Any], target: str) -> Figures:
  """Gradients of the loss of eight MLPs by their parameters."""
  model, x = Stack(Mlp, (variant.in_float32,), 8, **how), array(8192, 2048)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  differentiate: Any = jax.value_and_grad if variant.recipe is None else fp8.value_and_grad
  return figures(fp8.explain(differentiate(loss_of(model)), variables, x, target=target))


@question(base.MS, base.MS_OF_BF16, base.MOVED, base.TEMP)
def microbatches() -> Iterator[Case]:
  """What does it cost to split a batch into microbatches?

  Gradients of four scanned and rematted MLPs over 16,384 tokens, float32 parameters. A case is the
  number of tokens of a microbatch.
  """
  sizes = (1024, 2048, 4096, 8192, 16384)
  for tokens, (name, variant) in itertools.product(sizes, base.THREE.items()):
    yield f"{tokens:,}", name, functools.partial(accumulate, tokens, variant), {}


def accumulate(tokens: int, variant: Variant, target: str) -> Figures:
  """Gradients accumulated over microbatches of so many tokens."""
  model = Stack(Mlp, (variant.in_float32,), 4, scan=True, remat=True)
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


@dataclasses.dataclass(frozen=True)
class Layout:
  """How eight GPUs share a step: the batch, a kernel, and with ``fsdp`` the batch's kernels."""

  data: int
  model: int
  fsdp: bool

  @property
  def mesh(self) -> AbstractMesh:
    return AbstractMesh((self.data, self.model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

  def place(self, path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
    """A leaf of the train state, as it is split; only kernels are, and not the head's."""
    names, spec = [str(getattr(key, "key", key)) for key in path], P()
    if names[-1] == "kernel" and "head" not in names:
      split = ("data" if self.fsdp else None, "model")
      split = tuple(reversed(split)) if names[-2] in ("out", "down") else split
      spec = P(*(None,) * (leaf.ndim - 2), *split)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(self.mesh, spec))


LAYOUTS = {
  "data parallel": Layout(8, 1, fsdp=False),
  "FSDP": Layout(8, 1, fsdp=True),
  "tensor parallel": Layout(1, 8, fsdp=False),
  "FSDP and tensor parallel": Layout(4, 2, fsdp=True),
}
WIDE = ModelShape(d_model=2048, d_ff=8192, layers=12, heads=16, kv_heads=8)
parts = lambda row: ", ".join(
  f"{name} {size:.2f}" for name, size in row["gib"].items() if size >= 0.01
)


@question(
  *(Column("amax", "{amax}"), Column("bytes", "{amax_bytes:,}")),
  *(Column("GiB sent", "{gib_sent:.2f}"), Column("GiB by collective", parts, left=True)),
)
def collectives(shape: ModelShape = WIDE, length: int = 1024) -> Iterator[Case]:
  """What travels between eight GPUs in a train step?

  The decoder of ``train_lm.py`` with 12 layers of width 2048, 16 windows of 1024 bytes. ``amax``
  are all-reduces of a maximum. GiB are sent by one device, in rings. A collective in a loop counts
  as often as the loop runs.
  """
  for scan, (name, layout) in itertools.product((False, True), LAYOUTS.items()):
    for variant in (BF16, "delayed"):
      model = Decoder(shape, Block, (shape, VARIANTS[variant].dot_general_cls), scan, split=True)
      case = f"{'nn.scan' if scan else 'unrolled'}, {name}"
      yield case, variant, functools.partial(travelled, model, layout, length), {}


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
  report = fp8.explain(step, state, windows, target=target, mesh=layout.mesh)
  counts, sent = Counter[str](), defaultdict[str, float](float)
  amax = [each for each in report.collectives if each.reduction == "maximum"]
  for each in report.collectives:
    if each.reduction != "maximum":
      counts[f"{each.kind} {each.dtype}"] += each.times
      sent[f"{each.kind} {each.dtype}"] += each.sent
  return {
    "amax": sum(each.times for each in amax),
    "amax_bytes": sum(each.times * each.bytes for each in amax),
    "counts": dict(sorted(counts.items())),
    "gib": {name: round(size / GIB, 3) for name, size in sorted(sent.items())},
    "gib_sent": round(sum(each.sent for each in report.collectives) / GIB, 3),
    "fp8_gemms": report.fp8_gemms,
    "gemms": report.total_gemms,
  }


def draw_explain_cost(content: Mapping[str, Any]) -> Any:
  """Seconds and GiB against the number of layers."""
  figure = plot.make_figure("fp8.explain of a train step at Llama 3 8B's widths", content, (8, 3.5))
  units = {"seconds": "seconds", "gib": "memory, GiB"}
  for axes, (key, unit) in zip(figure.subplots(1, 2), units.items(), strict=True):
    for scan, name, style in ((True, "nn.scan", "o-"), (False, "unrolled", "s--")):
      rows = [row for row in content["rows"] if row["scan"] is scan]
      points = [[row["layers"] for row in rows], [row[key] for row in rows]]
      axes.plot(*points, style, color=plot.color("delayed"), label=f"{label('delayed')}, {name}")
    axes.set(xlabel="layers", ylabel=unit, ylim=(0, None))
  plot.legend(figure)
  return figure


@question(
  *(Column("GEMMs", "{gemms:,}"), base.KERNELS),
  *(Column("seconds", "{seconds:.1f}"), Column("GiB", "{gib:.2f}")),
  targets=("h200",),
  note="explained on two CPU cores",
  draw=draw_explain_cost,
)
def explain_cost() -> Iterator[Case]:
  """What does it cost to explain a train step?

  Llama 3 8B's widths, 8192 tokens. Each case runs in a process of its own. Seconds are from the
  call of ``fp8.explain`` to the printed report. GiB are resident, in that process and its compiler.
  """
  for scan, layers in itertools.product((True, False), (1, 2, 4, 8, 12)):
    case = f"{layers} layers, {'nn.scan' if scan else 'unrolled'}"
    measure = functools.partial(in_child, layers, scan)
    yield case, "delayed", measure, {"layers": layers, "scan": scan}


def in_child(layers: int, scan: bool, target: str) -> Figures:
  """Explains a step in a process of its own."""
  code = f"from questions.steps import explain_here; explain_here({layers}, {scan}, {target!r})"
  how: dict[str, Any] = {"env": os.environ | {"JAX_PLATFORMS": "cpu"}, "text": True}
  printed = subprocess.check_output([sys.executable, "-c", code], cwd=output.RESULTS.parent, **how)
  return json.loads(printed.splitlines()[-1])


def explain_here(layers: int, scan: bool, target: str) -> None:
  """Prints what it costs to explain a train step."""
  allow_missing_cuda()
  shape = dataclasses.replace(LLAMA, layers=layers)
  model = Decoder(shape, Block, (shape, fp8.Fp8DotGeneral), scan)
  state = jax.eval_shape(lambda: make_state(model, 1, 4096))
  windows = jax.ShapeDtypeStruct((2, 4097), jnp.uint8)
  begun = time.perf_counter()
  report = fp8.explain(jax.jit(train_step, donate_argnums=0), state, windows, target=target)
  text = str(report)
  seconds = time.perf_counter() - begun
  assert report.fp8_gemms == 21 * layers, text  # seven projections, three GEMMs each
  who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
  gib = sum(resource.getrusage(each).ru_maxrss for each in who) / base.MIB  # Linux counts KiB
  counts = {"gemms": report.total_gemms, "kernels": report.launches}
  print(json.dumps({"seconds": seconds, "gib": gib, **counts}))
