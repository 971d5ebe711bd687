"""Real text that every machine has, as bytes: Python's own language reference.

The reference ships with Python as ``pydoc_data.topics`` (about half a megabyte; each Python version
has its own, so the digest belongs to the result). Batch t is a function of (seed, t) alone:
a resumed run needs no more than its step number to see the batches that the unbroken run sees.
"""

import dataclasses
import hashlib
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from lm.errors import UsageError

VOCABULARY = 256
VALIDATION_PERCENT = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
  """A text cut into a training and a validation part.

  Attributes:
    name: where the text came from.
    digest: the first 16 hex digits of its SHA-256.
    train: uint8 ``[N]``, the text's beginning.
    validation: uint8 ``[M]``, its last 5 %.
  """

  name: str
  digest: str
  train: np.ndarray
  validation: np.ndarray


def read_corpus(path: Path | None = None) -> Corpus:
  """Reads ``path``, or Python's language reference when there is none."""
  if path is None:
    text = "\n\n".join(topics[topic] for topic in sorted(topics)).encode()
    return split("pydoc_data.topics", text)
  if not path.is_file():
    raise UsageError(f"--text: must name a readable file; got {path}. Check the path.")
  return split(path.name, path.read_bytes())


def split(name: str, text: bytes) -> Corpus:
  """Cuts the last 5 % of ``text`` off for validation."""
  codes = np.frombuffer(text, np.uint8)
  cut = len(codes) - len(codes) * VALIDATION_PERCENT // 100
  digest = hashlib.sha256(text).hexdigest()[:16]
  return Corpus(name=name, digest=digest, train=codes[:cut], validation=codes[cut:])


def training_batch(
  corpus: Corpus,
  *,
  batch_size: int,
  seq_len: int,
  seed: int,
  step: int,
  rows: slice = slice(None),
) -> np.ndarray:
  """Draws the windows of one step.

  Args:
    corpus: the text.
    batch_size: windows in the batch.
    seq_len: bytes the model reads in each.
    seed: with ``step``, all that decides the draw.
    step: the number of steps taken before this one.
    rows: those to read; whoever reads them, row i is the same.

  Returns:
    uint8 ``[batch_size, seq_len + 1]``, or its ``rows``: the inputs, and the targets one place
    further.
  """
  last = len(corpus.train) - seq_len
  starts = np.random.default_rng((seed, step)).integers(last, size=batch_size)
  return corpus.train[starts[rows, None] + np.arange(seq_len + 1)]


def validation_batches(
  corpus: Corpus, *, batch_size: int, seq_len: int, limit: int
) -> list[np.ndarray]:
  """Cuts the validation text into batches that never change.

  Args:
    corpus: the text.
    batch_size: windows in a batch.
    seq_len: bytes the model reads in each.
    limit: batches at most, so that a long text does not make validation the main work.

  Returns:
    Full batches, uint8 ``[batch_size, seq_len + 1]`` each; a rest that fills none is left out.
  """
  windows = (len(corpus.validation) - 1) // seq_len
  starts = np.arange(windows)[:, None] * seq_len
  rows = corpus.validation[starts + np.arange(seq_len + 1)]
  batches = [
    rows[first : first + batch_size]
    for first in range(0, windows - batch_size + 1, batch_size)[:limit]
  ]
  if not batches:
    raise UsageError(
      f"--text: its last {VALIDATION_PERCENT} % must fill one validation batch of "
      f"{batch_size} windows of {seq_len} bytes; got {len(corpus.validation)} bytes from "
      f"{corpus.name}. Give a longer text or a smaller --batch-size."
    )
  return batches
