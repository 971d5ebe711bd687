"""Python's own language reference as bytes: real text that every machine has.

It ships with Python as ``pydoc_data.topics``, about half a megabyte. Each Python version has its
own, so results include its digest. Batch t depends on (seed, t) alone: a resumed run needs only its
step number to continue with the same batches.
"""

import dataclasses
import hashlib
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from lm.config import TrainConfig, UsageError

VALIDATION_PERCENT = 5
ON_A_GPU = {"h200", "gpu"}  # presets of train_lm.py and convergence.py
# Folders of the standard library that not every installation has.
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
  """A text: its name, part of its SHA-256, uint8 training bytes, and its last 5 %."""

  name: str
  digest: str
  train: np.ndarray
  validation: np.ndarray

  @classmethod
  def read(cls, path: Path | None = None) -> "Corpus":
    """Reads a file, or Python's language reference without a path."""
    text = path.read_bytes() if path else "\n\n".join(topics[t] for t in sorted(topics)).encode()
    return cls.split(path.name if path else "pydoc_data.topics", text)

  @classmethod
  def of_preset(cls, preset: str, path: Path | None = None) -> "Corpus":
    """Reads a file, or without a path the text of a preset.

    A preset for a GPU has the larger text, so that few bytes are seen twice.
    """
    return cls.of_standard_library() if path is None and preset in ON_A_GPU else cls.read(path)

  @classmethod
  def of_standard_library(cls) -> "Corpus":
    """Reads the source of Python's standard library, about 11 MB, in the order of its paths."""
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    chosen = sorted(name.as_posix() for name in names if not LEFT_OUT.intersection(name.parts))
    text = b"\n".join((root / name).read_bytes() for name in chosen)
    return cls.split("Python's standard library", text)

  @classmethod
  def split(cls, name: str, text: bytes) -> "Corpus":
    """Holds the last bytes out for validation."""
    codes = np.frombuffer(text, np.uint8)
    cut = len(codes) - len(codes) * VALIDATION_PERCENT // 100
    return cls(
      name=name,
      digest=hashlib.sha256(text).hexdigest()[:16],
      train=codes[:cut],
      validation=codes[cut:],
    )

  def as_dict(self) -> dict[str, object]:
    return {"name": self.name, "sha256_16": self.digest, "train_bytes": len(self.train)}

  def batch(self, config: TrainConfig, step: int, rows: slice = slice(None)) -> np.ndarray:
    """Draws the batch of a step: uint8 ``[batch_size, seq_len + 1]``, or some rows of it."""
    last = len(self.train) - config.seq_len
    draw = np.random.default_rng((config.seed, step))
    starts = draw.integers(last, size=config.batch_size)
    return self.train[starts[rows, None] + np.arange(config.seq_len + 1)]

  def validation_batches(self, config: TrainConfig) -> list[np.ndarray]:
    """Cuts the validation text into full batches, uint8 ``[batch_size, seq_len + 1]`` each."""
    size, length = config.batch_size, config.seq_len
    count = min((len(self.validation) - 1) // length // size, config.validation_batches)
    if not count:
      raise UsageError(
        f"--text: its last {VALIDATION_PERCENT} % must fill one validation batch of "
        f"{size} sequences of {length} bytes; got {len(self.validation)} bytes from "
        f"{self.name}. Give a longer text or a smaller --batch-size."
      )
    starts = np.arange(count * size).reshape(count, size, 1) * length
    return list(self.validation[starts + np.arange(length + 1)])
