"""What travels between eight GPUs in a train step, and does FP8 change that?

    python benchmarks/collectives.py         # no GPU needed; about ten minutes on one CPU core

The blocks of ``train_lm.py``, 12 of them of width 2048, and 16 windows of 1024 bytes, in BF16 and
with delayed scaling, compiled for eight described H100 and never run: data parallel, FSDP, tensor
parallel (kernels split as in Megatron), and FSDP over four with tensor parallel over two; layers
one after the other, and under ``nn.scan``. ``amax`` are the all-reduces that take a maximum: an
amax of each tensor of each layer, merged by the compiler. ``GiB sent`` are those of one device, by
ring algorithms. A collective in a loop counts as often as the loop runs.
"""

import argparse
import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

import flax_fp8 as fp8
from flax_fp8.doctor import allow_missing_cuda
from lm.config import PRESETS
from lm.model import Block, ModelShape, norm
from lm.report import environment
from lm.step import optimizer, train_step
from recipe_cost import RESULTS

TARGET = "h100"
SHAPE = ModelShape(d_model=2048, d_ff=8192, layers=12, heads=16, kv_heads=8)
RECIPES = {"BF16": None, "delayed": fp8.DelayedScaling().dot_general_cls}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """How a step is split over eight GPUs.

  Attributes:
    data: devices that share the batch.
    model: devices that share a kernel as tensor parallelism does.
    fsdp: whether the devices that share the batch also share the kernels.
  """

  data: int
  model: int
  fsdp: bool

  @property
  def mesh(self) -> AbstractMesh:
    """The devices."""
    return AbstractMesh((self.data, self.model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

  def spec(self, names: Sequence[str], ndim: int) -> P:
    """How a leaf of the train state is split; kernels only."""
    if names[-1] != "kernel" or "head" in names:
      return P()
    split = ("data" if self.fsdp else None, "model")
    return P(*(None,) * (ndim - 2), *(reversed(split) if names[-2] in ("out", "down") else split))


LAYOUTS = {
  "data parallel": Layout(data=8, model=1, fsdp=False),
  "FSDP": Layout(data=8, model=1, fsdp=True),
  "tensor parallel": Layout(data=1, model=8, fsdp=False),
  "FSDP and tensor parallel": Layout(data=4, model=2, fsdp=True),
}


class Split(nn.Module):
  """A block whose residual stream is split along the batch."""

  shape: ModelShape
  dot_general_cls: Any

  @nn.compact
  def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
    """Takes and gives the residual stream."""
    x = jax.lax.with_sharding_constraint(x, P("data"))
    return Block(self.shape, dot_general_cls=self.dot_general_cls, name="block")(x, None)


class Decoder(nn.Module):
  """``lm.model.Transformer`` on a mesh.

  Attributes:
    shape: the sizes.
    scan: whether the layers are under ``nn.scan``.
    dot_general_cls: what makes the projections' GEMMs; None for BF16.
  """

  shape: ModelShape
  scan: bool
  dot_general_cls: Any

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Runs the decoder; the logits are float32."""
    vocabulary, width = self.shape.vocabulary, self.shape.d_model
    x = nn.Embed(vocabulary, width, dtype=jnp.bfloat16, name="embedding")(tokens)
    if self.scan:
      layers = fp8.scan(Split, {"params": 0}, split_rngs={"params": True}, length=self.shape.layers)
      x, _ = layers(self.shape, self.dot_general_cls, name="layers")(x, None)
    else:
      for index in range(self.shape.layers):
        x, _ = Split(self.shape, self.dot_general_cls, name=f"layer_{index}")(x, None)
    head = nn.Dense(vocabulary, use_bias=False, dtype=jnp.bfloat16, name="head")
    return head(norm("final_norm", jnp.bfloat16)(x)).astype(jnp.float32)


def explain(model: Decoder, layout: Layout, batch: int, length: int) -> fp8.Report:
  """Compiles the train step on the mesh."""
  config = dataclasses.replace(PRESETS["tiny"], shape=model.shape)

  def create(key: jax.Array) -> fp8.TrainState:
    with jax.sharding.use_abstract_mesh(layout.mesh):
      variables = model.init(key, jnp.zeros((layout.data, length), jnp.int32))
    return fp8.TrainState.create(apply_fn=model.apply, params=variables, tx=optimizer(config))

  def place(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
    names = [str(getattr(key, "key", key)) for key in path]
    sharding = NamedSharding(layout.mesh, layout.spec(names, leaf.ndim))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  state = jax.tree_util.tree_map_with_path(place, jax.eval_shape(create, jax.random.key(0)))
  rows = NamedSharding(layout.mesh, P("data"))
  windows = jax.ShapeDtypeStruct((batch, length + 1), jnp.uint8, sharding=rows)
  out = jax.tree.map(lambda leaf: leaf.sharding, state), NamedSharding(layout.mesh, P())
  step = jax.jit(train_step, donate_argnums=0, out_shardings=out)
  return fp8.explain(step, state, windows, target=TARGET, mesh=layout.mesh)


def figures(report: fp8.Report) -> dict[str, Any]:
  """Sums up what travels."""
  counts: Counter[str] = Counter()
  gib: Counter[str] = Counter()
  amax = [each for each in report.collectives if each.reduction == "maximum"]
  for each in report.collectives:
    if each.reduction != "maximum":
      counts[f"{each.kind} {each.dtype}"] += each.times
      gib[f"{each.kind} {each.dtype}"] += each.sent / 2**30
  return {
    "amax": sum(each.times for each in amax),
    "amax_bytes": sum(each.times * each.bytes for each in amax),
    "counts": dict(sorted(counts.items())),
    "gib": {name: round(size, 3) for name, size in sorted(gib.items())},
    "gib_sent": round(sum(each.sent for each in report.collectives) / 2**30, 3),
    "fp8_gemms": report.fp8_gemms,
    "gemms": report.total_gemms,
  }


def measure(
  shape: ModelShape,
  console: Console,
  *,
  layouts: Sequence[str] = tuple(LAYOUTS),
  scans: Sequence[bool] = (False, True),
  recipes: Sequence[str] = tuple(RECIPES),
  batch: int = 16,
  length: int = 1024,
) -> dict[str, dict[str, dict[str, Any]]]:
  """Compiles every case: figures by stack and layout, then by recipe."""
  found: dict[str, dict[str, dict[str, Any]]] = {}
  for scan in scans:
    for layout in layouts:
      title = f"{'nn.scan' if scan else 'unrolled'}, {layout}"
      found[title] = {}
      for recipe in recipes:
        with console.status(f"compiling {title}, {recipe}"):
          model = Decoder(shape, scan, RECIPES[recipe])
          found[title][recipe] = figures(explain(model, LAYOUTS[layout], batch, length))
  return found


def table(found: dict[str, dict[str, dict[str, Any]]]) -> Table:
  """One row a program."""
  grid = Table(title="A train step on eight H100")
  for heading in ("", "", "amax", "bytes", "GiB sent", "of which"):
    grid.add_column(heading)
  for title, by_recipe in found.items():
    for recipe, case in by_recipe.items():
      parts = [f"{name} {size:.2f}" for name, size in case["gib"].items() if size >= 0.01]
      row = (str(case["amax"]), str(case["amax_bytes"]), f"{case['gib_sent']:.2f}")
      grid.add_row(title, recipe, *row, ", ".join(parts))
  return grid


def main() -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--layers", type=int, default=SHAPE.layers)
  parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
  arguments = parser.parse_args()
  allow_missing_cuda()
  console = Console()
  found = measure(dataclasses.replace(SHAPE, layers=arguments.layers), console)
  console.print(table(found))
  arguments.out.mkdir(parents=True, exist_ok=True)
  document = {"environment": environment(), "layers": arguments.layers, "cases": found}
  (arguments.out / "collectives.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
  main()
