"""Determines the role of each GEMM in a training step: fprop, dgrad or wgrad.

The name stack gives the pass. For a forward GEMM ``[M, K] @ [K, N]``, dgrad contracts N and wgrad
contracts M. If the sizes match both, the operand that a backward GEMM shares with its forward GEMM
decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from flax_fp8 import scopes
from flax_fp8.explain import dataflow, names
from flax_fp8.explain.asked import Asked, candidates
from flax_fp8.explain.dataflow import Value
from flax_fp8.explain.gemms import Extent, GemmRole, Site, is_gemm_call
from flax_fp8.explain.hlo import Instruction, Module
from flax_fp8.explain.names import Phase

_BLOCK = 128  # values that share a scale


@dataclasses.dataclass(frozen=True)
class _Forward:
  """A forward GEMM, with its sizes before optimization: input first, and K not split."""

  site: Site
  extent: Extent


def roles(module: Module, sites: Sequence[Site], asked: Sequence[Asked]) -> list[GemmRole]:
  """Returns the role of each GEMM.

  Args:
    module: the optimized program.
    sites: its GEMMs.
    asked: the products before optimization, which have the input on the left.
  """
  forward: dict[str, list[_Forward]] = {}
  for site in sites:
    if site.phase is not Phase.BACKWARD:
      same = (a.extent for a in candidates(asked, site) if a.extent.product == site.extent.product)
      whole = _whole(site, next(same, site.extent))
      forward.setdefault(site.path, []).append(_Forward(site, whole))
  return [_role(module, site, forward.get(site.path, [])) for site in sites]


def _role(module: Module, site: Site, forward: list[_Forward]) -> GemmRole:
  if site.phase is Phase.RECOMPUTED:
    return GemmRole.REMAT
  if site.phase is Phase.FORWARD:
    return GemmRole.FPROP
  size = _whole(site, site.extent)
  answers = {role for other in forward for role in _by_size(size, other.extent)}
  if not answers and names.kernel_scope(site.op_name) == scopes.GEMM:
    answers = {r for other in forward for r in _by_size(_padded(size), _padded(other.extent))}
  if len(answers) > 1:
    answers = {role for other in forward for role in _by_operands(module, site, other.site)}
  return answers.pop() if len(answers) == 1 else GemmRole.BACKWARD


def _whole(site: Site, extent: Extent) -> Extent:
  """Returns the sizes of a product: in plain JAX, a loop multiplies a chunk of K at a time."""
  in_chunks = names.plain_reason(site.launch.loop) is not None
  return dataclasses.replace(extent, k=extent.k * site.launch.trips) if in_chunks else extent


def _padded(extent: Extent) -> Extent:
  """Returns sizes rounded up to whole blocks, since block-scaled operands may be padded."""
  sizes = (-(-size // _BLOCK) * _BLOCK for size in (extent.m, extent.n, extent.k))
  return Extent(extent.batch, *sizes)


def _by_size(backward: Extent, forward: Extent) -> Iterator[GemmRole]:
  m, n, k, batch = forward.m, forward.n, forward.k, forward.batch
  if backward.product == Extent(batch, m, k, n).product:
    yield GemmRole.DGRAD
  if backward.product == Extent(batch, k, n, m).product:
    yield GemmRole.WGRAD


def _by_operands(module: Module, site: Site, forward: Site) -> Iterator[GemmRole]:
  """Yields dgrad if the forward kernel is an operand, and wgrad if the forward input is one."""
  mine = [sources(module, operand) for operand in module.operands(site.dot)[:2]]
  lhs, rhs = (sources(module, operand) for operand in module.operands(forward.dot)[:2])
  if rhs in mine and lhs not in mine:
    yield GemmRole.DGRAD
  if lhs in mine and rhs not in mine:
    yield GemmRole.WGRAD


def sources(module: Module, operand: Instruction) -> frozenset[Value]:
  """Returns the program parameters and the GEMMs that an operand is computed from."""

  def step(value: Value) -> list[Value]:
    return [] if _is_source(value.instruction) else dataflow.operands(module, value)

  found = dataflow.ancestors(module, Value(operand), step)
  return frozenset(value for value in found if _is_source(value.instruction))


def _is_source(instruction: Instruction) -> bool:
  if instruction.opcode == "custom-call":
    return is_gemm_call(instruction)
  return instruction.opcode in ("parameter", "dot")
