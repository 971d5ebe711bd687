"""The sections of a report: tables and lines of text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

from flax_fp8.explain.collectives import Collective
from flax_fp8.explain.compile import Memory
from flax_fp8.explain.gemms import PLAIN_JAX, Gemm
from flax_fp8.explain.mosaic import Registers
from flax_fp8.explain.roofline import ClassTotal
from flax_fp8.explain.target import GpuTarget
from flax_fp8.tables import Table

MIB = 2**20


def short_dtype(dtype: str) -> str:
  """Shortens FP8 dtypes: ``f8e4m3fn`` becomes ``e4m3``. Other dtypes are unchanged."""
  return dtype.removeprefix("f8").removesuffix("fn") if dtype.startswith("f8") else dtype


def _size(gemm: Gemm) -> str:
  extent = gemm.extent
  batch = f"{extent.batch} * " if extent.batch > 1 else ""
  return f"{batch}{extent.m} x {extent.n} x {extent.k}"


def gemm_line(gemm: Gemm) -> str:
  """Returns one line about a GEMM that is not FP8, with its reason."""
  size = _size(gemm).replace(" ", "")
  return f"{gemm.path or '(no module)'} {gemm.role.value}, {size} by {gemm.kernel}: {gemm.reason}"


def gemm_table(gemms: Iterable[Gemm], refusals: Iterable[str]) -> Table:
  """Builds a table with a row for each kind of GEMM, by module; equal rows are counted together."""
  letters = {reason: f"no [{index}]" for index, reason in enumerate(refusals, 1)}
  counts: dict[str, dict[tuple[str, ...], int]] = {}
  for gemm in gemms:
    types = " ".join(short_dtype(dtype) for dtype in (gemm.lhs, gemm.rhs, gemm.out))
    notes = [f"({note})" for note in gemm.notes if not _is_of_program(note)]
    kernel = " ".join([gemm.kernel, *notes])
    fp8 = letters.get(gemm.reason, "yes")
    row = (gemm.role.value, _size(gemm), types, fp8, kernel)
    rows = counts.setdefault(gemm.path or "(no module)", {})
    rows[row] = rows.get(row, 0) + gemm.times
  rows = (
    (path, *row, str(times)) for path, found in counts.items() for row, times in found.items()
  )
  columns = ("<module", "<role", "<M x N x K", "<lhs rhs out", "<FP8", "<kernel", "times")
  return Table(columns, tuple(rows), grouped=True)


def refusal_lines(refusals: Mapping[str, Sequence[Gemm]]) -> Iterator[str]:
  """Yields a line for each reason why GEMMs are not FP8."""
  for index, (reason, gemms) in enumerate(refusals.items(), 1):
    times = sum(gemm.times for gemm in gemms)
    flops = sum(gemm.flops for gemm in gemms)
    yield f"[{index}] {reason} ({_count(times)}, {flops / 1e9:,.3g} GFLOP)"


def _count(times: int) -> str:
  return "1 GEMM" if times == 1 else f"{times} GEMMs"


def _is_of_program(note: str) -> bool:
  """Returns whether a note is about the program and not about one GEMM, so it is printed once."""
  return note.startswith(PLAIN_JAX)


def note_lines(gemms: Iterable[Gemm]) -> Iterator[str]:
  """Yields the notes that are printed once, with the number of their GEMMs."""
  counts: dict[str, int] = {}
  for gemm in gemms:
    for note in filter(_is_of_program, gemm.notes):
      counts[note] = counts.get(note, 0) + gemm.times
  return (f"Note: {note} ({_count(times)})" for note, times in counts.items())


def register_lines(kernels: Iterable[Registers]) -> Iterator[str]:
  """Yields a line with the registers of Mosaic kernels, and a warning for each that spills."""
  found = list(kernels)
  if found:
    each = dict.fromkeys(f"{kernel.kernel} {kernel.registers}" for kernel in found)
    yield f"Registers of a thread: {', '.join(each)}"
  for kernel in found:
    if kernel.spilled:
      yield f"Warning: {kernel.kernel} spills {kernel.spilled} bytes of registers in each thread"


def class_table(totals: Sequence[ClassTotal], seconds: float | None) -> Table:
  """Builds a table of the classes of kernels, with their sum; ``seconds`` is its roofline."""
  rows = [
    (
      total.kind.value,
      str(total.kernels),
      f"{total.bytes / MIB:,.1f}",
      _milliseconds(total.seconds),
    )
    for total in totals
  ]
  everything = sum(total.bytes for total in totals) / MIB
  launches = sum(total.kernels for total in totals)
  rows.append(("all", str(launches), f"{everything:,.1f}", _milliseconds(seconds)))
  return Table(("<kernels", "times", "MiB moved", "roofline ms"), tuple(rows))


def _milliseconds(seconds: float | None) -> str:
  return "" if seconds is None else f"{1e3 * seconds:.3g}"


def collective_table(collectives: Iterable[Collective]) -> Table:
  """Builds a table with a row for each collective."""
  rows = tuple(
    (
      each.kind,
      each.dtype,
      f"{each.bytes / MIB:,.2f}",
      str(each.group),
      str(each.times),
      each.path,
    )
    for each in collectives
  )
  return Table(("<collective", "<dtype", "MiB", "devices", "times", "<module"), rows)


def memory_line(memory: Memory, target: GpuTarget | None) -> str:
  """Returns the line about memory; with its share of the GPU's, if ``target`` is known."""
  argument, output, alias, temp, total = (
    f"{size / MIB:,.1f}" for size in (*dataclasses.astuple(memory), memory.total)
  )
  line = (
    f"Memory: {argument} MiB of arguments, {output} of results ({alias} of them written over "
    f"arguments), {temp} of temporaries; {total} in all"
  )
  if target is None:
    return line
  return f"{line}, {100 * memory.total / target.memory_bytes:.1f} % of the GPU's"
