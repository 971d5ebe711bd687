"""How a run shows itself: a bar on a terminal, one line per event elsewhere."""

import contextlib
from collections.abc import Generator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lm.checkpoints import Curve


class Silent:
  """What the training loop tells; this class shows nothing."""

  def note(self, text: str) -> None: ...

  def update(self, curve: Curve, *, validated: bool, saved: bool = False) -> None: ...


def describe(curve: Curve) -> str:
  """The newest numbers of a curve in one short line."""
  parts = [f"loss {loss:.4f}" for loss in curve["train_curve"][-1:]]
  parts += [f"validation {loss:.4f}" for _, loss in curve["validation_curve"][-1:]]
  return ", ".join([*parts, *(f"{rate:.2f} steps/s" for rate in curve["stretch_rates"][-1:])])


class ConsoleDisplay(Silent):
  """Moves the bar of one run; without a terminal, prints a line per validation and checkpoint."""

  def __init__(self, console: Console, bar: Progress, name: str, steps: int) -> None:
    self.console, self.bar, self.name, self.steps = console, bar, name, steps
    self.task = bar.add_task(name, total=steps, numbers="compiling")

  def note(self, text: str) -> None:
    self.console.print(f"{self.name}: {text}", highlight=False, soft_wrap=True)

  def update(self, curve: Curve, *, validated: bool, saved: bool = False) -> None:
    step = len(curve["train_curve"])
    self.bar.update(self.task, completed=step, numbers=describe(curve))
    if (validated or saved) and not self.console.is_terminal:
      end = ", saved" if saved else ""
      self.note(f"step {step}/{self.steps}: {describe(curve)}{end}")


@contextlib.contextmanager
def showing(console: Console, name: str, steps: int) -> Generator[ConsoleDisplay]:
  """Shows one run of so many steps."""
  columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
  bar = Progress(
    *columns,
    TextColumn("{task.fields[numbers]}"),
    TimeRemainingColumn(),
    console=console,
    disable=console.quiet or not console.is_terminal,
  )
  with bar:
    yield ConsoleDisplay(console, bar, name, steps)
