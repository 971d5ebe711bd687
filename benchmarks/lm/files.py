"""Files that are there whole or not at all, whenever the process that writes them is killed."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Generator[Path]:
  """Gives a path to write to, and renames what was written into place when that is done.

  The path has the suffix of the other, by which Matplotlib knows what to write.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  beside = path.with_name(f".part-{path.name}")
  yield beside
  beside.replace(path)


def write_text(path: Path, text: str) -> None:
  """Writes a text file."""
  with whole_file(path) as beside:
    beside.write_text(text)
