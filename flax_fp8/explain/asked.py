"""Finds the matrix products of a program before optimization, and matches them to its GEMMs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from flax_fp8.explain import mosaic, names
from flax_fp8.explain.gemms import Extent, Site, extent_of, has_block_scales
from flax_fp8.explain.hlo import Instruction, Module
from flax_fp8.explain.names import Phase


@dataclasses.dataclass(frozen=True)
class Asked:
  """A matrix product of the program before optimization.

  Attributes:
    dot: the instruction.
    extent: its sizes, over all devices.
    op_name: the full name stack, including the functions that call it.
  """

  dot: Instruction
  extent: Extent
  op_name: str

  @functools.cached_property
  def place(self) -> tuple[str, Phase]:
    """The module and the pass, which identify the product after optimization."""
    return names.model_path(self.op_name), names.phase(self.op_name)


def asked_for(module: Module) -> list[Asked]:
  """Returns the products of a program before optimization, once per call site."""
  found = []
  for computation in module.computations.values():
    for dot in computation.instructions.values():
      may_be = dot.opcode == "dot" or has_block_scales(dot) or mosaic.is_kernel(dot)
      if may_be and (extent := extent_of(module, dot)):
        prefixes = _prefixes(module, computation.name, frozenset())
        stacks = [f"{prefix}{dot.op_name}" for prefix in sorted(prefixes)]
        found += [Asked(dot, extent, stack) for stack in stacks if _is_product(dot, stack)]
  return found


def _is_product(dot: Instruction, op_name: str) -> bool:
  return not mosaic.is_kernel(dot) or mosaic.is_gemm(dot, op_name)


def _prefixes(module: Module, computation: str, above: frozenset[str]) -> set[str]:
  """Returns the name stacks of the calls that lead to a computation."""
  if computation == module.entry or computation in above or not module.callers[computation]:
    return {""}
  found = set()
  for caller in module.callers[computation]:
    own = f"{caller.op_name}/" if caller.opcode == "call" and caller.op_name else ""
    outer = _prefixes(module, caller.computation, above | {computation})
    found |= {f"{prefix}{own}" for prefix in outer}
  return found


def candidates(asked: Sequence[Asked], site: Site) -> list[Asked]:
  """Returns the products that a GEMM may come from: same place, and same size if one has it."""
  here = [each for each in asked if each.place == (site.path, site.phase)]
  same = [each for each in here if each.extent.product == site.extent.product]
  return same or here
