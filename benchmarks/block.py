"""How much faster is a Transformer block in FP8, and a model of twelve, and in how much memory?

    python benchmarks/block.py               # needs an H100 or H200; a few minutes

A block of Llama 3 8B with 8192 tokens, all in bfloat16, forward and backward: RMSNorm, query, key
and value, rotary positions, causal attention (cuDNN's on a GPU, in bfloat16 in every variant), out,
RMSNorm, gate, up, SiLU, down. ``fused`` has one layer of query, key and value, and one of gate and
up, as ``fp8.Fp8FusedQKV`` and ``fp8.Fp8SwiGLU``. ``speedup`` is over BF16 with separate layers, the
median over rounds in which all variants ran in turn. The model is twelve blocks under ``fp8.scan``.
They keep the results of projections and recompute the rest in the backward pass; there is no
embedding, head or optimizer. ``peak`` is what XLA plans for arguments, results and temporaries;
gradients of all parameters are among the results. TFLOP/s are of the projections. The goal for the
block with delayed scaling is a speedup of 1.30.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

import flax_fp8 as fp8
from harness import plot, timed
from harness.models import Attention, Block, Stack
from harness.names import BF16
from harness.options import Options, on_gpu
from harness.programs import Program, make_program
from harness.sizes import TINY_SIZES, Sizes
from harness.variants import FUSED, RECIPES, VARIANTS

ALL = {BF16: VARIANTS[BF16], **RECIPES, **FUSED, **VARIANTS}
KINDS = ("block", "model")


def program(kind: str, sizes: Sizes, name: str, repeat: int, *, cudnn: bool) -> Program:
  """A block, or a model, in one variant."""
  arguments = (sizes, ALL[name], "cudnn" if cudnn else "xla")
  module, flops = Stack(Block, arguments), sizes.flops
  if kind == "model":
    policy = fp8.remat_policies.dots_with_no_batch_dims_saveable
    module = Stack(Block, arguments, sizes.layers, scan=True, remat=True, policy=policy)
    flops *= sizes.layers
  shape = (sizes.sequences, sizes.length, sizes.width)
  return make_program(ALL[name], module, shape, repeat=repeat, flops=flops)


def has_cudnn(sizes: Sizes, options: Options) -> bool:
  """Whether cuDNN's attention compiles here, backward too; otherwise XLA's is taken."""
  shapes = [
    jax.ShapeDtypeStruct((sizes.sequences, sizes.length, width), jnp.bfloat16)
    for width in (sizes.width, sizes.kv_width, sizes.kv_width)
  ]
  attention: Any = Attention(sizes, "cudnn")
  total = lambda *qkv: attention.apply({}, *qkv).astype(jnp.float32).sum()
  try:
    jax.jit(jax.grad(total, (0, 1, 2))).lower(*shapes).compile()
  except Exception as error:
    options.fail("cuDNN's attention, XLA's is taken", error)
    return False
  return True


def cases(kind: str, sizes: Sizes, options: Options) -> dict[str, dict[str, Program]]:
  """All variants of a block, or of a model."""
  cudnn = on_gpu() and has_cudnn(sizes, options)
  repeat = timed.steps(sizes.flops, options) if kind == "block" else min(options.repeat, 2)
  names = options.choose(ALL)
  return {kind: {name: program(kind, sizes, name, repeat, cudnn=cudnn) for name in names}}


def groups(options: Options) -> timed.Groups:
  """The block first."""
  sizes = TINY_SIZES if options.tiny else Sizes()
  return {kind: functools.partial(cases, kind, sizes, options) for kind in KINDS}


def draw(content: Mapping[str, Any]) -> Any:
  """Draws speed and peak memory of each variant."""
  figure = plot.make_figure("A Llama 3 8B block, and twelve under a scan", content, (10, 4.5))
  left, right = figure.subplots(1, 2)
  timed.bars(left, content["found"], "speed, BF16 = 1")
  timed.bars(right, content["found"], "peak memory, BF16 = 1", "peak_to_bf16")
  plot.legend(figure)
  return figure


def main() -> None:
  timed.run(__doc__, "block", groups, timed.models_summary, draw)


if __name__ == "__main__":
  main()
