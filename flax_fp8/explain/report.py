"""The report of ``explain`` as numbers, tables and plots."""

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
  """Describes a compiled program: one step, on one of its devices.

  ``print(report)`` shows tables at the width of the terminal.

  Attributes:
    name: name of the program.
    device_kind: the GPU that the program is compiled for.
    devices: number of devices; all other numbers are for one device.
    described: whether the GPU was described to the compiler instead of attached.
    gemms: every GEMM, with its role, size, dtypes, kernel, and the reason if it is not FP8.
    kernels: every kernel, with its class and bytes.
    collectives: transfers between devices.
    memory: bytes of arguments, results and temporaries.
    target: the GPU with its peak rates; None if they are not known.
    doubts: what the report could not read, or had to assume.

  Numerics:
    Each input and result of a kernel counts once. Caches are not modeled. ``seconds`` is a
    roofline: a lower bound from data-sheet rates. ``estimated_seconds`` uses the rates that an H100
    and an H200 sustained, and adds the cost of launches. See ``flax_fp8/explain/roofline.py``.

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
    """Number of FP8 GEMMs in a step."""
    return sum(gemm.times for gemm in self.gemms if gemm.is_fp8)

  @property
  def total_gemms(self) -> int:
    """Number of GEMMs in a step."""
    return sum(gemm.times for gemm in self.gemms)

  @property
  def fp8_flops_share(self) -> float:
    """Fraction of the FLOPs of GEMMs that is computed in FP8; 0 without GEMMs."""
    total = sum(gemm.flops for gemm in self.gemms)
    return sum(gemm.flops for gemm in self.gemms if gemm.is_fp8) / total if total else 0.0

  @property
  def launches(self) -> int:
    """Number of kernels that a step launches."""
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
    """Roofline of a step in seconds; None if the rates of the GPU are not known."""
    if self.target is None:
      return None
    return sum(total.seconds or 0.0 for total in self.classes)

  @property
  def estimated_seconds(self) -> float | None:
    """Estimated seconds of a step; None if the rates of the GPU are not known.

    The estimate is within 15 % of the times measured on an H100 and an H200 for large layers, and
    for a Transformer block with cuDNN attention. For layers of less than 0.1 ms it is 0.79 to 1.83
    times the measured time. It excludes the computation inside other library calls. It ignores that
    computation may overlap with collectives.
    """
    if self.target is None:
      return None
    return roofline.estimate(self.kernels, self.collectives, self.target)

  @property
  def classes(self) -> tuple[ClassTotal, ...]:
    """Totals of each class of kernels in the program."""
    return roofline.class_totals(self.kernels, self.collectives, self.target)

  @property
  def refusals(self) -> dict[str, list[Gemm]]:
    """GEMMs that are not FP8, by reason."""
    found: dict[str, list[Gemm]] = {}
    for gemm in self.gemms:
      if not gemm.is_fp8:
        found.setdefault(gemm.reason, []).append(gemm)
    return found

  @property
  def title(self) -> str:
    """One line: the program, the device, and the FP8 share."""
    how = "described, not attached" if self.described else "attached"
    count = f"{self.devices} devices" if self.devices > 1 else "1 device"
    return (
      f"{self.name} on {self.device_kind} ({how}; {count}): {self.fp8_gemms} of "
      f"{self.total_gemms} GEMMs are FP8, {100 * self.fp8_flops_share:.0f} % of their FLOPs"
    )

  def assert_fp8(self, exclude: Sequence[str | re.Pattern[str]] = ()) -> None:
    """Raises AssertionError unless every GEMM is FP8, except those of excluded modules.

    Args:
      exclude: globs or regular expressions of module paths, as in ``Fp8Config``.

    Raises:
      AssertionError: a GEMM is not FP8, or the program has no GEMM. The message lists each GEMM
        with its reason.
      ValueError: a pattern matches no module that has a GEMM.
      TypeError: ``exclude`` is not a sequence of patterns.
    """
    self._require_matches(exclude)
    if not self.gemms:
      raise AssertionError(
        f"assert_fp8: {self.name} must have FP8 GEMMs; got no GEMM at all. Pass a function that "
        "computes matrix products."
      )
    matches = lambda gemm: any(_matches(pattern, gemm.path) for pattern in exclude)
    if wrong := [gemm for gemm in self.gemms if not gemm.is_fp8 and not matches(gemm)]:
      lines = "\n".join(f"  {_line(gemm)}" for gemm in wrong)
      raise AssertionError(
        f"assert_fp8: every GEMM of {self.name} must be FP8 on {self.device_kind}; got "
        f"{len(wrong)} that {'is' if len(wrong) == 1 else 'are'} not. Quantize their operands, or "
        f"pass their modules in exclude=:\n{lines}"
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
    """Compares this program with another one.

    Args:
      other: report of the baseline, such as the same model in BF16 or with another recipe.

    Returns:
      The numbers of both programs, and the ratios of this program to ``other``.
    """
    return Comparison(
      names=(self.name, other.name),
      figures=(self.figures(), other.figures()),
      totals=(self.classes, other.classes),
      device_kind=self.device_kind,
    )

  def figures(self) -> dict[str, float]:
    """Returns the numbers that ``compare`` shows, by label with unit."""
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
    """Returns everything except the list of kernels, as JSON types."""
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
    """Returns the report as Markdown."""
    return tables.markdown(self._parts())

  def __str__(self) -> str:
    """Returns the report as text, at the width of the terminal."""
    return tables.terminal(self._parts())

  def plot(self) -> Any:
    """Draws the bytes and the time of a step as bars, stacked by class of kernels.

    Returns:
      A matplotlib figure.

    Raises:
      ImportError: matplotlib is not installed.
    """
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
  """Shortens FP8 dtypes: ``f8e4m3fn`` becomes ``e4m3``. Other dtypes are unchanged."""
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
  """Builds a table with a row for each kind of GEMM, by module; equal rows are counted together."""
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
