"""Names of the contractions in one module: unique, and the same in every run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Generator
from typing import Any


@dataclasses.dataclass
class Names:
  """Numbers the contractions in one scope during one outermost call of a method.

  JAX may trace a program several times before it binds the program. Each of these traces starts
  from ``counts``, so it makes the same names.

  Attributes:
    counts: number of contractions so far, by kind.
    repeated: the counts at the end of the traces of ``program``.
    program: the program being traced. A trace of another program first adopts ``repeated``.
  """

  counts: Counter[str] = dataclasses.field(default_factory=Counter)
  repeated: Counter[str] = dataclasses.field(default_factory=Counter)
  program: Any = None

  def next(self, kind: str) -> str:
    """Returns a new name."""
    self.counts[kind] += 1
    return f"{kind}_{self.counts[kind] - 1}"

  def commit(self) -> None:
    """Adopts the counts of the traced program once it is bound."""
    self.counts |= self.repeated
    self.program = None

  @contextlib.contextmanager
  def again(self, program: Any) -> Generator[Names]:
    """Returns the names for one trace of a program that JAX may trace several times."""
    if program is not self.program:
      self.commit()
    self.program = program
    inner = Names(Counter(self.counts))
    yield inner
    self.repeated |= inner.counts | inner.repeated
