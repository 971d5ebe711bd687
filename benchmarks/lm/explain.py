"""Proof of the step before it trains: which of its GEMMs are FP8 in the program made for a GPU.

The model asks for FP8, the compiler decides. So the step goes through ``fp8.explain``, as shapes
alone (a model that is too large for this machine can be looked at all the same), and a GEMM that is
not what its precision promises stops the benchmark.
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
from lm.config import Precision, TrainConfig
from lm.errors import UsageError
from lm.model import PROJECTIONS
from lm.step import jitted_step, step_shapes

Reports: TypeAlias = dict[Precision, fp8.Report]

DEFAULT_TARGET = "h200"
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


def explain_step(config: TrainConfig, precision: Precision, target: str | None) -> fp8.Report:
  """Compiles the step for a GPU, or for the attached one where ``target`` is None."""
  name = f"{precision.upper()} step"
  if target is not None and config.shape.attention == "cudnn":
    shape = dataclasses.replace(config.shape, attention="xla")
    config, name = dataclasses.replace(config, shape=shape), f"{name} (XLA attention)"
  return fp8.explain(jitted_step, *step_shapes(config, precision), target=target, name=name)


def explain_steps(
  config: TrainConfig, precisions: tuple[Precision, ...], asked: str | None, console: Console
) -> Reports:
  """Shows what the steps are on a GPU, and checks that their GEMMs are what they should be.

  Args:
    config: what will be trained.
    precisions: of the projections' GEMMs, one step each.
    asked: the GPU that ``--explain`` names, for whole reports; None shows one line a step, of the
      attached GPU or of a described H200.
    console: where to show them.

  Returns:
    The report of each step; nothing where ``asked`` is None and no compiler is installed.

  Raises:
    UsageError: ``asked`` names a GPU, and no compiler is installed.
    RuntimeError: a GEMM is not what its precision promises.
  """
  target = choose_target(asked)
  if target is not None and (missing := missing_compiler()):
    if asked is not None:
      raise UsageError(f"--explain: {missing}")
    return {}
  if target is not None and config.shape.attention == "cudnn":
    console.print(XLA_ATTENTION, highlight=False, soft_wrap=True)
  reports: Reports = {}
  for precision in precisions:
    with console.status(f"{precision.upper()}: compiling the step for {target or 'this GPU'}"):
      report = reports[precision] = explain_step(config, precision, target)
    console.out(report if asked else report.title, highlight=False)
    require_fp8_gemms(config, precision, report)
  if asked is not None and len(reports) == 2:
    console.out(reports["fp8"].compare(reports["bf16"]), highlight=False)
  return reports


def in_projection(gemm: Gemm) -> bool:
  """Whether a GEMM belongs to one of the modules that FP8 is for."""
  return not set(PROJECTIONS).isdisjoint(gemm.path.split("/"))


def require_fp8_gemms(config: TrainConfig, precision: Precision, report: fp8.Report) -> None:
  """Raises unless FP8 has every GEMM of each projection in FP8, and BF16 has none.

  Recomputing (remat) adds forward GEMMs, so three of a projection and layer are the least. On a GPU
  that multiplies no FP8 there is nothing to check but BF16: its report says so itself.
  """
  if precision == "bf16":
    wanted, wrong = 0, [gemm for gemm in report.gemms if gemm.is_fp8]
  elif report.target is not None and "fp8" not in report.target.peak_flops:
    return
  else:
    wanted = 3 * len(PROJECTIONS) * config.shape.layers
    wrong = [gemm for gemm in report.gemms if in_projection(gemm) and not gemm.is_fp8]
  if not wrong and report.fp8_gemms >= wanted:
    return
  rows = wrong or [gemm for gemm in report.gemms if not gemm.is_fp8]
  rule = f"all GEMMs of the projections, {wanted} or more," if wanted else "no GEMM"
  raise RuntimeError(
    f"train_step: precision {precision} must have {rule} in FP8 on {report.device_kind}; got "
    f"{report.fp8_gemms} of {report.total_gemms}. Look for a projection that fell back, or a "
    "baseline that is none:\n" + "\n".join(lines(rows))
  )


def lines(gemms: list[Gemm]) -> Iterator[str]:
  """One line a GEMM: where it is, in which types, and why it is not FP8."""
  for gemm in gemms:
    reason = gemm.reason or "is FP8"
    place = f"{gemm.path or '(no module)'} {gemm.role.value} ({gemm.times} a step)"
    yield f"  {place}, {gemm.lhs} x {gemm.rhs} by {gemm.kernel}: {reason}"


def write_reports(reports: Reports, folder: Path) -> None:
  """Writes a Markdown file of each report, and one picture of where bytes and time go."""
  folder.mkdir(parents=True, exist_ok=True)
  for precision, report in reports.items():
    (folder / f"explain_{precision}.md").write_text(report.to_markdown())
  one, *others = reversed(reports.values())  # FP8, then what it is compared with
  drawn = one.compare(others[0]) if others else one
  drawn.plot().savefig(folder / "explain.png", dpi=120)
