"""What is trained: the sizes of model and run."""

import dataclasses
from typing import Any, Literal


class UsageError(ValueError):
  """The command line asks for something impossible; it is printed without a traceback."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
  """The sizes of a decoder. ``heads // kv_heads`` query heads share a key and a value head."""

  vocabulary: int = 256
  d_model: int
  d_ff: int
  layers: int
  heads: int
  kv_heads: int
  remat: bool = False
  attention: Literal["xla", "cudnn"] = "xla"

  @property
  def head_dim(self) -> int:
    return self.d_model // self.heads

  @property
  def parameters(self) -> int:
    kernels = sum(rows * columns for rows, columns in self.projections.values())
    return self.layers * (kernels + 2 * self.d_model) + (2 * self.vocabulary + 1) * self.d_model

  @property
  def projections(self) -> dict[str, tuple[int, int]]:
    """The kernels' shapes in one layer."""
    inner, shared = self.d_model, self.kv_heads * self.head_dim
    widths = {"query": inner, "key": shared, "value": shared, "out": inner}
    widths |= {"gate": self.d_ff, "up": self.d_ff}
    return {name: (inner, width) for name, width in widths.items()} | {"down": (self.d_ff, inner)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """Everything that decides a loss curve, except the text and the run.

  The learning rate rises for a tenth of the steps, then falls along a cosine. ``calibrate`` counts
  training batches that fill the FP8 state before step 0; ``validation_batches`` is a maximum.
  """

  shape: ModelShape
  steps: int
  batch_size: int
  seq_len: int
  learning_rate: float
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  seed: int = 0
  validate_every: int
  validation_batches: int = 50
  calibrate: int = 0

  def as_dict(self) -> dict[str, Any]:
    """Every setting by its name, including the model's, in JSON's types."""
    settings = dataclasses.asdict(self)
    return settings.pop("shape") | settings


def preset(shape: ModelShape, steps: int, batch: int, length: int, **named: Any) -> TrainConfig:
  return TrainConfig(shape=shape, steps=steps, batch_size=batch, seq_len=length, **named)


MICRO = ModelShape(d_model=32, d_ff=64, layers=2, heads=2, kv_heads=1)
TINY = ModelShape(d_model=64, d_ff=192, layers=2, heads=2, kv_heads=1)
SMALL = ModelShape(d_model=128, d_ff=384, layers=3, heads=4, kv_heads=2)
# 0.97 billion parameters, and 16384 tokens in a batch.
LARGE = ModelShape(d_model=2048, d_ff=8192, layers=16, heads=16, kv_heads=4, attention="cudnn")
PRESETS = {
  # For tests of the loop itself: a few seconds, most of them compilation.
  "micro": preset(MICRO, 100, 8, 32, learning_rate=4e-3, validate_every=50, validation_batches=4),
  # One epoch of the default text. convergence.py repeats it for each recipe.
  "tiny": preset(TINY, 512, 8, 128, learning_rate=4e-3, validate_every=128),
  # For a sweep over recipes and seeds: an FP8 run takes about four minutes of one CPU core.
  "small": preset(SMALL, 800, 8, 128, learning_rate=2e-3, validate_every=100),
  "h200": preset(LARGE, 500, 8, 2048, learning_rate=3e-4, validate_every=100),
}
