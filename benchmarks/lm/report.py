"""What a comparison ends with: a table, a plot, and ``results.json``, from which both are made."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from rich.console import Console

from harness.environment import environment, on_cpu
from harness.names import color, marker
from harness.output import say
from harness.plot import legend, make_figure
from harness.table import Column, print_table
from lm.config import TrainConfig
from lm.explain import Reports, missing_compiler
from lm.runs import BF16, label
from lm.text import Corpus
from lm.train import LAST, Record

MIB = 2**20
SMOOTHED_PERCENT = 3  # of all steps
EMULATED = "FP8 is emulated on this CPU: the losses are those of FP8, the steps/s are not."


def find_gaps(runs: Mapping[str, Record], name: str = "validation_loss") -> dict[str, float]:
  """``100 * (loss / loss of BF16 - 1)`` of each other run; empty without BF16."""
  losses = {run: record[name] for run, record in runs.items()}
  bf16 = losses.pop(BF16, None)
  return {run: 100.0 * (loss / bf16 - 1.0) for run, loss in losses.items()} if bf16 else {}


def make_document(
  records: list[Record], reports: Reports, config: TrainConfig, corpus: Corpus, devices: int
) -> dict[str, Any]:
  """All results, in JSON's types. Losses are exact, so two runs can be compared bit by bit."""
  runs: dict[str, Record] = {}
  for record in records:
    report = reports.get(record["run"])
    runs[record["run"]] = record | {
      "fp8_gemms": report and report.fp8_gemms,
      "gemms": report and report.total_gemms,
      "gemms_target": report and report.device_kind,
    }
  return {
    "environment": environment(),
    "config": config.as_dict(),
    "text": corpus.as_dict(),
    "devices": devices,
    "processes": jax.process_count(),
    "gap_percent": find_gaps(runs),
    "training_gap_percent": find_gaps(runs, "training_loss"),
    "runs": runs,
  }


def columns(document: Mapping[str, Any]) -> tuple[Column, ...]:
  first = next(iter(document["runs"].values()))
  counted = f"FP8 GEMMs ({first['gemms_target']})" if first["gemms"] else "FP8 GEMMs"

  def loss_column(title: str, name: str, gaps: Mapping[str, float]) -> Column:
    gap = lambda run: f" ({gaps[run]:+.2f} %)" if run in gaps else ""
    return Column(title, lambda row: f"{row[name]:.4f}{gap(row['run'])}")

  count = lambda row: f"{row['fp8_gemms']}/{row['gemms']}" if row["gemms"] else "-"
  return (
    Column("", lambda row: label(row["run"]), left=True),
    loss_column("training loss", "training_loss", document["training_gap_percent"]),
    loss_column("validation loss", "validation_loss", document["gap_percent"]),
    Column("steps/s", "{steps_per_second:.2f}"),
    Column(counted, count),
    Column("state", lambda row: f"{row['state_bytes'] / MIB:.2f} MiB"),
  )


def show(document: Mapping[str, Any], console: Console) -> None:
  """Prints the table, and what its numbers leave open."""
  rows = list(document["runs"].values())
  title = f"{rows[0]['parameters']:,} parameters, {document['config']['steps']:,} steps"
  print_table(console, title, columns(document), rows, group=None)
  if not rows[0]["gemms"]:
    reason = missing_compiler() or "--explain none compiles no step."
    say(console, f"FP8 GEMMs are not counted: {reason}")
  if on_cpu():
    say(console, EMULATED)
  say(console, f"Training loss: the mean of the last {LAST} steps. In brackets: the gap to BF16.")
  for row in rows:
    if "loss_scale" in row:
      scale, skipped = row["loss_scale"], row["skipped_steps"]
      say(console, f"{label(row['run'])}: final loss scale {scale:g}, {skipped} skipped steps")
    if "export" in row:
      say(console, describe_export(row, row["export"]))


def describe_export(record: Record, export: Record) -> str:
  """The size of an exported model, and its loss beside that of training, in one line."""
  difference = export["validation_loss"] - record["validation_loss"]
  return (
    f"{label(record['run'])}, exported: variables {export['bytes'] / MIB:.2f} MiB (BF16 "
    f"{export['bytes_bf16'] / MIB:.2f} MiB); validation loss off by {difference:+.2g}; program of "
    f"{export['program_bytes'] / 2**10:.0f} KiB for {' and '.join(export['platforms'])}"
  )


def draw_curve(axes: Any, record: Record, name: str, **looks: Any) -> None:
  """Draws the training loss, a moving mean, as a line, validation as points."""
  losses = record["train_curve"]
  width = max(1, len(losses) * SMOOTHED_PERCENT // 100)
  means = np.convolve(losses, np.full(width, 1 / width), "valid")
  axes.plot(range(width, len(losses) + 1), means, color=looks["color"], alpha=0.5)
  points = zip(*record["validation_curve"], strict=True)
  axes.plot(*points, linestyle="", fillstyle="none", label=name, **looks)
  axes.set_ylabel("loss, nats per byte")


def draw_gaps(axes: Any, base: Record, others: Mapping[str, Record]) -> None:
  """Draws how far the validation loss of each run is above that of ``base``."""
  losses = dict(base["validation_curve"])
  axes.axhline(0.0, color="gray", linewidth=0.8)
  for run, record in others.items():
    points = [(at, loss) for at, loss in record["validation_curve"] if at in losses]
    gaps = [100 * (loss / losses[at] - 1) for at, loss in points]
    looks = {"marker": marker(run), "color": color(run), "fillstyle": "none"}
    axes.plot([at for at, _ in points], gaps, **looks)
  axes.set_ylabel("above BF16, %")


def draw(document: Mapping[str, Any]) -> Any:
  """Draws the losses; below them the gaps, if BF16 and another run were trained."""
  runs = document["runs"]
  others = {run: record for run, record in runs.items() if run != BF16}
  both = BF16 in runs and bool(others)
  parameters = next(iter(runs.values()))["parameters"]
  title = f"Training loss (line) and validation loss (points), {parameters:,} parameters"
  figure = make_figure(title, document, (7, 6 if both else 4))
  ratios = [3, 1] if both else [1]
  panels = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)
  for run, record in runs.items():
    draw_curve(panels[0, 0], record, label(run), color=color(run), marker=marker(run))
  if both:
    draw_gaps(panels[1, 0], runs[BF16], others)
  panels[-1, 0].set_xlabel("steps")
  legend(figure)
  return figure
