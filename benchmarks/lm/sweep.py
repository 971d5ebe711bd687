"""Runs of several recipes and seeds: kept one a file, and what they say together."""

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from lm.checkpoints import check_identity
from lm.config import TrainConfig
from lm.curve import Result
from lm.files import write_text
from lm.plot import color, marker
from lm.report import EMULATED, describe_result, describe_text, emulated, environment
from lm.runs import BF16, Run, label
from lm.text import Corpus
from lm.train import identify

Saved = dict[str, Any]


@dataclasses.dataclass
class Sweep:
  """The finished runs.

  Attributes:
    runs: what ``read_run`` gave, by run and seed.
  """

  runs: dict[Run, dict[int, Saved]] = dataclasses.field(default_factory=dict)

  def add(self, run: Run, seed: int, saved: Saved) -> None:
    """Takes one more run in."""
    self.runs.setdefault(run, {})[seed] = saved

  @property
  def seeds(self) -> list[int]:
    """Every seed of any run."""
    return sorted({seed for of_run in self.runs.values() for seed in of_run})

  @property
  def compared(self) -> list[Run]:
    """The runs that are held against BF16."""
    return [run for run in self.runs if run != BF16]

  def losses(self, run: Run) -> dict[int, float]:
    """The last validation loss by seed."""
    return {seed: saved["validation_loss"] for seed, saved in self.runs.get(run, {}).items()}

  def gaps(self, run: Run) -> dict[int, float]:
    """The gap to BF16 of the same seed, in percent, by seed; of seeds that have both."""
    bf16, losses = self.losses(BF16), self.losses(run)
    return {seed: 100 * (losses[seed] / bf16[seed] - 1) for seed in losses if seed in bf16}


def mean_and_error(values: list[float]) -> tuple[float, float]:
  """The mean and its standard error; NaN where there are too few values for it."""
  mean = statistics.fmean(values) if values else math.nan
  error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
  return mean, error


def write_run(folder: Path, name: str, config: TrainConfig, result: Result, corpus: Corpus) -> None:
  """Writes the file of a finished run, whole or not at all."""
  saved = {
    "identity": identify(config, result.run, corpus),
    "environment": environment(),
    **describe_result(result, None),
  }
  write_text(folder / f"{name}.json", json.dumps(saved, indent=1) + "\n")


def read_run(
  folder: Path, name: str, config: TrainConfig, run: Run, corpus: Corpus
) -> Saved | None:
  """Reads the file of a finished run; None where there is none.

  Raises:
    UsageError: the file is of a run with another curve.
  """
  path = folder / f"{name}.json"
  if not path.exists():
    return None
  saved = json.loads(path.read_text())
  check_identity(identify(config, run, corpus), saved["identity"], what=f"--out: {path}")
  return saved


def show(sweep: Sweep, config: TrainConfig, console: Console) -> None:
  """Prints one row a run: its loss and gap for each seed, and the mean gap."""
  grid = Table(title=f"{config.steps} steps: last validation loss")
  grid.add_column("", no_wrap=True)
  for seed in sweep.seeds:
    grid.add_column(f"seed {seed}", justify="right")
  grid.add_column("mean gap", justify="right")
  for run in sweep.runs:
    losses, gaps = sweep.losses(run), sweep.gaps(run)
    cells = [
      cell(losses.get(seed), None if run == BF16 else gaps.get(seed)) for seed in sweep.seeds
    ]
    grid.add_row(label(run), *cells, "" if run == BF16 else mean_cell(list(gaps.values())))
  console.print(grid)
  if emulated():
    console.print(EMULATED, highlight=False, soft_wrap=True)


def mean_cell(gaps: list[float]) -> str:
  """The mean gap with its standard error, as far as there are any."""
  mean, error = mean_and_error(gaps)
  if math.isnan(mean):
    return "-"
  return f"{mean:+.2f} %" if math.isnan(error) else f"{mean:+.2f} ± {error:.2f} %"


def cell(loss: float | None, gap: float | None) -> str:
  """A loss and its gap, as far as there are any."""
  parts = [] if loss is None else [f"{loss:.4f}"]
  return "\n".join(parts + ([] if gap is None else [f"{gap:+.2f} %"])) or "-"


def write_json(sweep: Sweep, config: TrainConfig, corpus: Corpus, path: Path) -> None:
  """Writes the answer, and every run without its training curve, which its own file has."""

  def summary(run: Run) -> dict[str, Any]:
    gaps = sweep.gaps(run)
    mean, error = mean_and_error(list(gaps.values()))
    known = {"mean_gap_percent": mean, "standard_error": error}
    return {"gap_percent": gaps, **{k: v for k, v in known.items() if math.isfinite(v)}}

  settings = config.as_dict()
  del settings["seed"]
  left_out = ("identity", "train_curve", "stretch_rates")
  document = {
    "environment": environment(),
    "config": settings,
    "text": describe_text(corpus),
    "seeds": sweep.seeds,
    "compared": {run: summary(run) for run in sweep.compared},
    "runs": {
      run: {
        seed: {key: value for key, value in saved.items() if key not in left_out}
        for seed, saved in of_run.items()
      }
      for run, of_run in sweep.runs.items()
    },
  }
  write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def draw(sweep: Sweep) -> Figure:
  """Draws the gap of each recipe, one dot a seed, and above it the curves of all runs."""
  figure = Figure(figsize=(7, 7), layout="constrained")
  curves, gaps = figure.subplots(2, 1, height_ratios=[3, 2])
  draw_validation(curves, sweep)
  draw_gaps(gaps, sweep)
  return figure


def draw_validation(axes: Axes, sweep: Sweep) -> None:
  """Draws the validation losses, averaged over the seeds of each run."""
  for run, of_run in sweep.runs.items():
    points = [saved["validation_curve"] for saved in of_run.values()]
    steps = [step for step, _ in points[0]]
    losses = np.mean([[loss for _, loss in curve] for curve in points], axis=0)
    axes.plot(
      steps, losses, f"{marker(run)}-", color=color(run), fillstyle="none", label=label(run)
    )
  axes.set(xlabel="steps", ylabel="validation loss, nats a byte", title="Mean over seeds")
  axes.legend()


def draw_gaps(axes: Axes, sweep: Sweep) -> None:
  """Draws one dot a seed, and the mean with its standard error."""
  axes.axhline(0.0, color="gray", linewidth=0.8)
  for place, run in enumerate(sweep.compared):
    gaps = list(sweep.gaps(run).values())
    mean, error = mean_and_error(gaps)
    axes.plot([place] * len(gaps), gaps, "o", color=color(run), fillstyle="none")
    axes.errorbar(
      place + 0.15, mean, None if math.isnan(error) else error, fmt="_", color="black", capsize=3
    )
  axes.set_xticks(range(len(sweep.compared)), sweep.compared)
  axes.set_ylabel("loss above BF16, %")
  axes.set_title("One circle a seed; mean and its standard error beside")
