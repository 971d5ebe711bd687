"""How much faster is a Transformer block in FP8, and a model of twelve, and in how much memory?

    python benchmarks/block.py               # needs an H100 or H200; a few minutes

A block of Llama 3 8B with 8192 tokens, all in bfloat16, forward and backward: RMSNorm, query, key
and value, rotary positions, causal attention (cuDNN's on a GPU, in bfloat16 in every variant), out,
RMSNorm, gate, up, SiLU, down. The loss is half the sum of squares of the output, so the backward
pass begins where the forward pass ends. ``fused`` has one layer of query, key and value, and one of
gate and up, as ``fp8.Fp8FusedQKV`` and ``fp8.Fp8SwiGLU``. ``speedup`` is over BF16 with separate
layers, the median over rounds in which all variants ran in turn. The model is twelve blocks under
``fp8.scan``. They keep the results of projections and recompute the rest in the backward pass;
there is no embedding, head or optimizer. ``peak`` is what XLA plans for arguments, results and
temporaries; gradients of all parameters are among the results. TFLOP/s are of the projections. The
goal for the block with delayed scaling is a speedup of 1.35.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax_fp8 as fp8
from harness import plot, timed
from harness.models import Block, Stack
from harness.names import BF16
from harness.options import Options, on_gpu
from harness.programs import Program, loss_of, make_program
from harness.sizes import block_flops, llama
from harness.variants import FUSED, RECIPES, VARIANTS
from lm.config import ModelShape

ALL = {BF16: VARIANTS[BF16], **RECIPES, **FUSED, **VARIANTS}
KINDS = ("block", "model")


def attention() -> Any:
  return "cudnn" if on_gpu() else "xla"


def program(kind: str, shape: ModelShape, length: int, name: str, repeat: int) -> Program:
  """A block, or a model, in one variant."""
  arguments, flops = (shape, ALL[name], attention()), block_flops(shape, length)
  module = Stack(Block, arguments)
  if kind == "model":
    policy = fp8.remat_policies.dots_with_no_batch_dims_saveable
    module = Stack(Block, arguments, shape.layers, scan=True, remat=True, policy=policy)
    flops *= shape.layers
  x = (1, length, shape.d_model)
  return make_program(ALL[name], module, loss_of(module), x, repeat=repeat, flops=flops)


def cases(kind: str, options: Options) -> dict[str, dict[str, Program]]:
  """All variants of a block, or of a model."""
  sizes = llama(options.tiny)
  steps = timed.steps(block_flops(*sizes), options)
  repeat = steps if kind == "block" else min(options.repeat, 2)
  return {kind: {name: program(kind, *sizes, name, repeat) for name in options.choose(ALL)}}


def groups(options: Options) -> timed.Groups:
  """The block first."""
  return {kind: functools.partial(cases, kind, options) for kind in KINDS}


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
