"""The matrix products of a program before optimization, and which compiled GEMM each became."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from flax_fp8.explain import names
from flax_fp8.explain.gemms import Extent, Site, extent_of, has_block_scales
from flax_fp8.explain.hlo import Instruction, Module
from flax_fp8.explain.names import Phase


@dataclasses.dataclass(frozen=True)
class Asked:
  """A matrix product of the program before optimization.

  Attributes:
    dot: the instruction.
    extent: its sizes, on all devices together.
    op_name: the whole name stack, through the functions that call it.
  """

  dot: Instruction
  extent: Extent
  op_name: str

  @functools.cached_property
  def place(self) -> tuple[str, Phase]:
    """The module and the pass, by which it is found again after optimization."""
    return names.model_path(self.op_name), names.phase(self.op_name)


def asked_for(module: Module) -> list[Asked]:
  """Lists the products of a program before optimization, once for each place that calls them."""
  found = []
  for computation in module.computations.values():
    for dot in computation.instructions.values():
      if (dot.opcode == "dot" or has_block_scales(dot)) and (extent := extent_of(module, dot)):
        prefixes = _prefixes(module, computation.name, frozenset())
        found += [Asked(dot, extent, f"{prefix}{dot.op_name}") for prefix in sorted(prefixes)]
  return found


def _prefixes(module: Module, computation: str, above: frozenset[str]) -> set[str]:
  """What stands before the names of a computation: those of the calls that lead to it."""
  if computation == module.entry or computation in above or not module.callers[computation]:
    return {""}
  found = set()
  for caller in module.callers[computation]:
    own = f"{caller.op_name}/" if caller.opcode == "call" and caller.op_name else ""
    outer = _prefixes(module, caller.computation, above | {computation})
    found |= {f"{prefix}{own}" for prefix in outer}
  return found


def candidates(asked: Sequence[Asked], site: Site) -> list[Asked]:
  """The products that a GEMM may be: same place, and same size where one has it."""
  here = [each for each in asked if each.place == (site.path, site.phase)]
  same = [each for each in here if each.extent.product == site.extent.product]
  return same or here
