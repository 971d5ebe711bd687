"""What one training run leaves behind: its losses, step by step, and how it ran."""

import dataclasses
import statistics
from typing import Any

from lm.runs import Run


@dataclasses.dataclass(kw_only=True)
class Curve:
  """The losses so far, in nats a byte.

  Attributes:
    train: the loss of every step.
    validation: ``(steps taken, loss)`` of every validation.
    rates: steps/s of every timed stretch; the only part that differs from run to run.
  """

  train: list[float] = dataclasses.field(default_factory=list)
  validation: list[tuple[int, float]] = dataclasses.field(default_factory=list)
  rates: list[float] = dataclasses.field(default_factory=list)

  @property
  def step(self) -> int:
    """Steps taken so far."""
    return len(self.train)

  @classmethod
  def from_dict(cls, saved: dict[str, Any]) -> "Curve":
    """Rebuilds a curve from ``dataclasses.asdict`` of one that went through JSON."""
    points = [(step, loss) for step, loss in saved["validation"]]
    return cls(train=saved["train"], validation=points, rates=saved["rates"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
  """What serving a trained model takes, beside what it would take with all parameters in BF16.

  Attributes:
    kernel_bytes: FP8 kernels and their scales.
    kernel_bytes_bf16: the same kernels in BF16.
    bytes: all variables, these kernels among them.
    bytes_bf16: all parameters in BF16.
    disk_bytes: the checkpoint of all variables.
    disk_bytes_bf16: that of all parameters in BF16.
    program_bytes: the forward pass, without its variables.
    platforms: those that the program is for.
    validation_loss: of the frozen model.
  """

  kernel_bytes: int
  kernel_bytes_bf16: int
  bytes: int
  bytes_bf16: int
  disk_bytes: int
  disk_bytes_bf16: int
  program_bytes: int
  platforms: tuple[str, ...]
  validation_loss: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
  """A finished run.

  Attributes:
    run: whose it is.
    curve: the losses.
    parameters: number of trained values.
    state_bytes: parameters, optimiser state and FP8 state.
    fp8_state_bytes: the FP8 scales and histories among them.
    temp_bytes: what the compiled step needs besides its arguments and results.
    compile_seconds: tracing and compiling the step.
    export: what of it can be served; None where nothing was asked for.
    loss_scale: at the end; None where the loss was not scaled.
    skipped_steps: that were not taken, for a gradient was not finite; None where all are.
  """

  run: Run
  curve: Curve
  parameters: int
  state_bytes: int
  fp8_state_bytes: int
  temp_bytes: int
  compile_seconds: float
  export: Export | None = None
  loss_scale: float | None = None
  skipped_steps: int | None = None

  @property
  def loss(self) -> float:
    """The last validation loss."""
    return self.curve.validation[-1][1]

  @property
  def steps_per_second(self) -> float:
    """Median over the stretches: compilation, validation and checkpoints are not in it."""
    return statistics.median(self.curve.rates)


def gap_percent(bf16: Result, fp8: Result) -> float:
  """``100 * (loss FP8 / loss BF16 - 1)``: positive where FP8 is worse."""
  return 100.0 * (fp8.loss / bf16.loss - 1.0)
