"""What ``explain`` found out about a program, as numbers, tables and pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from flax_fp8.explain import plot, roofline, tables
from flax_fp8.explain.collectives import Collective
from flax_fp8.explain.compile import Memory
from flax_fp8.explain.gemms import Gemm
from flax_fp8.explain.tables import Table
from flax_fp8.explain.target import GpuTarget
from flax_fp8.explain.traffic import Kernel, KernelClass

_GEMMS = (KernelClass.FP8_GEMM, KernelClass.GEMM)
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class ClassTotal:
  """All kernels of one class.

  Attributes:
    kind: the class.
    kernels: launches in a step.
    bytes: that they read and write.
    seconds: their roofline; None where the GPU's rates are not known.
  """

  kind: KernelClass
  kernels: int
  bytes: int
  seconds: float | None


@dataclasses.dataclass(frozen=True)
class Report:
  """What the GPU compiler made of a program: one step, on one of its devices.

  ``print(report)`` fits a terminal.

  Attributes:
    name: of the program.
    device_kind: the GPU it is compiled for.
    devices: how many it runs on; all numbers are of one of them.
    described: whether the GPU was described to the compiler, not attached.
    gemms: every GEMM, with its role, size, dtypes, kernel, and why it is not FP8.
    kernels: every kernel, with its class and bytes.
    collectives: what travels between devices.
    memory: bytes of arguments, results and temporaries.
    target: the GPU's rates; None if they are not known.
    doubts: what the report could not read, or had to assume.

  Numerics:
    Bytes count each input and result of a kernel once; caches are not modelled. ``seconds`` is a
    roofline, a lower bound by data-sheet rates: see ``flax_fp8/explain/roofline.py``. It compares
    programs; it predicts no time.

  Example:
    >>> import flax_fp8 as fp8
    >>> def step(x, w):
    ...   return x @ w
    >>> x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)  # doctest: +SKIP
    >>> report = fp8.explain(step, x, x, target="h100")  # doctest: +SKIP
    >>> report.fp8_gemms, report.total_gemms  # doctest: +SKIP
    (0, 1)

  References:
    XLA, "HLO dumps", https://openxla.org/xla/hlo_dumps; Williams, Waterman and Patterson, Roofline,
    https://doi.org/10.1145/1498765.1498785.
  """

  name: str
  device_kind: str
  devices: int
  described: bool
  gemms: tuple[Gemm, ...]
  kernels: tuple[Kernel, ...]
  collectives: tuple[Collective, ...]
  memory: Memory
  target: GpuTarget | None
  doubts: tuple[str, ...] = ()

  @property
  def fp8_gemms(self) -> int:
    """GEMMs of a step that are FP8."""
    return sum(gemm.times for gemm in self.gemms if gemm.is_fp8)

  @property
  def total_gemms(self) -> int:
    """All GEMMs of a step."""
    return sum(gemm.times for gemm in self.gemms)

  @property
  def fp8_flops_share(self) -> float:
    """Part of the GEMMs' FLOPs that is computed in FP8; 0 without GEMMs."""
    total = sum(gemm.flops for gemm in self.gemms)
    return sum(gemm.flops for gemm in self.gemms if gemm.is_fp8) / total if total else 0.0

  @property
  def launches(self) -> int:
    """Kernels that a step launches."""
    return sum(kernel.times for kernel in self.kernels)

  @property
  def bytes_outside_gemms(self) -> int:
    """Bytes that kernels other than GEMMs read and write in a step."""
    return sum(kernel.bytes for kernel in self.kernels if kernel.kind not in _GEMMS)

  @property
  def bytes_sent(self) -> float:
    """Bytes that one device sends to others in a step."""
    return sum(collective.sent for collective in self.collectives)

  @property
  def seconds(self) -> float | None:
    """Roofline of a step; None if the GPU's rates are not known."""
    if (target := self.target) is None:
      return None
    kernels = sum(roofline.kernel_seconds(kernel, target) for kernel in self.kernels)
    return kernels + sum(roofline.collective_seconds(each, target) for each in self.collectives)

  @property
  def classes(self) -> tuple[ClassTotal, ...]:
    """Totals of each class of kernels that occurs."""
    totals = (self.total(kind) for kind in KernelClass)
    return tuple(total for total in totals if total.kernels)

  def total(self, kind: KernelClass) -> ClassTotal:
    """Totals of one class of kernels."""
    found = [kernel for kernel in self.kernels if kernel.kind is kind]
    return ClassTotal(
      kind,
      sum(kernel.times for kernel in found),
      sum(kernel.bytes for kernel in found),
      self._class_seconds(kind, found),
    )

  def _class_seconds(self, kind: KernelClass, found: list[Kernel]) -> float | None:
    if (target := self.target) is None:
      return None
    if kind is KernelClass.COLLECTIVE:
      return sum(roofline.collective_seconds(each, target) for each in self.collectives)
    return sum(roofline.kernel_seconds(kernel, target) for kernel in found)

  @property
  def refusals(self) -> dict[str, list[Gemm]]:
    """The GEMMs that are not FP8, by reason."""
    found: dict[str, list[Gemm]] = {}
    for gemm in self.gemms:
      if not gemm.is_fp8:
        found.setdefault(gemm.reason, []).append(gemm)
    return found

  @property
  def title(self) -> str:
    """One line: which program, on what, how much of it is FP8."""
    how = "described, not attached" if self.described else "attached"
    count = f"{self.devices} devices" if self.devices > 1 else "1 device"
    return (
      f"{self.name} on {self.device_kind} ({how}; {count}): {self.fp8_gemms} of "
      f"{self.total_gemms} GEMMs are FP8, {100 * self.fp8_flops_share:.0f} % of their FLOPs"
    )

  def compare(self, other: Report) -> Comparison:
    """Puts this program beside another one.

    Args:
      other: what this one is measured against: its BF16 twin, another recipe, another library.

    Returns:
      The two, and the ratio of this to the other, line by line.
    """
    return Comparison(self, other)

  def to_dict(self) -> dict[str, Any]:
    """Everything but the kernels' list, in types that JSON knows."""
    return {
      "name": self.name,
      "device": self.device_kind,
      "devices": self.devices,
      "described": self.described,
      "fp8_gemms": self.fp8_gemms,
      "gemms": self.total_gemms,
      "fp8_flops_share": self.fp8_flops_share,
      "kernels": self.launches,
      "bytes_outside_gemms": self.bytes_outside_gemms,
      "roofline_seconds": self.seconds,
      "memory": dataclasses.asdict(self.memory) | {"total": self.memory.total},
      "classes": {
        total.kind.value: {
          "kernels": total.kernels,
          "bytes": total.bytes,
          "roofline_seconds": total.seconds,
        }
        for total in self.classes
      },
      "collectives": [dataclasses.asdict(each) | {"sent": each.sent} for each in self.collectives],
      "gemm_rows": [
        dataclasses.asdict(gemm) | {"role": gemm.role.value, "fp8": gemm.is_fp8}
        for gemm in self.gemms
      ],
      "doubts": list(self.doubts),
    }

  def to_markdown(self) -> str:
    """The report as Markdown."""
    return tables.markdown(self._parts())

  def __str__(self) -> str:
    """The report as text, as wide as the terminal."""
    return tables.terminal(self._parts())

  def plot(self) -> Any:
    """Draws where the bytes and the time of a step go, stacked by class; a matplotlib figure."""
    return plot.draw([self])

  def _parts(self) -> list[Table | str]:
    parts: list[Table | str] = [self.title, _gemm_table(self.gemms)]
    if self.refusals:
      parts.append("Not FP8:\n" + "\n".join(_refusal_lines(self.refusals)))
    parts.append(_class_table(self))
    if self.collectives:
      parts.append(_collective_table(self.collectives))
    parts.append(_memory_line(self))
    parts += [f"Doubt: {doubt}" for doubt in self.doubts]
    return parts


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Two programs side by side; ``print`` it.

  Attributes:
    one: the first program.
    other: what it is measured against.
  """

  one: Report
  other: Report

  def rows(self) -> list[tuple[str, float, float]]:
    """What is compared: label with unit, the first program's number, the other's."""
    pair = (self.one, self.other)
    found = [
      ("FP8 GEMMs", *(float(r.fp8_gemms) for r in pair)),
      ("GEMMs", *(float(r.total_gemms) for r in pair)),
      ("kernels", *(float(r.launches) for r in pair)),
      ("MiB outside GEMMs", *(r.bytes_outside_gemms / _MIB for r in pair)),
      *(
        (f"MiB in {kind.value}", *(r.total(kind).bytes / _MIB for r in pair))
        for kind in KernelClass
        if any(r.total(kind).kernels for r in pair)
      ),
      ("MiB sent", *(r.bytes_sent / _MIB for r in pair)),
      ("MiB of arguments", *(r.memory.argument / _MIB for r in pair)),
      ("MiB of temporaries", *(r.memory.temp / _MIB for r in pair)),
    ]
    if self.one.seconds is not None and self.other.seconds is not None:
      found.append(("roofline ms", 1e3 * self.one.seconds, 1e3 * self.other.seconds))
    return [(label, one, other) for label, one, other in found]

  def to_dict(self) -> dict[str, Any]:
    """Both numbers of each line, and their ratio (None by zero), in types that JSON knows."""
    return {
      label: {self.one.name: one, self.other.name: other, "ratio": one / other if other else None}
      for label, one, other in self.rows()
    }

  def to_markdown(self) -> str:
    """The comparison as Markdown."""
    return tables.markdown([self._table()])

  def __str__(self) -> str:
    """The comparison as text, as wide as the terminal."""
    return tables.terminal([self._table()])

  def plot(self) -> Any:
    """Draws both programs' bytes and times, stacked by class; a matplotlib figure."""
    return plot.draw([self.one, self.other])

  def _table(self) -> Table:
    rows = (
      (label, _number(one), _number(other), f"{one / other:.2f}" if other else "")
      for label, one, other in self.rows()
    )
    return Table(("<", self.one.name, self.other.name, "ratio"), tuple(rows))


def _number(value: float) -> str:
  if value == int(value):
    return f"{int(value):,}"
  return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"


def short_dtype(dtype: str) -> str:
  """``f8e4m3fn`` is ``e4m3``, as people write it; other dtypes stay."""
  return dtype.removeprefix("f8").removesuffix("fn") if dtype.startswith("f8") else dtype


def _size(gemm: Gemm) -> str:
  extent = gemm.extent
  batch = f"{extent.batch} of " if extent.batch > 1 else ""
  return f"{batch}{extent.m}x{extent.n}x{extent.k}"


def _gemm_table(gemms: Iterable[Gemm]) -> Table:
  """One row for each kind of GEMM; what is alike in all columns is counted together."""
  counts: dict[tuple[str, ...], int] = {}
  for gemm in gemms:
    types = f"{short_dtype(gemm.lhs)} x {short_dtype(gemm.rhs)} > {short_dtype(gemm.out)}"
    notes = "; ".join(gemm.notes)
    kernel = f"{gemm.kernel} ({notes})" if notes else gemm.kernel
    fp8 = "yes" if gemm.is_fp8 else "NO"
    row = (gemm.path or "(lost)", gemm.role.value, _size(gemm), types, fp8, kernel)
    counts[row] = counts.get(row, 0) + gemm.times
  columns = ("<module", "<role", "<MxNxK", "<types", "<FP8", "<kernel", "times")
  return Table(columns, tuple((*row, str(times)) for row, times in counts.items()))


def _refusal_lines(refusals: dict[str, list[Gemm]]) -> Iterable[str]:
  for reason, gemms in refusals.items():
    where: dict[str, list[str]] = {}
    for gemm in gemms:
      role = gemm.role.value
      if role not in where.setdefault(gemm.path or "(lost)", []):
        where[gemm.path or "(lost)"].append(role)
    places = "; ".join(f"{path} ({', '.join(roles)})" for path, roles in where.items())
    yield f"- {reason}. In {places}"


def _class_table(report: Report) -> Table:
  totals = report.classes
  rows = [
    (total.kind.value, str(total.kernels), f"{total.bytes / _MIB:,.1f}", _milliseconds(total.seconds))
    for total in totals
  ]
  everything = sum(total.bytes for total in totals) / _MIB
  rows.append(("all", str(report.launches), f"{everything:,.1f}", _milliseconds(report.seconds)))
  return Table(("<kernels", "times", "MiB moved", "roofline ms"), tuple(rows))


def _milliseconds(seconds: float | None) -> str:
  return "" if seconds is None else f"{1e3 * seconds:.3g}"


def _collective_table(collectives: Iterable[Collective]) -> Table:
  rows = tuple(
    (each.kind, each.dtype, f"{each.bytes / _MIB:,.2f}", str(each.group), str(each.times), each.path)
    for each in collectives
  )
  return Table(("<collective", "<dtype", "MiB", "devices", "times", "<module"), rows)


def _memory_line(report: Report) -> str:
  memory = report.memory
  line = (
    f"Memory: {memory.argument / _MIB:,.1f} MiB of arguments, {memory.output / _MIB:,.1f} of results "
    f"({memory.alias / _MIB:,.1f} of them written over arguments), {memory.temp / _MIB:,.1f} of "
    f"temporaries; {memory.total / _MIB:,.1f} in all"
  )
  if report.target is None:
    return line
  return f"{line}, {100 * memory.total / report.target.memory_bytes:.1f} % of the GPU's"
