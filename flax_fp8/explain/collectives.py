"""Finds the collectives of a program, with dtypes and bytes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

from flax_fp8.explain import names
from flax_fp8.explain.hlo import Instruction, Module, arrays, opcodes, product
from flax_fp8.explain.schedule import Launch

KINDS = opcodes(
  "all-gather all-reduce reduce-scatter all-to-all collective-permute collective-broadcast "
  "ragged-all-to-all send recv"
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """Data of one dtype that a collective sends. A combined collective gives several of these.

  Attributes:
    kind: ``all-gather``, ``all-reduce``, and so on.
    dtype: dtype of the data, as XLA prints it.
    bytes: bytes of the whole tensor on one device: the result of an all-gather, or the operand of
      a reduction.
    group: number of devices in a group.
    times: number of runs in a step.
    path: module of the operation; empty if the compiler lost it.
    reduction: the reduction, such as ``add`` or ``maximum``; empty if there is none.
  """

  kind: str
  dtype: str
  bytes: int
  group: int
  times: int
  path: str
  reduction: str = ""

  @property
  def sent(self) -> float:
    """Bytes that each device sends in a step, assuming ring algorithms.

    A group of ``g`` devices sends ``(g - 1) / g`` of the tensor. An all-reduce sends twice that,
    as a reduce-scatter and an all-gather. A permutation sends the whole tensor.
    """
    if self.kind in ("collective-permute", "send", "recv", "collective-broadcast"):
      return self.times * self.bytes
    rounds = 2 if self.kind == "all-reduce" else 1
    return self.times * rounds * self.bytes * (self.group - 1) / self.group


def find(module: Module, launched: Sequence[Launch], devices: int) -> list[Collective]:
  """Returns the collectives among the launches of a program."""
  return [each for launch in launched for each in _collectives(module, launch, devices)]


def _collectives(module: Module, launch: Launch, devices: int) -> Iterator[Collective]:
  instruction = launch.instruction
  kind = instruction.opcode.removesuffix("-start")
  if kind not in KINDS:
    return
  group = group_size(instruction, devices)
  gathers = group if kind == "all-gather" else 1
  sizes: dict[str, int] = {}
  for operand in module.operands(instruction):
    for array in arrays(operand.shape):
      sizes[array.dtype] = sizes.get(array.dtype, 0) + gathers * array.bytes
  path = names.model_path(instruction.op_name)
  reduction = next((_reduction(module, name) for name in instruction.called("to_apply")), "")
  for dtype, size in sizes.items():
    yield Collective(kind, dtype, size, group, launch.times, path, reduction)


def _reduction(module: Module, name: str) -> str:
  """Returns the opcode that combines two values in a reduction."""
  computation = module.computations.get(name)
  return computation.root.opcode if computation else ""


def group_size(instruction: Instruction, devices: int) -> int:
  """Returns the number of devices in a group; ``devices`` if the text names no groups."""
  text = instruction.attributes.get("replica_groups", "")
  if listed := re.match(r"\{\{([\d,]*)\}", text):
    return len(listed[1].split(","))
  if iota := re.match(r"\[\d+,(\d+)\]<=", text):
    return int(iota[1])
  if named := re.match(r"mesh\[([^\]]*)\] ?\{([^}]*)\}", text):
    sizes = dict(re.findall(r"'([^']*)'=(\d+)", named[1]))
    return product(tuple(int(sizes[axis]) for axis in re.findall(r"'([^']*)'", named[2])))
  return devices
