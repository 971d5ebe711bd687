"""Counts a step's FP8 GEMMs before it trains, in the program that the GPU compiler makes of it.

The model asks for FP8, and the compiler decides. The step goes through ``fp8.explain`` as shapes,
so that this machine can examine a model too large for it.
"""

import dataclasses
import re
from pathlib import Path

import jax
from rich.console import Console

import flax_fp8 as fp8
from flax_fp8.explain.plugin import require_compiler
from harness.output import say, whole_file, write_text
from lm.config import TrainConfig, UsageError
from lm.runs import BF16, Run, label, recipe_name, recipe_of
from lm.step import jitted_step, step_shapes

Reports = dict[Run, fp8.Report]

DEFAULT_TARGET = "h200"
NONE = "none"
# The GEMMs of these recipes are FP8 on every GPU with FP8. MX blocks need Blackwell.
ALWAYS_FP8 = frozenset({"delayed", "current", "rowwise", "block"})
# The GEMMs that stay BF16: the head's, and those of attention, whose module is the layer itself.
NO_PROJECTION = re.compile(r"^(\w+/)?(head|embedding|layers)$")


def choose_target(asked: str | None) -> str | None:
  """The described GPU to compile for; None compiles for the attached one."""
  device = jax.devices()[0]
  if device.platform != "gpu":
    return asked or DEFAULT_TARGET
  attached = fp8.GpuTarget.of_kind(device.device_kind)
  return None if asked is None or (attached and attached.name == asked) else asked


def missing_compiler() -> str | None:
  """What to install to compile for a GPU that is not attached; None if nothing is missing."""
  try:
    require_compiler()
  except ImportError as error:
    return str(error)
  return None


def explain_step(config: TrainConfig, run: Run, target: str | None) -> fp8.Report:
  name = f"{label(run)} step"
  if target is not None and config.shape.attention == "cudnn":
    shape = dataclasses.replace(config.shape, attention="xla")
    config, name = dataclasses.replace(config, shape=shape), f"{name} (XLA attention)"
  return fp8.explain(jitted_step, *step_shapes(config, run), target=target, name=name)


def explain_steps(
  config: TrainConfig, runs: tuple[Run, ...], asked: str | None, console: Console
) -> Reports:
  """Compiles each step for a GPU, prints what it became, and checks its GEMMs."""
  if asked == NONE:
    return {}
  target = choose_target(asked)
  if target is not None and (missing := missing_compiler()):
    if asked is not None:
      raise UsageError(f"--explain: {missing}")
    return {}
  if target is not None and config.shape.attention == "cudnn":
    say(console, "Without a GPU, cuDNN's attention can't be compiled; this is XLA's attention.")
  reports: Reports = {}
  for run in runs:
    with console.status(f"{label(run)}: compiling the step for {target or 'this GPU'}"):
      report = reports[run] = explain_step(config, run, target)
    console.out(report if asked else report.title, highlight=False)
    require_fp8_gemms(config, run, report)
  if asked is not None and BF16 in reports:
    for run in (run for run in runs if run != BF16):
      console.out(reports[run].compare(reports[BF16]), highlight=False)
  return reports


def require_fp8_gemms(config: TrainConfig, run: Run, report: fp8.Report) -> None:
  """Raises AssertionError unless each projection's GEMMs are FP8, or no GEMM in a run without FP8.

  FLOPs are compared as well, because the compiler may merge GEMMs that share an input. A GPU
  without FP8 units, or a recipe that needs newer units than some GPUs have, is not checked.
  """
  has_units = report.target is None or "fp8" in report.target.peak_flops
  weights = config.shape.layers * sum(k * n for k, n in config.shape.projections.values())
  wanted = 6 * config.batch_size * config.seq_len * weights  # three GEMMs for each projection
  found = sum(g.flops for g in report.gemms if g.is_fp8)
  if recipe_of(run) is None:
    wanted = 0
  elif recipe_name(run) not in ALWAYS_FP8 or not has_units:
    return
  else:
    report.assert_fp8([NO_PROJECTION])
  if found < wanted or found > 0 == wanted:
    raise AssertionError(
      f"train_lm: the step of {label(run)} must have {wanted:.4g} FLOPs of projections in FP8 on "
      f"{report.device_kind}; got {found:.4g}. Print the report with --explain, and look for a "
      "projection that fell back, or FP8 in the baseline."
    )


def write_reports(reports: Reports, folder: Path) -> None:
  """Writes a Markdown file and a plot per report, beside BF16 where it ran."""
  bf16 = reports.get(BF16)
  for run, report in reports.items():
    write_text(folder / f"explain_{run}.md", report.to_markdown())
    drawn = report.compare(bf16) if bf16 and run != BF16 else report
    with whole_file(folder / f"explain_{run}.png") as beside:
      drawn.plot().savefig(beside, dpi=120)
