"""Lists the launches of a program, with loop iterations counted and calls followed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from flax_fp8.explain import names
from flax_fp8.explain.hlo import BRANCHES, Instruction, Module, opcodes

# Instructions that only name, group or forward values, and launch nothing.
FREE = opcodes(
  "parameter constant tuple get-tuple-element bitcast after-all add-dependency opt-barrier "
  "partition-id replica-id domain get-dimension-size"
)
_ENDS = ("-done", "-update")


@dataclasses.dataclass(frozen=True)
class Launch:
  """An instruction that occupies the GPU.

  Attributes:
    instruction: the instruction that runs.
    times: number of runs in a call of the program.
    doubt: why ``times`` may be wrong; empty if the HLO text states it.
    loop: name stack of the innermost loop that runs it; empty outside loops. XLA gives operations
      of loops with equal bodies the name stack of one of these loops.
    trips: number of iterations of that loop.
  """

  instruction: Instruction
  times: int
  doubt: str = ""
  loop: str = ""
  trips: int = 1


def launches(module: Module) -> list[Launch]:
  """Lists the launches of one call of the program, in order.

  A loop body counts once per iteration if the compiler knows their number. Otherwise it counts
  once, with a doubt. Each branch of a conditional counts, with a doubt.
  """
  return list(_walk(module, module.entry, 1, "", "", 1))


def _walk(
  module: Module, name: str, times: int, doubt: str, loop: str, trips: int
) -> Iterator[Launch]:
  for instruction in module.computations[name].instructions.values():
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith(_ENDS):
      continue
    inner = _inner(instruction, times, doubt)
    if inner is None:
      yield Launch(instruction, times, doubt, loop, trips)
      continue
    within, count = loop, trips
    if opcode == "while":
      within, count = names.within_loop(instruction.op_name, loop), trip_count(instruction) or 1
    for called, inner_times, inner_doubt in inner:
      yield from _walk(module, called, inner_times, inner_doubt, within, count)


def _inner(instruction: Instruction, times: int, doubt: str) -> list[tuple[str, int, str]] | None:
  """Returns the computations that an instruction runs; None if the instruction itself runs."""
  opcode = instruction.opcode
  if opcode == "while":
    trips = trip_count(instruction)
    unknown = doubt or ("" if trips is not None else "loop of unknown length, counted once")
    count = times * (1 if trips is None else trips)
    return [(name, count, unknown) for name in instruction.called("body")]
  if opcode == "conditional":
    branches = instruction.called(*BRANCHES)
    return [(name, times, doubt or "branch, counted as taken") for name in branches]
  if opcode == "call":
    return [(name, times, doubt) for name in instruction.called("to_apply", "calls")]
  if opcode.endswith("-start") and "calls" in instruction.attributes:
    return [(name, times, doubt) for name in instruction.called("calls")]
  return None


def trip_count(loop: Instruction) -> int | None:
  """Returns the number of iterations of a while loop; None if the compiler does not know it."""
  known = loop.config.get("known_trip_count", {}).get("n")
  return None if known is None else int(known)
