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


class BaselineError(RuntimeError):
  """The baseline is not BF16: no ratio to it would mean anything."""


class Kept:
  """Keeps what ``fp8.explain`` compiles for the attached GPU, so that it is compiled once.

  It stands for the jitted function, and then for the lowered one.
  """

  def __init__(self, jitted: Any) -> None:
    self.trace = jitted.trace
    self._jitted = jitted
    self._lowered: Any = None
    self.compiled: Any = None

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
    BaselineError: the baseline has a GEMM whose operands are not BF16.
  """
  kept: Any = Kept(program.fn)
  if on_gpu():
    figures = read(str(name), kept, program)
  else:
    kept.lower(*program.shapes).compile()
    figures = {"problems": []}
  return Ready(kept.compiled, program, figures | memory(kept.compiled))


def read(name: str, kept: Any, program: Program) -> dict[str, Any]:
  """What ``fp8.explain`` says; a program that it cannot read runs all the same, and is marked."""
  try:
    return describe(fp8.explain(kept, *program.shapes, name=name), program)
  except BaselineError:
    raise
  except Exception as error:
    if kept.compiled is None:
      raise
    if not program.is_fp8 and "f8e" in kept.compiled.as_text():
      raise BaselineError(f"{name}: the baseline must be BF16; got FP8 in it") from error
    return {"problems": [f"not read: {type(error).__name__}: {error}"]}


def prepare_all(programs: Mapping[Key, Program], options: Options) -> dict[Key, Ready]:
  """Compiles programs in threads; XLA does not hold Python's lock.

  Returns:
    The programs that compiled. FP8 programs that did not are noted in the options.

  Raises:
    Exception: a baseline did not compile; or as ``prepare``.
  """

  def attempt(name: Key, program: Program) -> Ready | None:
    try:
      return prepare(name, program)
    except Exception as error:
      if not program.is_fp8:
        raise
      options.fail(name, error)
      return None

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
    BaselineError: as ``prepare``.
  """
  others = set(program.bf16_modules)
  projections = [gemm for gemm in report.gemms if others.isdisjoint(gemm.path.split("/"))]
  wrong = [gemm for gemm in projections if not is_right(gemm, program)]
  lines = [
    f"{gemm.path} {gemm.role.value}: {gemm.lhs} x {gemm.rhs} by {gemm.kernel}; {gemm.reason}"
    for gemm in wrong
  ]
  if wrong and not program.is_fp8:
    raise BaselineError(f"{report.name}: the baseline must be BF16; got {lines}")
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
  if sizes is None:
    return {}
  argument, output, alias, temp = (
    getattr(sizes, f"{name}_size_in_bytes") / MIB
    for name in ("argument", "output", "alias", "temp")
  )
  return {"temp_mib": temp, "peak_mib": argument + output - alias + temp}
