"""Kernels, and the bytes that each reads and writes.

A kernel reads each of its inputs once and writes each of its results once. Of an input that is only
sliced, the slice counts; of a result that is an update in place, the update; of a library's call,
not its workspace. Caches are not modeled: what two kernels read is read twice.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Sequence

from flax_fp8.explain import gemms
from flax_fp8.explain.collectives import KINDS as COLLECTIVES
from flax_fp8.explain.gemms import Site
from flax_fp8.explain.hlo import (
  Array,
  Computation,
  Instruction,
  Module,
  arrays,
  bits,
  opcodes,
)
from flax_fp8.explain.schedule import FREE, Launch


class KernelClass(enum.Enum):
  """What a kernel is for."""

  FP8_GEMM = "FP8 GEMM"
  GEMM = "other GEMM"
  QUANTIZE = "quantize"
  TRANSPOSE = "transpose"
  PAD = "pad"
  COPY = "copy"
  REDUCE = "reduce"
  ELEMENTWISE = "elementwise"
  COLLECTIVE = "collective"
  LIBRARY = "library call"
  UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One kernel of a program.

  Attributes:
    name: in the compiler's text.
    kind: what it is for.
    times: how often a step runs it.
    read: bytes that one run reads.
    written: bytes that one run writes.
    flops: that the matrix units compute in one run.
    operand: dtype that they multiply; empty where they do not.
    what: the library call's or unknown instruction's name; empty for the others.
  """

  name: str
  kind: KernelClass
  times: int
  read: int
  written: int
  flops: int = 0
  operand: str = ""
  what: str = ""

  @property
  def bytes(self) -> int:
    """Read and written by all its runs in a step."""
    return self.times * (self.read + self.written)


def kernels(module: Module, launched: Sequence[Launch], sites: Sequence[Site]) -> list[Kernel]:
  """Classifies and weighs everything that a program launches."""
  inside: dict[int, list[Site]] = {}
  for site in sites:
    inside.setdefault(id(site.launch), []).append(site)
  return [_kernel(module, launch, inside.get(id(launch), [])) for launch in launched]


def _kernel(module: Module, launch: Launch, sites: list[Site]) -> Kernel:
  instruction = launch.instruction
  read, written = _traffic(module, instruction, is_gemm=bool(sites))
  if not sites:
    kind, what = _classify(module, instruction)
    return Kernel(instruction.name, kind, launch.times, read, written, what=what)
  operands = [operand for site in sites for operand in gemms.operand_arrays(module, site)]
  fp8 = all(gemms.is_fp8(module, site) for site in sites)
  return Kernel(
    instruction.name,
    KernelClass.FP8_GEMM if fp8 else KernelClass.GEMM,
    launch.times,
    read,
    written,
    flops=sum(site.extent.flops for site in sites),
    operand=max((o.dtype for o in operands), key=bits),
  )


# What it is for.

_MOVES = opcodes(
  "transpose copy copy-start reshape slice dynamic-slice dynamic-update-slice concatenate gather "
  "reverse pad convert"
)
_REDUCTIONS = opcodes("reduce reduce-window sort scatter select-and-scatter topk")
_ELEMENTWISE = opcodes(
  "abs acos acosh add and asin asinh atan2 atanh bitcast-convert broadcast cbrt ceil clamp "
  "compare complex cosh cosine count-leading-zeros divide erf exponential exponential-minus-one "
  "floor imag iota is-finite log log-plus-one logistic map maximum minimum multiply negate not "
  "or popcnt power real reduce-precision remainder rng rng-bit-generator "
  "rng-get-and-update-state round-nearest-afz round-nearest-even rsqrt select shift-left "
  "shift-right-arithmetic shift-right-logical sign sine sinh sqrt stochastic-convert subtract "
  "tan tanh xor"
)
_KNOWN = _MOVES | _REDUCTIONS | _ELEMENTWISE | {"fusion", "dot"}
_FILLS = frozenset({"broadcast", "iota"})


def _classify(module: Module, instruction: Instruction) -> tuple[KernelClass, str]:
  if instruction.opcode.removesuffix("-start") in COLLECTIVES:
    return KernelClass.COLLECTIVE, ""
  if instruction.opcode == "custom-call":
    return KernelClass.LIBRARY, instruction.target
  if instruction.opcode not in _KNOWN:
    return KernelClass.UNKNOWN, instruction.opcode
  return _by_content(instruction, _content(module, instruction)), ""


def _content(module: Module, instruction: Instruction) -> set[str]:
  """What a kernel does to arrays; arithmetic on single numbers, such as indices, does not count."""
  if instruction.opcode != "fusion":
    return {_copy_or_transpose(module, instruction)} - _FILLS
  body = _body(module, instruction)
  works = [i for i in body.instructions.values() if i.array.size > 1 or i is body.root]
  return {i.opcode for i in works} - FREE - _FILLS


def _copy_or_transpose(module: Module, instruction: Instruction) -> str:
  """The opcode; a copy into another layout is a transposition."""
  if instruction.opcode == "copy":
    (operand,) = module.operands(instruction)
    if operand.array.layout != instruction.array.layout:
      return "transpose"
  return instruction.opcode


def _by_content(instruction: Instruction, content: set[str]) -> KernelClass:
  computes = content - _MOVES
  if any(array.is_fp8 for array in arrays(instruction.shape)) and (
    computes or "convert" in content
  ):
    return KernelClass.QUANTIZE
  if content & _REDUCTIONS:
    return KernelClass.REDUCE
  if computes:
    return KernelClass.ELEMENTWISE
  if "pad" in content:
    return KernelClass.PAD
  if "transpose" in content:
    return KernelClass.TRANSPOSE
  return KernelClass.ELEMENTWISE if "convert" in content else KernelClass.COPY


def _body(module: Module, fusion: Instruction) -> Computation:
  return module.computations[fusion.called("calls")[0]]


# What it moves.

_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": -1}  # position of the update among the operands


def _traffic(module: Module, instruction: Instruction, *, is_gemm: bool) -> tuple[int, int]:
  """Bytes read and written by one run."""
  operands = module.operands(instruction)
  if instruction.opcode == "fusion":
    body = _body(module, instruction)
    read = sum(_read_of(body, number, operand) for number, operand in enumerate(operands))
    roots = _roots(body)
    kept = [r for r in roots if not (is_gemm and _is_workspace(r.array, roots))]
    return read, sum(_written(body, result) for result in kept)
  if instruction.opcode in _SLICES:
    return instruction.array.bytes, instruction.array.bytes
  if instruction.opcode in _UPDATES:
    update = operands[_UPDATES[instruction.opcode]].array.bytes
    return update, update
  inputs = [array for operand in operands for array in arrays(operand.shape)]
  results = list(arrays(instruction.shape))
  if instruction.opcode.endswith("-start"):  # repeats its operands before its results
    results = results[len(inputs) :] or results
  if is_gemm:
    results = [array for array in results if not _is_workspace(array, results)]
  return sum(array.bytes for array in inputs), sum(array.bytes for array in results)


def _is_workspace(array: Array, results: Sequence[object]) -> bool:
  """Whether a result of a library's GEMM is its workspace: bytes beside what it computes."""
  return len(results) > 1 and array.dtype in ("s8", "u8")


def _read_of(body: Computation, number: int, operand: Instruction) -> int:
  """Bytes that a fusion reads of an operand: all of it, or the slices that it takes."""
  parameter = body.parameters[number]
  whole, taken = operand.array.bytes, 0
  width = whole // max(operand.array.size, 1)
  for user, name in _uses(body, parameter):
    is_first = user.operands[0] == name and name not in user.operands[1:]
    if user.opcode in _SLICES and is_first:
      taken += user.array.size * width
    elif not (user.opcode in _UPDATES and is_first):  # which is written to, not read
      return whole
  return min(whole, taken)


def _uses(body: Computation, value: Instruction) -> Iterator[tuple[Instruction, str]]:
  """The instructions that read a value, and the name by which they do.

  What is computed of it element by element, and only sliced then, is computed only there: so these
  are its uses, not the arithmetic before.
  """
  sliced, seen, values = _sliced(body), {value.name}, [value]
  while values:
    value = values.pop()
    for user in body.users[value.name]:
      follow = user.opcode == "bitcast" or user.name in sliced
      if follow and user.name not in seen:
        values.append(user)
      elif not follow and user.opcode != "tuple" and user.name not in seen:
        yield user, value.name
      seen.add(user.name)


def _sliced(body: Computation) -> set[str]:
  """What a fusion computes element by element, and takes nothing but slices of."""
  names: set[str] = set()
  for value in reversed(body.instructions.values()):
    users = body.users[value.name]
    of_elements = value.opcode in _ELEMENTWISE or value.opcode in ("convert", "bitcast")
    if of_elements and users and all(u.opcode in _SLICES or u.name in names for u in users):
      names.add(value.name)
  return names


def _roots(body: Computation) -> list[Instruction]:
  """What a fusion computes, one instruction a result."""
  root = body.root
  return [body.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]


def _written(body: Computation, result: Instruction) -> int:
  """Bytes that a fusion writes of a result: all of it, or its update in place."""
  source = result
  while source.opcode == "bitcast":
    source = body.instructions[source.operands[0]]
  if source.opcode in _UPDATES:
    return body.instructions[source.operands[_UPDATES[source.opcode]]].array.bytes
  return result.array.bytes
