"""The models and runs of trials. Each is ``train_lm.py``'s ``tiny`` preset, wider or longer."""

import dataclasses

from lm.config import MICRO, PRESETS, ModelShape, TrainConfig

TINY = dataclasses.replace(PRESETS["tiny"], validation_batches=16)
GPU = ModelShape(d_model=512, d_ff=1536, layers=8, heads=8, kv_heads=4)


def wide(factor: int) -> TrainConfig:
  """Multiplies the width; the learning rate falls with it, as Adam's best one does."""
  size = TINY.shape
  wider = {name: factor * getattr(size, name) for name in ("d_model", "d_ff", "heads", "kv_heads")}
  shape = dataclasses.replace(size, **wider)
  return dataclasses.replace(TINY, shape=shape, learning_rate=TINY.learning_rate / factor)


PRESETS_OF_TRIALS = {
  # For tests of the runner: a few seconds, most of them compilation.
  "micro": dataclasses.replace(TINY, shape=MICRO, steps=32, seq_len=32, validation_batches=2),
  "tiny": TINY,
  "width128": wide(2),
  "width256": wide(4),
  "long": dataclasses.replace(TINY, steps=4 * TINY.steps),
  # 25 million parameters and 13 million tokens.
  "gpu": dataclasses.replace(
    TINY, shape=GPU, steps=800, batch_size=32, seq_len=512, learning_rate=1e-3
  ),
}
