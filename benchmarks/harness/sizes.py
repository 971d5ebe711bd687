"""The layers and blocks that are compiled and timed, as sizes; imports no JAX."""

import dataclasses

from lm.config import ModelShape


@dataclasses.dataclass(frozen=True)
class Shape:
  """A layer: ``[tokens, width] @ [width, features]``; ``flops`` are those of its three GEMMs."""

  tokens: int
  width: int
  features: int

  @property
  def flops(self) -> int:
    return 6 * self.tokens * self.width * self.features

  @property
  def gemms(self) -> dict[str, tuple[int, int, int]]:
    """Rows, columns and contracted size of each GEMM."""
    m, k, n = self.tokens, self.width, self.features
    return {"fprop": (m, n, k), "dgrad": (m, k, n), "wgrad": (k, n, m)}


def block_flops(shape: ModelShape, tokens: int) -> int:
  """Of a block's projections, forward and backward."""
  return 6 * tokens * sum(rows * columns for rows, columns in shape.projections.values())


LLAMA = ModelShape(d_model=4096, d_ff=14336, layers=12, heads=32, kv_heads=8)  # Llama 3 8B's blocks
TINY_LLAMA = ModelShape(d_model=32, d_ff=48, layers=2, heads=4, kv_heads=2)


def llama(tiny: bool) -> tuple[ModelShape, int]:
  """A model, and the tokens of its one sequence."""
  return (TINY_LLAMA, 16) if tiny else (LLAMA, 8192)


PUBLISHED = "Transformer Engine"
# Transformer Engine's published layers: hidden 4096, four times that in the MLP, 15872 tokens.
GROUPS: dict[str, dict[str, Shape]] = {
  PUBLISHED: {
    "query, key, value": Shape(15872, 4096, 12288),
    "attention out": Shape(15872, 4096, 4096),
    "MLP up": Shape(15872, 4096, 16384),
    "MLP down": Shape(15872, 16384, 4096),
  },
  "Llama 3 8B": {
    "query, out": Shape(8192, 4096, 4096),
    "key, value": Shape(8192, 4096, 1024),
    "gate, up": Shape(8192, 4096, 14336),
    "down": Shape(8192, 14336, 4096),
  },
  "Llama 3 70B": {
    "query, out": Shape(8192, 8192, 8192),
    "key, value": Shape(8192, 8192, 1024),
    "gate, up": Shape(8192, 8192, 28672),
    "down": Shape(8192, 28672, 8192),
  },
}
TINY_GROUPS = {PUBLISHED: {"small": Shape(32, 16, 48), "smaller": Shape(16, 16, 16)}}
