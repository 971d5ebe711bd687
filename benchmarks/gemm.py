"""How much faster than BF16 are a layer's three GEMMs in FP8, quantization included?

    python benchmarks/gemm.py                # needs an H100 or H200; a few minutes

Layers without bias, all in bfloat16, forward and backward:

    out = x @ kernel;  x_grad = grad @ kernel.T;  kernel_grad = x.T @ grad

A layer stands alone, so ``grad`` is an argument as ``x`` and ``kernel`` are. Shapes are those of
Transformer Engine's published figures, and of Llama 3 8B's and 70B's projections with 8192 tokens
(``harness/sizes.py``). ``speedup`` is BF16's time over a variant's, the median over rounds in which
all variants ran in turn. Beside the layers, the bare GEMMs: their
operands are quantized already, in the layout that FP8 takes, and BF16's are ready too. ``FP8`` has
one scale for a tensor, and ``block`` is the kernel of block scaling. Each GEMM of the compiled
programs is checked to have the dtype that its row says. Transformer Engine publishes speedups of
1.69 (delayed), 1.58 (current) and 1.40 (block) for its layers; the goal for rowwise is 1.45.
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from flax_fp8.contraction import forward_gemm
from flax_fp8.kernels.block_gemm import BlockScaledGemm
from flax_fp8.kernels.call import call
from flax_fp8.kernels.tiles import SIDE
from flax_fp8.products import dot_per_tensor
from flax_fp8.quantize import QTensor
from harness import clock, timed
from harness.names import BF16, BLOCK
from harness.options import Options
from harness.programs import Program, layer_programs, repeated
from harness.sizes import GROUPS, TINY_GROUPS, Shape
from harness.variants import VARIANTS

FP8 = "FP8"
E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
ROWS_BY_ROWS = (((1,), (1,)), ((), ()))  # both contracted along their rows, as FP8 kernels want
FORMATS = {"fprop": (E4M3, E4M3), "dgrad": (E5M2, E4M3), "wgrad": (E4M3, E5M2)}


def layers(group: str, shapes: Mapping[str, Shape], options: Options) -> dict[str, Any]:
  """A group's layers in each variant."""
  names = options.choose(VARIANTS)
  return {
    f"{group}: {layer}": layer_programs(shape, names, timed.steps(shape.flops, options))
    for layer, shape in shapes.items()
  }


def bare_program(
  sizes: tuple[int, int, int], formats: tuple[Any, Any] | None, fast: bool, repeat: int
) -> Program:
  """One GEMM of operands that are ready, in formats of FP8 or None; its result is bfloat16.

  ``sizes`` are rows, columns, contracted. Recipes accumulate ``fast`` in the forward pass.
  """
  m, n, k = sizes
  gemm = forward_gemm(ROWS_BY_ROWS, (m, k), (n, k))

  def step(state: Any, operands: Any, scales: Any) -> tuple[Any, Any]:
    lhs, rhs = operands
    if formats is None:
      out = jax.lax.dot_general(lhs, rhs, ROWS_BY_ROWS, preferred_element_type=jnp.bfloat16)
      return state, out
    lhs, rhs = (QTensor(x, scale) for x, scale in zip(operands, scales["scale"], strict=True))
    return state, dot_per_tensor(lhs, rhs, gemm, jnp.bfloat16, fast_accumulation=fast)

  kinds = formats or (jnp.bfloat16, jnp.bfloat16)
  operands = [jax.ShapeDtypeStruct(s, d) for s, d in zip(((m, k), (n, k)), kinds, strict=True)]
  shapes = ({}, operands, {"scale": [jax.ShapeDtypeStruct((), jnp.float32)] * 2})
  return Program(repeated(step, repeat), shapes, repeat, 2 * m * n * k, formats is not None)


def bare_block_program(sizes: tuple[int, int, int], kind: str, repeat: int) -> Program:
  """One GEMM of ready E4M3 operands with the scales of ``block``; its result is bfloat16.

  ``sizes`` are rows, columns, contracted. Operands are padded to whole blocks along the last.
  """
  m, n, k = sizes
  blocks = -(-k // SIDE)
  kernel, scales_of_n = (
    BlockScaledGemm(out_dtype=jnp.bfloat16),
    n if kind == "wgrad" else -(-n // SIDE),
  )

  def step(state: Any, operands: Any, scales: Any) -> tuple[Any, Any]:
    return state, call(kernel, *operands, *scales["scale"])

  array = lambda dtype, *shape: jax.ShapeDtypeStruct((1, *shape), dtype)
  operands = [array(E4M3, rows, blocks * SIDE) for rows in (m, n)]
  scales = [array(jnp.float32, blocks, count) for count in (m, scales_of_n)]
  return Program(
    repeated(step, repeat), ({}, operands, {"scale": scales}), repeat, 2 * m * n * k, True
  )


def bare(group: str, shapes: Mapping[str, Shape], options: Options) -> dict[str, Any]:
  """The three GEMMs of each layer of a group, in BF16 and in FP8."""
  found: dict[str, Any] = {}
  with_blocks = BLOCK in options.choose(VARIANTS)
  for (layer, shape), (kind, formats) in itertools.product(shapes.items(), FORMATS.items()):
    sizes, repeat = shape.gemms[kind], timed.steps(shape.flops // 3, options)
    both = {BF16: None, FP8: formats}
    programs = {
      name: bare_program(sizes, each, kind == "fprop", repeat) for name, each in both.items()
    }
    if with_blocks:
      programs[BLOCK] = bare_block_program(sizes, kind, repeat)
    found[f"{group}: {layer}, bare {kind}"] = programs
  return found


def groups(options: Options) -> timed.Groups:
  """Layers and bare GEMMs of each group, the published one first."""
  return {
    f"{group}, {make.__name__}": functools.partial(make, group, shapes, options)
    for group, shapes in (TINY_GROUPS if options.tiny else GROUPS).items()
    for make in (layers, bare)
  }


def summarize(found: timed.Found) -> dict[str, float]:
  """Means of groups whose layers are all measured, and speedups of a layer's three bare GEMMs."""
  summary: dict[str, float] = {}
  for group, shapes in itertools.chain(GROUPS.items(), TINY_GROUPS.items()):
    names = [f"{group}: {layer}" for layer in shapes]
    if found.keys() >= set(names):
      means = clock.summarize({name: found[name] for name in names}, BF16)
      summary |= {f"{group}: {name}": each["geometric_mean"] for name, each in means.items()}
      summary |= {f"{group}, sum: {name}": each["of_the_sum"] for name, each in means.items()}
  for name, variant in itertools.product(found, (FP8, BLOCK)):
    kinds = [found.get(f"{name}, bare {kind}", {}) for kind in FORMATS]
    if all(variant in each for each in kinds):
      total = lambda of, kinds=kinds: sum(each[of]["ms"]["median"] for each in kinds)
      which = "" if variant == FP8 else f", {variant}"
      summary[f"{name}: bare GEMMs{which}"] = total(BF16) / total(variant)
  return summary


draw = timed.bar_plot("Speed of layers over BF16, forward and backward", (11, 5))


def main() -> None:
  timed.run(__doc__, "gemm", groups, summarize, draw)


if __name__ == "__main__":
  main()
