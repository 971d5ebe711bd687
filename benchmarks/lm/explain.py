"""Proof of the step before it trains: which of its GEMMs are FP8 in the program made for a GPU.

The model asks for FP8, the compiler decides. So the step goes through ``fp8.explain``, as shapes
alone (a model that is too large for this machine can be looked at all the same), and a GEMM that is
not what its run promises stops the benchmark.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import jax
from rich.console import Console

import flax_fp8 as fp8
from flax_fp8.explain.gemms import Gemm
from flax_fp8.explain.plugin import require_compiler
from lm.config import TrainConfig
from lm.errors import UsageError
from lm.files import whole_file, write_text
from lm.model import FUSED_PROJECTIONS, PROJECTIONS
from lm.runs import BF16, FLOAT16, Run, label, recipe_name
from lm.step import jitted_step, step_shapes

Reports: TypeAlias = dict[Run, fp8.Report]

DEFAULT_TARGET = "h200"
NONE = "none"  # instead of a GPU: looks at no program
# The recipes that promise each GEMM as one FP8 GEMM on every GPU that multiplies FP8. Blocks may be
# multiplied one by one, and MX blocks need Blackwell: of those the count is shown, and not judged.
ONE_GEMM_EACH = frozenset({"delayed", "current", "rowwise"})
XLA_ATTENTION = (
  "Without a GPU, cuDNN's attention can't be compiled: what follows is of XLA's attention instead."
)


def choose_target(asked: str | None) -> str | None:
  """Names the GPU to describe to the compiler; None is the one attached, where it trains."""
  device = jax.devices()[0]
  if device.platform != "gpu":
    return asked or DEFAULT_TARGET
  attached = fp8.GpuTarget.of_kind(device.device_kind)
  return None if asked is None or (attached and attached.name == asked) else asked


def missing_compiler() -> str | None:
  """What to install before a GPU that is not there can be compiled for; None if it is all there."""
  try:
    require_compiler()
  except ImportError as error:
    return str(error)
  return None


def explain_step(config: TrainConfig, run: Run, target: str | None) -> fp8.Report:
  """Compiles the step for a GPU, or for the attached one where ``target`` is None."""
  name = f"{label(run)} step"
  if target is not None and config.shape.attention == "cudnn":
    shape = dataclasses.replace(config.shape, attention="xla")
    config, name = dataclasses.replace(config, shape=shape), f"{name} (XLA attention)"
  return fp8.explain(jitted_step, *step_shapes(config, run), target=target, name=name)


def explain_steps(
  config: TrainConfig, runs: tuple[Run, ...], asked: str | None, console: Console
) -> Reports:
  """Shows what the steps are on a GPU, and checks that their GEMMs are what they should be.

  Args:
    config: what will be trained.
    runs: what will be trained, one step each.
    asked: the GPU that ``--explain`` names, for whole reports; None shows one line a step, of the
      attached GPU or of a described H200.
    console: where to show them.

  Returns:
    The report of each step; nothing where ``asked`` is None and no compiler is installed, or where
    it is ``"none"``.

  Raises:
    UsageError: ``asked`` names a GPU, and no compiler is installed.
    RuntimeError: a GEMM is not what its run promises.
  """
  if asked == NONE:
    return {}
  target = choose_target(asked)
  if target is not None and (missing := missing_compiler()):
    if asked is not None:
      raise UsageError(f"--explain: {missing}")
    return {}
  if target is not None and config.shape.attention == "cudnn":
    console.print(XLA_ATTENTION, highlight=False, soft_wrap=True)
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


def in_projection(gemm: Gemm) -> bool:
  """Whether a GEMM belongs to one of the modules that FP8 is for."""
  return not {*PROJECTIONS, *FUSED_PROJECTIONS}.isdisjoint(gemm.path.split("/"))


def multiplies_fp8(report: fp8.Report) -> bool:
  """Whether the report's GPU has FP8 matrix units, as far as is known."""
  return report.target is None or "fp8" in report.target.peak_flops


def projection_flops(config: TrainConfig) -> int:
  """FLOPs of the three GEMMs of every projection: ``6 * tokens * weights``."""
  weights = sum(k * n for k, n in config.shape.projections.values())
  return 6 * config.batch_size * config.seq_len * config.shape.layers * weights


def require_fp8_gemms(config: TrainConfig, run: Run, report: fp8.Report) -> None:
  """Raises unless FP8 has every GEMM of each projection in FP8, and a run without FP8 has none.

  FLOPs are compared, for the compiler may merge GEMMs that share an input; recomputing (remat) adds
  to them. On a GPU that multiplies no FP8 there is nothing to check but BF16: its report says so
  itself. Nor is there of recipes that promise no GEMM in one piece.
  """
  if run in (BF16, FLOAT16):
    wanted, wrong = 0, [gemm for gemm in report.gemms if gemm.is_fp8]
  elif recipe_name(run) not in ONE_GEMM_EACH or not multiplies_fp8(report):
    return
  else:
    wanted = projection_flops(config)
    wrong = [gemm for gemm in report.gemms if in_projection(gemm) and not gemm.is_fp8]
  found = sum(gemm.flops for gemm in report.gemms if gemm.is_fp8)
  if not wrong and found >= wanted:
    return
  rows = wrong or [gemm for gemm in report.gemms if not gemm.is_fp8]
  rule = f"all GEMMs of the projections, {wanted:.4g} FLOPs or more," if wanted else "no GEMM"
  raise RuntimeError(
    f"train_step: {label(run)} must have {rule} in FP8 on {report.device_kind}; got "
    f"{report.fp8_gemms} of {report.total_gemms} GEMMs, {found:.4g} FLOPs. Look for a projection "
    "that fell back, or a baseline that is none:\n" + "\n".join(lines(rows))
  )


def lines(gemms: list[Gemm]) -> Iterator[str]:
  """One line a GEMM: where it is, in which types, and why it is not FP8."""
  for gemm in gemms:
    reason = gemm.reason or "is FP8"
    place = f"{gemm.path or '(no module)'} {gemm.role.value} ({gemm.times} a step)"
    yield f"  {place}, {gemm.lhs} x {gemm.rhs} by {gemm.kernel}: {reason}"


def write_reports(reports: Reports, folder: Path) -> None:
  """Writes a Markdown file and a picture of each report: where bytes and time go, beside BF16."""
  bf16 = reports.get(BF16)
  for run, report in reports.items():
    write_text(folder / f"explain_{run}.md", report.to_markdown())
    drawn = report.compare(bf16) if bf16 and run != BF16 else report
    with whole_file(folder / f"explain_{run}.png") as beside:
      drawn.plot().savefig(beside, dpi=120)
