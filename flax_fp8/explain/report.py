"""What ``explain`` found out about a program, as numbers, tables and pictures."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from flax_fp8 import fields, tables
from flax_fp8.explain import plot, roofline
from flax_fp8.explain.collectives import Collective
from flax_fp8.explain.compare import Comparison
from flax_fp8.explain.compile import Memory
from flax_fp8.explain.gemms import Gemm
from flax_fp8.explain.roofline import ClassTotal
from flax_fp8.explain.target import GpuTarget
from flax_fp8.explain.traffic import Kernel, KernelClass
from flax_fp8.patterns import matches_path
from flax_fp8.tables import Table

_GEMMS = (KernelClass.FP8_GEMM, KernelClass.GEMM)
_MIB = 2**20


def require_patterns(exclude: Any) -> None:
  """Raises TypeError unless ``exclude`` is a sequence of patterns."""
  if isinstance(exclude, str) or not isinstance(exclude, Sequence):
    raise TypeError(
      "assert_fp8: exclude must be a sequence of patterns; got "
      f"exclude={fields.show(exclude)}. Pass ['*/head']."
    )


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
    Bytes count each input and result of a kernel once; caches are not modeled. ``seconds`` is a
    roofline, a lower bound by data-sheet rates. ``estimated_seconds`` takes the rates that an H100
    sustained, and adds the cost of launches: see ``flax_fp8/explain/roofline.py``.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
    >>> report = fp8.explain(jnp.matmul, x, x, target="h100")
    >>> report.fp8_gemms, report.total_gemms
    (0, 1)
    >>> report.gemms[0].reason
    'FP8 was not asked for'

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
    if self.target is None:
      return None
    return sum(total.seconds or 0.0 for total in self.classes)

  @property
  def estimated_seconds(self) -> float | None:
    """Time that a step is likely to take; None if the GPU's rates are not known.

    Within 15 % of the time measured on an H100 for layers of GEMMs. It has no part for what a
    library's call computes, cuDNN's attention for one, and none for what collectives hide.
    """
    if self.target is None:
      return None
    return roofline.estimate(self.kernels, self.collectives, self.target)

  @property
  def classes(self) -> tuple[ClassTotal, ...]:
    """Totals of each class of kernels that occurs."""
    return roofline.class_totals(self.kernels, self.collectives, self.target)

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

  def assert_fp8(self, exclude: Sequence[str | re.Pattern[str]] = ()) -> None:
    """Raises AssertionError unless every GEMM is FP8, but for those of the excluded modules.

    Args:
      exclude: globs or regular expressions of module paths, as ``Fp8Config`` takes them.

    Raises:
      AssertionError: a GEMM is not FP8, or there is none; the message has each with its reason.
      ValueError: a pattern matches no module that has a GEMM.
      TypeError: ``exclude`` is a single string.
    """
    self._require_matches(exclude)
    if not self.gemms:
      raise AssertionError(f"assert_fp8: {self.name} must have FP8 GEMMs; got no GEMM at all.")
    matches = lambda gemm: any(_matches(pattern, gemm.path) for pattern in exclude)
    if wrong := [gemm for gemm in self.gemms if not gemm.is_fp8 and not matches(gemm)]:
      lines = "\n".join(f"  {_line(gemm)}" for gemm in wrong)
      raise AssertionError(
        f"assert_fp8: every GEMM of {self.name} must be FP8 on {self.device_kind}; got "
        f"{len(wrong)} that are not. Mend them, or name their modules in exclude=:\n{lines}"
      )

  def _require_matches(self, patterns: Sequence[str | re.Pattern[str]]) -> None:
    require_patterns(patterns)
    paths = sorted({gemm.path for gemm in self.gemms})
    for pattern in patterns:
      if not any(_matches(pattern, path) for path in paths):
        text = pattern if isinstance(pattern, str) else pattern.pattern
        near = difflib.get_close_matches(text, paths, n=3, cutoff=0.3) or paths[:10]
        raise ValueError(
          f"assert_fp8: each pattern of exclude must match a module that has a GEMM; got "
          f"{pattern!r}. The nearest are {near}."
        )

  def compare(self, other: Report) -> Comparison:
    """Puts this program beside another one.

    Args:
      other: what this one is measured against: its BF16 twin, another recipe, another library.

    Returns:
      The two, and the ratio of this to the other, line by line.
    """
    return Comparison(
      names=(self.name, other.name),
      figures=(self.figures(), other.figures()),
      totals=(self.classes, other.classes),
      device_kind=self.device_kind,
    )

  def figures(self) -> dict[str, float]:
    """The numbers that programs are compared by: label with unit, and value."""
    found = {
      "FP8 GEMMs": self.fp8_gemms,
      "GEMMs": self.total_gemms,
      "kernels": self.launches,
      "MiB outside GEMMs": self.bytes_outside_gemms / _MIB,
      **{f"MiB in {total.kind.value}": total.bytes / _MIB for total in self.classes},
      "MiB sent": self.bytes_sent / _MIB,
      "MiB of arguments": self.memory.argument / _MIB,
      "MiB of temporaries": self.memory.temp / _MIB,
    }
    if self.seconds is not None:
      found["roofline ms"] = 1e3 * self.seconds
    if self.estimated_seconds is not None:
      found["estimated ms"] = 1e3 * self.estimated_seconds
    return found

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
      "estimated_seconds": self.estimated_seconds,
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
    return plot.draw([(self.name, self.classes)], self.device_kind)

  def _parts(self) -> list[Table | str]:
    parts: list[Table | str] = [self.title, _gemm_table(self)]
    if self.refusals:
      parts.append("\n".join(_refusal_lines(self.refusals)))
    parts.append(_class_table(self))
    if self.collectives:
      parts.append(_collective_table(self.collectives))
    parts.append(_memory_line(self))
    parts += [f"Doubt: {doubt}" for doubt in self.doubts]
    return parts


def short_dtype(dtype: str) -> str:
  """``f8e4m3fn`` is ``e4m3``, as people write it; other dtypes stay."""
  return dtype.removeprefix("f8").removesuffix("fn") if dtype.startswith("f8") else dtype


def _matches(pattern: str | re.Pattern[str], path: str) -> bool:
  model, _, inside = path.partition("/")
  return matches_path(pattern, path) or matches_path(pattern, inside, model)


def _size(gemm: Gemm) -> str:
  extent = gemm.extent
  batch = f"{extent.batch} * " if extent.batch > 1 else ""
  return f"{batch}{extent.m} x {extent.n} x {extent.k}"


def _line(gemm: Gemm) -> str:
  size = _size(gemm).replace(" ", "")
  return f"{gemm.path or '(no module)'} {gemm.role.value}, {size} by {gemm.kernel}: {gemm.reason}"


def _gemm_table(report: Report) -> Table:
  """A row for each kind of GEMM, by module; what is alike in all columns is counted together."""
  letters = {reason: f"no [{index}]" for index, reason in enumerate(report.refusals, 1)}
  counts: dict[str, dict[tuple[str, ...], int]] = {}
  for gemm in report.gemms:
    types = " ".join(short_dtype(dtype) for dtype in (gemm.lhs, gemm.rhs, gemm.out))
    kernel = " ".join([gemm.kernel, *(f"({note})" for note in gemm.notes)])
    fp8 = letters.get(gemm.reason, "yes")
    row = (gemm.role.value, _size(gemm), types, fp8, kernel)
    rows = counts.setdefault(gemm.path or "(no module)", {})
    rows[row] = rows.get(row, 0) + gemm.times
  rows = (
    (path, *row, str(times)) for path, found in counts.items() for row, times in found.items()
  )
  columns = ("<module", "<role", "<M x N x K", "<lhs rhs out", "<FP8", "<kernel", "times")
  return Table(columns, tuple(rows), grouped=True)


def _refusal_lines(refusals: dict[str, list[Gemm]]) -> Iterable[str]:
  for index, (reason, gemms) in enumerate(refusals.items(), 1):
    times = sum(gemm.times for gemm in gemms)
    flops = sum(gemm.flops for gemm in gemms)
    count = "1 GEMM" if times == 1 else f"{times} GEMMs"
    yield f"[{index}] {reason} ({count}, {flops / 1e9:,.3g} GFLOP)"


def _class_table(report: Report) -> Table:
  totals = report.classes
  rows = [
    (
      total.kind.value,
      str(total.kernels),
      f"{total.bytes / _MIB:,.1f}",
      _milliseconds(total.seconds),
    )
    for total in totals
  ]
  everything = sum(total.bytes for total in totals) / _MIB
  rows.append(("all", str(report.launches), f"{everything:,.1f}", _milliseconds(report.seconds)))
  return Table(("<kernels", "times", "MiB moved", "roofline ms"), tuple(rows))


def _milliseconds(seconds: float | None) -> str:
  return "" if seconds is None else f"{1e3 * seconds:.3g}"


def _collective_table(collectives: Iterable[Collective]) -> Table:
  rows = tuple(
    (
      each.kind,
      each.dtype,
      f"{each.bytes / _MIB:,.2f}",
      str(each.group),
      str(each.times),
      each.path,
    )
    for each in collectives
  )
  return Table(("<collective", "<dtype", "MiB", "devices", "times", "<module"), rows)


def _memory_line(report: Report) -> str:
  memory = report.memory
  argument, output, alias, temp, total = (
    f"{size / _MIB:,.1f}" for size in (*dataclasses.astuple(memory), memory.total)
  )
  line = (
    f"Memory: {argument} MiB of arguments, {output} of results ({alias} of them written over "
    f"arguments), {temp} of temporaries; {total} in all"
  )
  if report.target is None:
    return line
  return f"{line}, {100 * memory.total / report.target.memory_bytes:.1f} % of the GPU's"
