"""What is trained: everything that decides the curve, and the sizes on offer."""

import dataclasses
from typing import Any

from lm.model import ModelShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """All that decides a curve besides the text and the run's recipe.

  Attributes:
    shape: the model.
    steps: optimiser steps; the learning rate's cosine ends there.
    batch_size: windows a step.
    seq_len: bytes the model reads in a window.
    learning_rate: the peak, reached after a tenth of the steps.
    weight_decay: on kernels only.
    clip_norm: bound on the gradient's global norm.
    seed: decides the parameters and the batches.
    validate_every: steps between two validations.
    validation_batches: batches a validation reads at most.
    calibrate: training batches from which FP8 state is filled before step 0; 0 leaves it empty.
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
    """Every setting by its name, the model's among them, as JSON would give them back."""
    settings = dataclasses.asdict(self)
    return settings.pop("shape") | settings


PRESETS = {
  # For asking how a run goes rather than where to: a few seconds, most of them compilation.
  "micro": TrainConfig(
    shape=ModelShape(d_model=32, d_ff=64, layers=2, heads=2, kv_heads=1),
    steps=100,
    batch_size=8,
    seq_len=32,
    learning_rate=4e-3,
    validate_every=50,
    validation_batches=4,
  ),
  # Small enough to settle in a few minutes: where the loss still falls fast, a few steps' lead is
  # a percent, and rounding that only reorders the run would look like a gap.
  "tiny": TrainConfig(
    shape=ModelShape(d_model=64, d_ff=192, layers=2, heads=2, kv_heads=1),
    steps=1500,
    batch_size=16,
    seq_len=128,
    learning_rate=4e-3,
    validate_every=250,
  ),
  # Small enough for a sweep: an FP8 run takes about four minutes of one CPU core, and the mean gap
  # of three seeds or more says what one seed's cannot.
  "small": TrainConfig(
    shape=ModelShape(d_model=128, d_ff=384, layers=3, heads=4, kv_heads=2),
    steps=800,
    batch_size=8,
    seq_len=128,
    learning_rate=2e-3,
    validate_every=100,
  ),
  # 0.97 billion parameters; M = batch_size * seq_len = 16384 rows in every projection.
  "h200": TrainConfig(
    shape=ModelShape(d_model=2048, d_ff=8192, layers=16, heads=16, kv_heads=4, attention="cudnn"),
    steps=500,
    batch_size=8,
    seq_len=2048,
    learning_rate=3e-4,
    validate_every=100,
  ),
}
