"""Traces a value back through tuples, fusions, calls and loops to the instruction computing it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TypeAlias

from flax_fp8.explain.hlo import BRANCHES, Instruction, Module


@dataclasses.dataclass(frozen=True)
class Value:
  """A result of an instruction, or one element of a tuple result.

  Attributes:
    instruction: the instruction.
    index: positions in nested tuples, outermost first; empty for the whole result.
  """

  instruction: Instruction
  index: tuple[int, ...] = ()


# Returns the values to continue with behind an instruction; an empty list stops the search.
Step: TypeAlias = Callable[[Value], list[Value]]


def operands(module: Module, value: Value) -> list[Value]:
  """Returns the operands of an instruction as values."""
  return [Value(operand) for operand in module.operands(value.instruction)]


def computed_by(module: Module, value: Value) -> list[Value]:
  """Returns the instructions that may compute a value.

  A loop or a branch gives more than one. The search stops at parameters of the program, and at
  instructions that do more than forward a value.
  """
  return list(ancestors(module, value, lambda _: []))


def ancestors(module: Module, value: Value, through: Step) -> Iterator[Value]:
  """Yields the values that a value is computed from, nearest first.

  Args:
    module: the program.
    value: start of the search.
    through: returns the values to continue with behind an instruction that computes.
  """

  def step(found: Value) -> list[Value]:
    return _passed_on(module, found) or through(found)

  return (found for found in _search(value, step) if not _passed_on(module, found))


def _search(start: Value, step: Step) -> Iterator[Value]:
  """Searches breadth-first and visits each value once, because loops make cycles."""
  seen, queue = {start}, [start]
  for value in queue:
    yield value
    for found in step(value):
      if found not in seen:
        seen.add(found)
        queue.append(found)


def _passed_on(module: Module, value: Value) -> list[Value]:
  """Returns the values that an instruction forwards unchanged; empty if it computes its result."""
  instruction, index = value.instruction, value.index
  opcode = instruction.opcode
  if opcode == "get-tuple-element":
    return [Value(module.operands(instruction)[0], (instruction.number, *index))]
  if opcode == "tuple":
    return [Value(module.operands(instruction)[index[0]], index[1:])] if index else []
  if opcode == "parameter":
    return _arguments(module, value)
  if opcode in ("fusion", "call", "conditional"):
    return _results(module, instruction, index)
  if opcode == "while":
    start = Value(module.operands(instruction)[0], index)
    return [start, *_results(module, instruction, index, "body")]
  if opcode == "opt-barrier" or opcode.endswith("-done"):
    return [Value(module.operands(instruction)[0], index)]
  if opcode.endswith("-start") and "calls" in instruction.attributes:
    return _results(module, instruction, index)
  return []


def _results(
  module: Module,
  instruction: Instruction,
  index: tuple[int, ...],
  *attributes: str,
) -> list[Value]:
  """Returns the results of the computations that an instruction calls."""
  names = attributes or ("calls", "to_apply", *BRANCHES)
  called = [name for name in instruction.called(*names) if name in module.computations]
  return [Value(module.computations[name].root, index) for name in called]


def _arguments(module: Module, value: Value) -> list[Value]:
  """Returns the arguments that callers of a computation pass for a parameter."""
  if value.instruction.computation == module.entry:
    return []
  callers = module.callers[value.instruction.computation]
  return [given for caller in callers for given in _given(module, caller, value)]


def _given(module: Module, caller: Instruction, value: Value) -> list[Value]:
  """Returns the arguments that one caller passes for a parameter, or for an element of it."""
  parameter, index, given = value.instruction, value.index, module.operands(caller)
  if caller.opcode == "while":
    return [Value(given[0], index), *_results(module, caller, index, "body")]
  if caller.opcode == "conditional":
    branches = caller.called(*BRANCHES)
    return [Value(given[1 + branches.index(parameter.computation)], index)]
  if caller.opcode in ("fusion", "call") or caller.opcode.endswith("-start"):
    return [Value(given[parameter.number], index)]
  return []  # scalars of a reduction's computation have no arguments
