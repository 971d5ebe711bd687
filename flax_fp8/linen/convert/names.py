"""Names of the contractions of one module: the same in each run, and one for each of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Generator
from typing import Any


@dataclasses.dataclass
class Names:
  """Numbers the contractions in one scope, from one call of a method from outside to its end.

  Attributes:
    counts: contractions so far, by kind.
    repeated: the same at the end of a trace of a program. JAX may trace it again, which starts from
      ``counts`` too, until it binds the program.
    program: what the trace was of; another program goes on from its end.
  """

  counts: Counter[str] = dataclasses.field(default_factory=Counter)
  repeated: Counter[str] = dataclasses.field(default_factory=Counter)
  program: Any = None

  def next(self, kind: str) -> str:
    """Makes a new name."""
    self.counts[kind] += 1
    return f"{kind}_{self.counts[kind] - 1}"

  def settle(self) -> None:
    """Goes on behind a program that is bound."""
    self.counts |= self.repeated
    self.program = None

  @contextlib.contextmanager
  def again(self, program: Any) -> Generator[Names]:
    """Makes the names for one trace of a program that JAX may trace several times."""
    if program is not self.program:
      self.settle()
    self.program = program
    inner = Names(Counter(self.counts))
    yield inner
    self.repeated |= inner.counts | inner.repeated
