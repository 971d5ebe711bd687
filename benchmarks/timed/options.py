"""What the command line of a script that measures a GPU says."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from timed.variants import BF16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What the command line says.

  Attributes:
    out: folder of JSON and picture.
    rounds: of the clock.
    repeat: steps in a loop, at least.
    tiny: shapes for a CPU, as a test of the script.
    threads: that compile.
    seconds: after which no new case begins.
    replot: draw the JSON that is there, measure nothing.
    variants: which to measure, besides BF16; none for all.
    failures: programs that did not compile or run, so far.
  """

  out: Path
  rounds: int
  repeat: int
  tiny: bool
  threads: int
  seconds: float
  replot: bool
  variants: Sequence[str] = ()
  failures: list[str] = dataclasses.field(default_factory=list[str])

  def choose(self, names: Iterable[str]) -> list[str]:
    """Those of a script's variants that are to be measured."""
    return [name for name in names if not self.variants or name in (BF16, *self.variants)]

  def fail(self, name: object, error: Exception) -> None:
    """Notes a program that did not compile or run: the others go on."""
    self.failures.append(f"{name}: {type(error).__name__}: {str(error)[:1000]}")
