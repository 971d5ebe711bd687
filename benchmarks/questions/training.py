"""The question about the whole train step of ``step.py``."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_fp8 as fp8
from harness import output, plot, timed
from harness.models import Decoder, Mlp, Stack
from harness.names import BF16, BLOCK, FLAX
from harness.table import Column
from harness.train import WIDTHS, decoder, first_state, train_step
from harness.variants import RECIPES, VARIANTS, Variant
from lm.config import ModelShape
from questions import base
from questions.base import Case, Figures, array, figures, question, ratio
from questions.layers import explain_step

GPUS = 8
MESH = AbstractMesh((GPUS,), ("data",), axis_types=(AxisType.Auto,))
NAMES = (BF16, FLAX, *RECIPES, BLOCK)
# Layers, remat, nn.scan, and whether 8 GPUs share the step.
STEPS: dict[str, tuple[int, bool, bool, bool]] = {
  "nn.scan, all kept": (2, False, True, False),
  "nn.scan, remat": (2, True, True, False),
  "unrolled, all kept": (2, False, False, False),
  "FSDP, unrolled, all kept": (2, False, False, True),
  "FSDP, nn.scan, remat": (2, True, True, True),
  "12 layers, nn.scan, remat": (12, True, True, False),
}
MLPS = "8 MLPs, nn.scan, all kept"
NOTE = f"{output.COMPILED}; an elementwise product stands for attention; ms are estimated"


def draw(content: Mapping[str, Any]) -> Any:
  """Draws the speed of each variant by the estimate of time."""
  found: dict[str, dict[str, Any]] = {}
  for row in content["rows"]:
    own = found.setdefault(row["case"], {})
    first = next(iter(own.values()), row)
    own[row["variant"]] = row | {"speed": first["estimated_ms"] / row["estimated_ms"]}
  figure = plot.make_figure("A train step, estimated", content, (13, 4.5))
  timed.bars(figure.subplots(), found, "speed, BF16 = 1", "speed")
  plot.legend(figure)
  return figure


@question(
  *(base.GEMMS, base.KERNELS, Column("MiB outside GEMMs", "{mib_outside_gemms:,.0f}")),
  *(base.TEMP, Column("MiB sent", "{mib_sent:,.0f}"), Column("ms", "{estimated_ms:.2f}")),
  *(ratio("of BF16", "estimated_ms"), ratio("of Flax's", "estimated_ms", "flax")),
  note=NOTE,
  draw=draw,
)
def step_compiled(shape: ModelShape = WIDTHS, length: int = 8192) -> Iterator[Case]:
  """How fast is a whole train step in FP8, by the estimate of time?

  Layers of Llama 3 8B's widths between an embedding and a head of 128,256 tokens: gradients and
  AdamW, float32 parameters, 8,192 tokens a GPU, two layers where no number is given. The state is
  donated. An elementwise product stands for attention in every variant, because cuDNN's cannot be
  compiled without cuDNN. With remat, the backward pass recomputes everything but the amaxes of
  ``current`` and ``rowwise`` (``fp8.remat_policies.save_fp8_scales``). ``ms`` are
  ``Report.estimated_seconds``.

  FSDP shares a batch of eight sequences between eight GPUs. Kernels, embedding, head and their Adam
  moments are split along their last axis, the features. Norms and FP8 state are on every GPU. The
  residual stream is split along the batch. XLA then gathers each BF16 kernel once, and once more
  with remat. For embedding and head it sends activations instead, which are smaller.

  The MLPs are those of ``traffic``: forward and backward in bfloat16, of a loss.
  """
  for case, (layers, remat, scan, fsdp) in STEPS.items():
    own = dataclasses.replace(shape, layers=layers, remat=remat)
    for name in NAMES:
      model = decoder(own, VARIANTS[name], "mix", scan=scan, split=fsdp)
      how = (explain_fsdp if fsdp else explain_one, model, VARIANTS[name], length)
      yield case, name, functools.partial(*how), {}
  for name in NAMES:
    yield MLPS, name, functools.partial(explain_mlps, VARIANTS[name], length), {}


def jitted(model: Decoder, variant: Variant, **how: Any) -> Callable[..., Any]:
  return jax.jit(functools.partial(train_step, model, variant), donate_argnums=0, **how)


def explain_one(model: Decoder, variant: Variant, length: int, target: str) -> Figures:
  """A step of one GPU over one sequence."""
  state = jax.eval_shape(lambda: first_state(model, length))
  windows = jax.ShapeDtypeStruct((1, length + 1), jnp.int32)
  return figures(fp8.explain(jitted(model, variant), state, windows, target=target))


def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """A leaf of the train state, as it is split between GPUs."""
  is_split = getattr(path[-1], "key", None) in ("kernel", "embedding")
  spec = P(*(None,) * (leaf.ndim - 1), "data") if is_split else P()
  return leaf.update(sharding=NamedSharding(MESH, spec))


def explain_fsdp(model: Decoder, variant: Variant, length: int, target: str) -> Figures:
  """A step of eight GPUs, each with one sequence and an eighth of the parameters."""
  with jax.sharding.use_abstract_mesh(MESH):
    state = jax.eval_shape(lambda: first_state(model, length, GPUS))
  state = jax.tree_util.tree_map_with_path(place, state)
  rows = NamedSharding(MESH, P("data"))
  windows = jax.ShapeDtypeStruct((GPUS, length + 1), jnp.int32, sharding=rows)
  step = jitted(model, variant, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, state))
  return figures(fp8.explain(step, state, windows, target=target, mesh=MESH))


def explain_mlps(variant: Variant, length: int, target: str) -> Figures:
  """Forward and backward of eight MLPs."""
  stack = Stack(Mlp, (variant,), 8, scan=True)
  max_grad = isinstance(variant.recipe, fp8.DelayedScaling)
  return explain_step(stack, array(length, 2048), target, loss=True, max_grad=max_grad)
