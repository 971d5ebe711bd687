"""How a run shows itself: a live bar on a terminal, one line a validation anywhere else."""

from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lm.curve import Curve


def describe(curve: Curve) -> str:
  """The newest numbers of a curve in one short line."""
  parts = [f"loss {curve.train[-1]:.4f}"] if curve.train else []
  parts += [f"validation {curve.validation[-1][1]:.4f}"] if curve.validation else []
  parts += [f"{curve.rates[-1]:.2f} steps/s"] if curve.rates else []
  return ", ".join(parts)


class Display(Protocol):
  """What the training loop tells; both methods may be called at any time."""

  def note(self, text: str) -> None:
    """Says one thing that happened."""

  def update(self, curve: Curve, *, validated: bool, saved: bool = False) -> None:
    """Shows the curve after a stretch of steps, of which a checkpoint stands if ``saved``."""


class Silent:
  """Shows nothing."""

  def note(self, text: str) -> None:
    """Ignores it."""

  def update(self, curve: Curve, *, validated: bool, saved: bool = False) -> None:
    """Ignores it."""


class ConsoleDisplay:
  """A bar that lives in place on a terminal; plain lines elsewhere. A context manager."""

  def __init__(self, console: Console, name: str, steps: int) -> None:
    """Makes the bar.

    Args:
      console: where to write.
      name: what the bar is called.
      steps: its full length.
    """
    self.console, self.name, self.steps = console, name, steps
    self.bar = Progress(
      TextColumn("{task.description}"),
      BarColumn(),
      MofNCompleteColumn(),
      TextColumn("{task.fields[numbers]}"),
      TimeRemainingColumn(),
      console=console,
      disable=console.quiet or not console.is_terminal,
    )
    self.task = self.bar.add_task(name, total=steps, numbers="compiling")

  def __enter__(self) -> "ConsoleDisplay":
    """Starts the bar."""
    self.bar.start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    """Stops the bar, and leaves it as it is."""
    self.bar.stop()

  def note(self, text: str) -> None:
    """Prints a line, above the bar where there is one."""
    self.console.print(f"{self.name}: {text}", highlight=False, soft_wrap=True)

  def update(self, curve: Curve, *, validated: bool, saved: bool = False) -> None:
    """Moves the bar; without a bar, prints a line of every validation and every checkpoint."""
    self.bar.update(self.task, completed=curve.step, numbers=describe(curve))
    if (validated or saved) and not self.console.is_terminal:
      end = ", saved" if saved else ""
      self.note(f"step {curve.step}/{self.steps}: {describe(curve)}{end}")
