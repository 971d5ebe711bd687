"""The layers and blocks that are compiled and timed, as sizes; imports no JAX."""

import dataclasses


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """Llama 3 8B's blocks."""

  sequences: int = 1
  length: int = 8192
  width: int = 4096
  heads: int = 32
  kv_heads: int = 8
  hidden: int = 14336
  layers: int = 12

  @property
  def tokens(self) -> int:
    return self.sequences * self.length

  @property
  def head_dim(self) -> int:
    return self.width // self.heads

  @property
  def kv_width(self) -> int:
    return self.kv_heads * self.head_dim

  @property
  def projections(self) -> dict[str, tuple[int, int]]:
    """Input and output features of each projection of a block."""
    width, hidden, shared = self.width, self.hidden, self.kv_width
    attention = {"query": (width, width), "key": (width, shared), "value": (width, shared)}
    mlp = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    return {**attention, "out": (width, width), **mlp}

  @property
  def flops(self) -> int:
    """Of a block's projections, forward and backward."""
    return 6 * self.tokens * sum(rows * columns for rows, columns in self.projections.values())


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
TINY_SIZES = Sizes(length=16, width=32, heads=4, kv_heads=2, hidden=48, layers=2)
