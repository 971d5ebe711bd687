"""Questions about compiled programs: what they are, and what is read from a program.

A question is a function that yields cases; ``question`` registers it for ``compiled.py``.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

import flax_fp8 as fp8
from harness import output
from harness.names import BF16, FLAX
from harness.table import Column
from harness.variants import VARIANTS

MIB = 2**20
THREE = {name: VARIANTS[name] for name in (BF16, FLAX, "delayed")}
Figures: TypeAlias = dict[str, Any]
# Case, variant, what compiles it for a GPU, and figures that need no compiler.
Case: TypeAlias = tuple[str, str, Callable[[str], Figures], Mapping[str, Any]]
Cases = TypeVar("Cases", bound=Callable[..., Iterable[Case]])


@dataclasses.dataclass(frozen=True)
class Question:
  """Its docstring, its programs, the columns after case and variant, and how it is answered."""

  doc: str
  cases: Callable[..., Iterable[Case]]
  columns: tuple[Column, ...]
  targets: tuple[str, ...]
  note: str
  draw: Callable[[Mapping[str, Any]], Any] | None


QUESTIONS: dict[str, Question] = {}


def question(
  *columns: Column,
  targets: tuple[str, ...] = ("h100",),
  note: str = output.COMPILED,
  draw: Callable[[Mapping[str, Any]], Any] | None = None,
) -> Callable[[Cases], Cases]:
  """Registers a function that yields cases as the question that its docstring asks."""

  def register(cases: Cases) -> Cases:
    name, doc = getattr(cases, "__name__", ""), cases.__doc__ or ""
    QUESTIONS[name] = Question(doc, cases, columns, targets, note, draw)
    return cases

  return register


def figures(report: fp8.Report) -> Figures:
  """The numbers of a compiled program."""
  assert report.seconds is not None
  return {
    "fp8_gemms": report.fp8_gemms,
    "gemms": report.total_gemms,
    "kernels": report.launches,
    "mib_outside_gemms": report.bytes_outside_gemms / MIB,
    "temp_mib": report.memory.temp / MIB,
    "roofline_ms": 1e3 * report.seconds,
    "estimated_ms": report.estimated_seconds and 1e3 * report.estimated_seconds,
    "mib_sent": report.bytes_sent / MIB,
    "operands": sorted({gemm.lhs for gemm in report.gemms} | {gemm.rhs for gemm in report.gemms}),
    "refusals": sorted(report.refusals),
    "doubts": list(report.doubts),
  }


def extra(heading: str, key: str, form: str = "+,.0f") -> Column:
  """What a program has beyond the first of its case."""
  more = lambda row: format(row[key] - row["base"][key], form)
  return Column(heading, lambda row: "" if row is row["base"] else more(row))


def ratio(heading: str, key: str, of: str = "base") -> Column:
  """A figure over that of the first program of its case, or of Flax's with ``of="flax"``."""
  known = lambda row: row[of] is not None and row[of][key] >= 0.01
  return Column(heading, lambda row: f"{row[key] / row[of][key]:.2f}" if known(row) else "-")


GEMMS, KERNELS = Column("FP8 GEMMs", "{fp8_gemms}/{gemms}"), Column("kernels", "{kernels:,}")
MOVED, TEMP = Column("MiB", "{mib_outside_gemms:,.0f}"), Column("temp MiB", "{temp_mib:,.0f}")
MS, MS_OF_BF16 = Column("ms", "{roofline_ms:.2f}"), ratio("of BF16", "roofline_ms")
TEMP_OF_BF16 = ratio("of BF16", "temp_mib")


def array(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.bfloat16)
