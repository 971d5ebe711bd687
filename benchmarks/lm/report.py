"""What a comparison ends with: a table for the reader, and ``results.json`` for everything else."""

import dataclasses
import datetime
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import flax
import jax
from rich.console import Console
from rich.table import Table

import flax_fp8 as fp8
from lm.config import TrainConfig
from lm.curve import Export, Result, gap_percent
from lm.devices import Devices
from lm.explain import Reports, missing_compiler
from lm.files import write_text
from lm.runs import BF16, Run, label
from lm.text import Corpus

NOT_ASKED = "--explain none asks for no program."
EMULATED = (
  "FP8 is emulated on this CPU: the losses are what FP8 gives, but steps/s is no claim about speed."
)


def emulated() -> bool:
  """Whether FP8 GEMMs run on a device that computes them in a wider type."""
  return jax.default_backend() == "cpu"


def find_gaps(results: list[Result]) -> dict[Run, float]:
  """The gap to BF16 of each recipe, in percent; empty where BF16 did not run."""
  by_run = {result.run: result for result in results}
  bf16 = by_run.pop(BF16, None)
  return {run: gap_percent(bf16, result) for run, result in by_run.items()} if bf16 else {}


def mebibytes(count: int) -> str:
  """Bytes as MiB."""
  return f"{count / 2**20:.2f} MiB"


def gemm_heading(reports: Reports) -> str:
  """The heading of the GEMMs' column, with the GPU that they were compiled for."""
  kinds = {report.device_kind for report in reports.values()}
  return f"FP8 GEMMs ({', '.join(kinds)})" if kinds else "FP8 GEMMs"


def table(results: list[Result], reports: Reports, config: TrainConfig) -> Table:
  """One row a run."""
  grid = Table(title=f"{results[0].parameters:,} parameters, {config.steps} steps")
  gemms = gemm_heading(reports)
  for heading in ("", "held-out loss", "gap", "steps/s", gemms, "state", "FP8 state"):
    justify = "right" if heading else "left"
    grid.add_column(heading, justify=justify, no_wrap=not heading, overflow="fold")
  gaps = find_gaps(results)
  for result in results:
    report = reports.get(result.run)
    grid.add_row(
      label(result.run),
      f"{result.loss:.4f}",
      f"{gaps[result.run]:+.2f} %" if result.run in gaps else "",
      f"{result.steps_per_second:.2f}",
      f"{report.fp8_gemms}/{report.total_gemms}" if report else "-",
      mebibytes(result.state_bytes),
      mebibytes(result.fp8_state_bytes),
    )
  return grid


def show(results: list[Result], reports: Reports, config: TrainConfig, console: Console) -> None:
  """Prints the table, why it lacks a count, and on a CPU the line that keeps its steps/s honest."""
  console.print(table(results, reports, config))
  if not reports:
    note = f"FP8 GEMMs are not counted: {missing_compiler() or NOT_ASKED}"
    console.print(note, markup=False, highlight=False, soft_wrap=True)
  if emulated():
    console.print(EMULATED, highlight=False, soft_wrap=True)
  for result in results:
    if result.loss_scale is not None:
      note = f"{label(result.run)}: loss scale {result.loss_scale:g} at the end, "
      console.out(f"{note}{result.skipped_steps} steps skipped", highlight=False)
    if result.export:
      console.print(describe_export(result, result.export), highlight=False, soft_wrap=True)


def describe_export(result: Result, export: Export) -> str:
  """What serving a run takes, and whether it gives what training gave, in one line."""
  difference = export.validation_loss - result.loss
  sizes = (
    ("kernels", export.kernel_bytes, export.kernel_bytes_bf16),
    ("all variables", export.bytes, export.bytes_bf16),
    ("on disk", export.disk_bytes, export.disk_bytes_bf16),
  )
  parts = [f"{name} {mebibytes(now)} (BF16 {mebibytes(bf16)})" for name, now, bf16 in sizes]
  loss = f"off by {difference:+.2g}" if difference else "the same, bit for bit"
  kibibytes, platforms = export.program_bytes / 2**10, " and ".join(export.platforms)
  return (
    f"{label(result.run)}, exported: {', '.join(parts)}; held-out loss {loss}; program of "
    f"{kibibytes:.0f} KiB for {platforms}"
  )


def describe_result(result: Result, report: fp8.Report | None) -> dict[str, Any]:
  """All numbers of one run; those of its GEMMs are null where nothing could count them."""
  scaled = result.loss_scale is not None
  return {
    "validation_loss": result.loss,
    "steps_per_second": result.steps_per_second,
    "fp8_gemms": report and report.fp8_gemms,
    "gemms": report and report.total_gemms,
    "gemms_target": report and report.device_kind,
    "parameters": result.parameters,
    "state_bytes": result.state_bytes,
    "fp8_state_bytes": result.fp8_state_bytes,
    "temp_bytes": result.temp_bytes,
    "compile_seconds": result.compile_seconds,
    "train_curve": result.curve.train,
    "validation_curve": result.curve.validation,
    "stretch_rates": result.curve.rates,
    **({"loss_scale": result.loss_scale, "skipped_steps": result.skipped_steps} if scaled else {}),
    **({"export": dataclasses.asdict(result.export)} if result.export else {}),
  }


def environment() -> dict[str, Any]:
  """Where and when the numbers were made."""
  return {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "device": jax.devices()[0].device_kind,
    "backend": jax.default_backend(),
    "fp8_emulated": emulated(),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "flax": flax.__version__,
    "optax": metadata.version("optax"),
    "orbax-checkpoint": metadata.version("orbax-checkpoint"),
    "flax_fp8": fp8.__version__,
  }


def describe_text(corpus: Corpus) -> dict[str, Any]:
  """Which text was learnt."""
  return {"name": corpus.name, "sha256_16": corpus.digest, "train_bytes": len(corpus.train)}


def write_json(
  results: list[Result],
  reports: Reports,
  config: TrainConfig,
  corpus: Corpus,
  path: Path,
  *,
  devices: Devices,
  explained: bool,
) -> None:
  """Writes every number; the losses are exact, so two runs can be compared bit by bit.

  Args:
    results: the runs.
    reports: of their steps.
    config: what was trained.
    corpus: on what.
    path: the file.
    devices: that shared each batch.
    explained: write the whole reports too.
  """
  document = {
    "environment": environment(),
    "config": config.as_dict(),
    "text": describe_text(corpus),
    "devices": len(devices.devices),
    "processes": jax.process_count(),
    "gap_percent": find_gaps(results),
    "runs": {result.run: describe_result(result, reports.get(result.run)) for result in results},
  }
  if explained:
    document["explain"] = {name: report.to_dict() for name, report in reports.items()}
  write_text(path, json.dumps(document, indent=1) + "\n")
