"""Compiles programs, several at a time, and checks their GEMMs before any program runs."""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import flax_fp8 as fp8
from flax_fp8.explain.gemms import Gemm
from harness.options import Options, on_gpu
from harness.programs import Program

Key = TypeVar("Key")
MIB = 2**20


class Kept:
  """Keeps what ``fp8.explain`` compiles for the attached GPU, so that it is compiled once.

  It stands for the jitted function, and then for the lowered one.
  """

  def __init__(self, jitted: Any) -> None:
    self.trace = jitted.trace
    self._jitted = jitted
    self._lowered: Any = None
    self.compiled: Any = None

  def __call__(self, *args: Any) -> Any:
    return self._jitted(*args)

  def lower(self, *args: Any) -> "Kept":
    self._lowered = self._jitted.lower(*args)
    return self

  def compile(self) -> Any:
    self.compiled = self._lowered.compile()
    return self.compiled

  def as_text(self, **options: Any) -> str:
    return self._lowered.as_text(**options)


@dataclasses.dataclass(frozen=True)
class Ready:
  """A compiled program: what runs it, what it was, and what is known without running it."""

  run: Any
  program: Program
  figures: dict[str, Any]


def prepare(name: object, program: Program) -> Ready:
  """Compiles a program for the default device; on a GPU, reads what was compiled.

  Raises:
    ValueError: the baseline has a GEMM whose operands are not BF16.
  """
  kept: Any = Kept(program.fn)
  if on_gpu():
    figures = describe(fp8.explain(kept, *program.shapes, name=str(name)), program)
  else:
    kept.lower(*program.shapes).compile()
    figures = {"problems": []}
  return Ready(kept.compiled, program, figures | memory(kept.compiled))


def prepare_all(programs: Mapping[Key, Program], options: Options) -> dict[Key, Ready]:
  """Compiles programs in threads; XLA does not hold Python's lock.

  Returns:
    The programs that compiled. FP8 programs that did not are noted in the options.

  Raises:
    Exception: a baseline did not compile; or as ``prepare``.
  """

  def attempt(name: Key, program: Program) -> Ready | None:
    with options.noting(name, program.is_fp8):
      return prepare(name, program)

  with ThreadPoolExecutor(options.threads) as pool:
    made = zip(programs, pool.map(attempt, programs, programs.values()), strict=True)
    return {name: ready for name, ready in made if ready}


def describe(report: fp8.Report, program: Program) -> dict[str, Any]:
  """What a report says about a program, in numbers of one step."""
  return {
    "fp8_gemms": report.fp8_gemms / program.repeat,
    "gemms": report.total_gemms / program.repeat,
    "kernels": report.launches / program.repeat,
    "mib_outside_gemms": report.bytes_outside_gemms / program.repeat / MIB,
    "estimated_ms": 1e3 * (report.estimated_seconds or 0.0) / program.repeat,
    "gemm_kernels": sorted({gemm.kernel for gemm in report.gemms}),
    "problems": problems(report, program),
    "doubts": list(report.doubts),
  }


def problems(report: fp8.Report, program: Program) -> list[str]:
  """A program's GEMMs that do not have the dtype that was asked for.

  Raises:
    ValueError: as ``prepare``. No ratio to such a baseline would mean anything.
  """
  others = set(program.bf16_modules)
  projections = [gemm for gemm in report.gemms if others.isdisjoint(gemm.path.split("/"))]
  lines = [
    f"{gemm.path} {gemm.role.value}: {gemm.lhs} x {gemm.rhs} by {gemm.kernel}; {gemm.reason}"
    for gemm in projections
    if not is_right(gemm, program)
  ]
  if lines and not program.is_fp8:
    raise ValueError(f"{report.name}: the baseline must be BF16; got {lines}")
  found = sum(gemm.flops for gemm in projections if is_right(gemm, program))
  wanted = program.flops * program.repeat
  missing = [f"{found:.4g} FLOPs found, {wanted:.4g} asked for"] if found < wanted else []
  return [*lines, *missing]


def is_right(gemm: Gemm, program: Program) -> bool:
  """Whether a GEMM is FP8 where that was asked for, and BF16 in the baseline."""
  return gemm.is_fp8 if program.is_fp8 else {gemm.lhs, gemm.rhs} == {"bf16"}


def memory(compiled: Any) -> dict[str, float]:
  """MiB of a program's temporaries, and at its peak: arguments, results and temporaries."""
  sizes = compiled.memory_analysis()
  names = ("argument", "output", "alias", "temp")
  argument, output, alias, temp = (getattr(sizes, f"{name}_size_in_bytes") / MIB for name in names)
  return {"temp_mib": temp, "peak_mib": argument + output - alias + temp}
