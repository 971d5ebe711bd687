"""What each GEMM is to a training step: fprop, dgrad or wgrad.

JAX's name stack tells the pass. Of the two backward GEMMs of ``[M, K] @ [K, N]``, dgrad contracts N
and wgrad contracts M; where that leaves two answers, the operand that a backward GEMM shares with
its forward GEMM decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from flax_fp8.explain import dataflow
from flax_fp8.explain.asked import Asked, candidates
from flax_fp8.explain.dataflow import Value
from flax_fp8.explain.gemms import Extent, GemmRole, Site, is_gemm_call
from flax_fp8.explain.hlo import Instruction, Module
from flax_fp8.explain.names import Phase


@dataclasses.dataclass(frozen=True)
class _Forward:
  """A forward GEMM; its sizes with the input first and K whole, however it was compiled."""

  site: Site
  extent: Extent


def roles(module: Module, sites: Sequence[Site], asked: Sequence[Asked]) -> list[GemmRole]:
  """Tells what each GEMM is.

  Args:
    module: the optimized program.
    sites: its GEMMs.
    asked: the products before optimization, which still have the input on the left.
  """
  forward: dict[str, list[_Forward]] = {}
  for site in sites:
    if site.phase is not Phase.BACKWARD:
      same = (a.extent for a in candidates(asked, site) if a.extent.product == site.extent.product)
      whole = _Forward(site, next(same, site.extent))
      forward.setdefault(site.path, []).append(whole)
  return [_role(module, site, forward.get(site.path, [])) for site in sites]


def _role(module: Module, site: Site, forward: list[_Forward]) -> GemmRole:
  if site.phase is Phase.RECOMPUTED:
    return GemmRole.REMAT
  if site.phase is Phase.FORWARD:
    return GemmRole.FPROP
  answers = {role for other in forward for role in _by_size(site.extent, other.extent)}
  if len(answers) > 1:
    answers = {role for other in forward for role in _by_operands(module, site, other.site)}
  return answers.pop() if len(answers) == 1 else GemmRole.BACKWARD


def _by_size(backward: Extent, forward: Extent) -> Iterator[GemmRole]:
  m, n, k, batch = forward.m, forward.n, forward.k, forward.batch
  if backward.product == Extent(batch, m, k, n).product:
    yield GemmRole.DGRAD
  if backward.product == Extent(batch, k, n, m).product:
    yield GemmRole.WGRAD


def _by_operands(module: Module, site: Site, forward: Site) -> Iterator[GemmRole]:
  """The gradient's other operand is the kernel (dgrad) or the input (wgrad) of the forward GEMM."""
  mine = [sources(module, operand) for operand in module.operands(site.dot)[:2]]
  lhs, rhs = (sources(module, operand) for operand in module.operands(forward.dot)[:2])
  if rhs in mine and lhs not in mine:
    yield GemmRole.DGRAD
  if lhs in mine and rhs not in mine:
    yield GemmRole.WGRAD


def sources(module: Module, operand: Instruction) -> frozenset[Value]:
  """The program's parameters and the GEMMs that an operand is made from."""

  def step(value: Value) -> list[Value]:
    return [] if _is_source(value.instruction) else dataflow.operands(module, value)

  found = dataflow.ancestors(module, Value(operand), step)
  return frozenset(value for value in found if _is_source(value.instruction))


def _is_source(instruction: Instruction) -> bool:
  if instruction.opcode == "custom-call":
    return is_gemm_call(instruction)
  return instruction.opcode in ("parameter", "dot")
