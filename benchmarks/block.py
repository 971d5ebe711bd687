"""How much faster is a Transformer block in FP8, and a model of twelve, and in how much memory?

    python benchmarks/block.py               # needs an H100 or H200; a few minutes

A block of Llama 3 8B with 8192 tokens, all in bfloat16, forward and backward: RMSNorm, query, key
and value, rotary positions, causal attention (cuDNN's on a GPU, in bfloat16 in every variant), out,
RMSNorm, gate, up, SiLU, down. ``fused`` has one layer of query, key and value, and one of gate and
up, as ``fp8.Fp8FusedQKV`` and ``fp8.Fp8SwiGLU``. ``speedup`` is over BF16 with separate layers, the
median over rounds in which all variants ran in turn (``timed/``). The model is twelve blocks under
``fp8.scan``, which keep the results of projections and compute the rest again in the backward pass,
without embedding, head and optimiser. ``peak`` is what XLA plans for arguments, results and
temporaries; gradients of all parameters are among the results. TFLOP/s are of the projections.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.console import Console

import flax_fp8 as fp8
from lm.model import rotate
from timed import script
from timed.compiling import on_gpu, prepare_all
from timed.measure import Deadline, measure, steps
from timed.options import Options
from timed.programs import ATTENTION, Program
from timed.variants import BF16, RECIPES, VARIANTS, Variant

FUSED = {
  "BF16, fused": Variant(fused=True),
  **{f"{name}, fused": dataclasses.replace(each, fused=True) for name, each in RECIPES.items()},
}
ALL = {BF16: VARIANTS[BF16], **RECIPES, **FUSED, **VARIANTS}
BAR = 1.30  # this project's goal for the block with delayed scaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """Of a model of blocks."""

  sequences: int = 1
  length: int = 8192
  width: int = 4096
  heads: int = 32
  kv_heads: int = 8
  hidden: int = 14336
  layers: int = 12

  @property
  def tokens(self) -> int:
    """In a step."""
    return self.sequences * self.length

  @property
  def head_dim(self) -> int:
    """Width of a head."""
    return self.width // self.heads

  @property
  def kv_width(self) -> int:
    """Features of key, and of value."""
    return self.kv_heads * self.head_dim

  @property
  def flops(self) -> int:
    """Of the projections of a block, forward and backward."""
    weights = self.width * (2 * self.width + 2 * self.kv_width + 3 * self.hidden)
    return 6 * self.tokens * weights


TINY = Sizes(length=16, width=32, heads=4, kv_heads=2, hidden=48, layers=2)


def norm(name: str) -> nn.RMSNorm:
  """RMSNorm in bfloat16, its statistics in float32."""
  return nn.RMSNorm(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, name=name)


class Attention(nn.Module):
  """Causal attention, under a name of its own: its products are not judged."""

  cudnn: bool

  def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Takes heads ``[B, T, heads, head_dim]``, gives ``[B, T, heads * head_dim]``."""
    which = "cudnn" if self.cudnn else "xla"
    query, key = rotate(query), rotate(key)
    out = jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation=which)
    return out.reshape(*out.shape[:2], -1)


class Block(nn.Module):
  """A pre-norm block, as a step of a scan.

  Attributes:
    sizes: its widths.
    variant: of its GEMMs.
    cudnn: whose attention; XLA's if not.
  """

  sizes: Sizes
  variant: Variant
  cudnn: bool

  @nn.compact
  def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
    """Takes and gives the residual stream."""
    heads = self.heads(norm("before_attention")(x))
    mixed = Attention(self.cudnn, name=ATTENTION)(*heads)
    x = x + self.variant.dense(self.sizes.width, "out")(mixed)
    return x + self.mlp(norm("before_mlp")(x)), None

  def heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query, key and value, each ``[B, T, heads, head_dim]``."""
    sizes, variant = self.sizes, self.variant
    widths = {"query": sizes.width, "key": sizes.kv_width, "value": sizes.kv_width}
    if not variant.fused:
      parts = [variant.dense(width, name)(x) for name, width in widths.items()]
    elif variant.recipe is None:
      joint = variant.dense(sum(widths.values()), "qkv")(x)
      parts = jnp.split(joint, [sizes.width, sizes.width + sizes.kv_width], axis=-1)
    else:
      return fp8.Fp8FusedQKV(
        num_heads=sizes.heads,
        num_kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        use_bias=False,
        name="qkv",
        **self.in_bfloat16(variant.recipe),
      )(x)
    query, key, value = (part.reshape(*x.shape[:2], -1, sizes.head_dim) for part in parts)
    return query, key, value

  def mlp(self, x: jax.Array) -> jax.Array:
    """SwiGLU."""
    sizes, variant = self.sizes, self.variant
    if variant.fused and variant.recipe is not None:
      options = self.in_bfloat16(variant.recipe)
      return fp8.Fp8SwiGLU(hidden_features=sizes.hidden, name="mlp", **options)(x)
    if variant.fused:
      gate, up = jnp.split(variant.dense(2 * sizes.hidden, "gate_up")(x), 2, axis=-1)
    else:
      gate, up = (variant.dense(sizes.hidden, name)(x) for name in ("gate", "up"))
    return variant.dense(sizes.width, "down")(nn.silu(gate) * up)

  def in_bfloat16(self, recipe: fp8.Recipe) -> dict[str, Any]:
    """What fused modules are told."""
    return {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "recipe": recipe}


class OneBlock(nn.Module):
  """A block, from one array to one array."""

  sizes: Sizes
  variant: Variant
  cudnn: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Takes and gives the residual stream."""
    return Block(self.sizes, self.variant, self.cudnn)(x)[0]


class Model(nn.Module):
  """Blocks under a scan, that keep the results of their projections alone."""

  sizes: Sizes
  variant: Variant
  cudnn: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Takes and gives the residual stream."""
    policy = fp8.remat_policies.dots_with_no_batch_dims_saveable
    block: Any = nn.remat(Block, prevent_cse=False, policy=policy)
    length = self.sizes.layers
    layers = fp8.scan(block, {"params": 0}, split_rngs={"params": True}, length=length)
    return layers(self.sizes, self.variant, self.cudnn, name="layers")(x, None)[0]


MODULES = {"block": OneBlock, "model": Model}


def program(kind: str, sizes: Sizes, name: str, repeat: int, *, cudnn: bool) -> Program:
  """A block, or a model, in one variant."""
  variant = ALL[name]
  module = MODULES[kind](sizes, variant, cudnn)
  x = jax.ShapeDtypeStruct((sizes.sequences, sizes.length, sizes.width), jnp.bfloat16)
  return variant.program(module, x, repeat=repeat, flops=flops(kind, sizes))


def flops(kind: str, sizes: Sizes) -> int:
  """Of the projections in a step."""
  return sizes.flops * (sizes.layers if kind == "model" else 1)


def has_cudnn(sizes: Sizes, options: Options) -> bool:
  """Whether cuDNN's attention compiles here, backward too; XLA's is taken where it does not."""
  shapes = [
    jax.ShapeDtypeStruct((sizes.sequences, sizes.length, heads, sizes.head_dim), jnp.bfloat16)
    for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads)
  ]
  attention: Any = Attention(cudnn=True)
  total = lambda *qkv: attention.apply({}, *qkv).astype(jnp.float32).sum()
  try:
    jax.jit(jax.grad(total, (0, 1, 2))).lower(*shapes).compile()
  except Exception as error:
    options.fail("cuDNN's attention, XLA's is taken", error)
    return False
  return True


def measure_kind(kind: str, sizes: Sizes, options: Options, *, cudnn: bool) -> dict[str, Any]:
  """All variants of a block, or of a model."""
  repeat = steps(flops(kind, sizes), options) if kind == "block" else min(options.repeat, 2)
  programs = {name: program(kind, sizes, name, repeat, cudnn=cudnn) for name in options.choose(ALL)}
  found = measure(prepare_all(programs, options), options)
  for each in found.values():
    each["tokens_per_second"] = 1e3 * sizes.tokens / each["ms"]["median"]
    each["peak_to_bf16"] = each["peak_mib"] / found[BF16]["peak_mib"]
  return found


def measure_all(options: Options, console: Console) -> dict[str, Any]:
  """The block first; JSON is written after each of the two."""
  deadline, sizes = Deadline(options.seconds), TINY if options.tiny else Sizes()
  cudnn = on_gpu() and has_cudnn(sizes, options)
  results: dict[str, Any] = {
    "sizes": dataclasses.asdict(sizes),
    "attention": "cudnn" if cudnn else "xla",
    "found": {},
    "left_out": [],
  }
  for kind in MODULES:
    if deadline.passed():
      results["left_out"].append(kind)
      continue
    with console.status(kind):
      results["found"][kind] = measure_kind(kind, sizes, options, cudnn=cudnn)
    script.write_json(options.out, "block", script.document(options, **results))
  return script.document(options, **results)


def show(content: Mapping[str, Any], console: Console) -> None:
  """Prints the table, tokens a second, and memory beside BF16's."""
  script.print_note(content, console)
  console.print(script.table("Forward and backward", "", content["found"]))
  for kind, variants in content["found"].items():
    for name, each in variants.items():
      rate, peak = each["tokens_per_second"], each["peak_to_bf16"]
      line = f"{kind}, {name}: {rate:,.0f} tokens/s, peak {peak:.3f} of BF16's"
      console.print(line, highlight=False)
    delayed = [each["speedup"]["median"] for name, each in variants.items() if "delayed" in name]
    if delayed:
      line = f"{kind}, delayed at its best: {max(delayed):.3f}, to reach {BAR:.2f}"
      console.print(line, highlight=False)
  for name in content["left_out"]:
    console.print(f"left out, the time was up: {name}", highlight=False)
  script.print_problems(content["failures"], content["found"], console)


def draw(figure: Any, content: Mapping[str, Any]) -> None:
  """Draws speed and peak memory of each variant, BF16 as 1."""
  found = content["found"]
  figure.set_size_inches(10, 3.5 * len(found))
  for row, (kind, variants) in zip(
    figure.subplots(len(found), 2, squeeze=False), found.items(), strict=True
  ):
    names = list(variants)[::-1]
    spreads = [variants[name]["speedup"] for name in names]
    middle = [each["median"] for each in spreads]
    ends = [[m - e["low"], e["high"] - m] for m, e in zip(middle, spreads, strict=True)]
    row[0].barh(names, middle, xerr=list(zip(*ends, strict=True)))
    row[0].set_xlabel(f"{kind}: speed, BF16 = 1")
    row[1].barh(names, [variants[name]["peak_to_bf16"] for name in names], color="C1")
    row[1].set_yticklabels([])
    row[1].set_xlabel(f"{kind}: peak memory, BF16 = 1")
    for axes in row:
      axes.axvline(1, color="black", linewidth=0.8)


def main() -> None:
  """Runs the benchmark."""
  options, console = script.read_options(__doc__, "block"), script.console()
  if options.replot:
    script.replot(options.out, "block", draw, console)
    return
  content = measure_all(options, console)
  show(content, console)
  script.write_plot(options.out, "block", draw, content, console)


if __name__ == "__main__":
  main()
