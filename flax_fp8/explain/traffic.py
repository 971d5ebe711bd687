"""Classifies kernels and counts the bytes that each reads and writes.

A kernel reads each input once and writes each result once. If it only slices an input, only the
slice counts. If it updates a result in place, only the update counts. The workspace of a library
call does not count. Caches are not modeled, so a tensor that two kernels read counts twice.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Sequence

from flax_fp8.explain import attention, gemms, mosaic
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
  """The purpose of a kernel."""

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
    name: name in the HLO text.
    kind: purpose of the kernel.
    times: number of runs in a step.
    read: bytes that one run reads.
    written: bytes that one run writes.
    flops: FLOPs of the matrix units in one run.
    operand: operand dtype of the matrix units; empty if the kernel does not use them.
    what: name of a library call or unknown instruction; empty for all others.
    transposes: whether XLA's kernel quantizes a tensor and transposes it too. It does so below the
      rate of memory. flax_fp8's own kernel writes both layouts near that rate, and does not count.
    maker: library or compiler that made a GEMM; empty for other kernels.
  """

  name: str
  kind: KernelClass
  times: int
  read: int
  written: int
  flops: int = 0
  operand: str = ""
  what: str = ""
  transposes: bool = False
  maker: str = ""

  @property
  def bytes(self) -> int:
    """Bytes that all runs in a step read and write."""
    return self.times * (self.read + self.written)


def kernels(module: Module, launched: Sequence[Launch], sites: Sequence[Site]) -> list[Kernel]:
  """Returns each launch of a program with its class and bytes."""
  inside: dict[int, list[Site]] = {}
  for site in sites:
    inside.setdefault(id(site.launch), []).append(site)
  return [_kernel(module, launch, inside.get(id(launch), [])) for launch in launched]


def _kernel(module: Module, launch: Launch, sites: list[Site]) -> Kernel:
  instruction = launch.instruction
  read, written = _traffic(module, instruction, is_gemm=bool(sites))
  if not sites:
    work = _call_inside(module, instruction) or instruction
    kind, what = _classify(module, work)
    flops = attention.flops(module, work)
    operand = module.operands(work)[0].array.dtype if flops else ""
    transposes = kind is KernelClass.QUANTIZE and "transpose" in _content(module, instruction)
    moved = (read, written, flops, operand, what, transposes)
    return Kernel(instruction.name, kind, launch.times, *moved)
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
    maker=sites[0].kernel,
  )


# Classes of kernels.

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


def _call_inside(module: Module, instruction: Instruction) -> Instruction | None:
  """Returns the custom call that a fusion runs on a slice; None for any other instruction."""
  if instruction.opcode != "fusion":
    return None
  body = _body(module, instruction).instructions.values()
  return next((inner for inner in body if inner.opcode == "custom-call"), None)


def _classify(module: Module, instruction: Instruction) -> tuple[KernelClass, str]:
  if instruction.opcode.removesuffix("-start") in COLLECTIVES:
    return KernelClass.COLLECTIVE, ""
  if mosaic.is_quantizer(instruction):
    return KernelClass.QUANTIZE, ""
  if instruction.opcode == "custom-call":
    return KernelClass.LIBRARY, instruction.target
  if instruction.opcode not in _KNOWN:
    return KernelClass.UNKNOWN, instruction.opcode
  return _by_content(instruction, _content(module, instruction)), ""


def _content(module: Module, instruction: Instruction) -> set[str]:
  """Returns the opcodes of a kernel on arrays, without arithmetic on scalars such as indices."""
  if instruction.opcode != "fusion":
    return {_copy_or_transpose(module, instruction)} - _FILLS
  body = _body(module, instruction)
  works = [i for i in body.instructions.values() if i.array.size > 1 or i is body.root]
  return {i.opcode for i in works} - FREE - _FILLS


def _copy_or_transpose(module: Module, instruction: Instruction) -> str:
  """Returns the opcode of an instruction; a copy to another layout is a transpose."""
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


# Bytes of kernels.

_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": -1}  # position of the update among the operands


def _traffic(module: Module, instruction: Instruction, *, is_gemm: bool) -> tuple[int, int]:
  """Returns the bytes that one run reads and writes."""
  operands = module.operands(instruction)
  if instruction.opcode == "fusion":
    body = _body(module, instruction)
    read = sum(_read_of(body, number, operand) for number, operand in enumerate(operands))
    roots = _roots(body)
    kept = [r for r in roots if not (is_gemm and _is_workspace(r.array, roots))]
    return read, sum(_written(body, result, is_gemm=is_gemm) for result in kept)
  if instruction.opcode in _SLICES:
    return instruction.array.bytes, instruction.array.bytes
  if instruction.opcode in _UPDATES:
    update = operands[_UPDATES[instruction.opcode]].array.bytes
    return update, update
  inputs = [array for operand in operands for array in arrays(operand.shape)]
  results = list(arrays(instruction.shape))
  if instruction.opcode.endswith("-start"):  # repeats its operands before its results
    results = results[len(inputs) :] or results
  return sum(array.bytes for array in inputs), _total(results, is_gemm=is_gemm)


def _total(results: Sequence[Array], *, is_gemm: bool) -> int:
  """Returns the bytes of results, without the workspace of a library GEMM."""
  kept = [array for array in results if not (is_gemm and _is_workspace(array, results))]
  return sum(array.bytes for array in kept)


def _is_workspace(array: Array, results: Sequence[object]) -> bool:
  """Returns whether a result of a library GEMM is its workspace: bytes beside other results."""
  return len(results) > 1 and array.dtype in ("s8", "u8")


def _read_of(body: Computation, number: int, operand: Instruction) -> int:
  """Returns the bytes that a fusion reads of an operand: the whole operand, or its slices."""
  parameter = body.parameters[number]
  whole, taken = operand.array.bytes, 0
  width = whole // max(operand.array.size, 1)
  for user, name in _uses(body, parameter):
    is_first = user.operands[0] == name and name not in user.operands[1:]
    if user.opcode in _SLICES and is_first:
      taken += user.array.size * width
    elif not (user.opcode in _UPDATES and is_first):  # an update writes, but does not read
      return whole
  return min(whole, taken)


def _uses(body: Computation, value: Instruction) -> Iterator[tuple[Instruction, str]]:
  """Yields the instructions that read a value, and the operand name that each uses.

  If a value is only sliced after elementwise operations, the fusion computes only the slices. Then
  the slices count as its uses instead of the elementwise operations.
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
  """Returns the elementwise results of a fusion that are used only through slices."""
  names: set[str] = set()
  for value in reversed(body.instructions.values()):
    users = body.users[value.name]
    of_elements = value.opcode in _ELEMENTWISE or value.opcode in ("convert", "bitcast")
    if of_elements and users and all(u.opcode in _SLICES or u.name in names for u in users):
      names.add(value.name)
  return names


def _roots(body: Computation) -> list[Instruction]:
  """Returns the instruction of each result of a fusion."""
  root = body.root
  return [body.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]


def _written(body: Computation, result: Instruction, *, is_gemm: bool) -> int:
  """Returns the bytes that a fusion writes of a result: the whole result, or its update."""
  source = result
  while source.opcode == "bitcast":
    source = body.instructions[source.operands[0]]
  if source.opcode in _UPDATES:
    return body.instructions[source.operands[_UPDATES[source.opcode]]].array.bytes
  return _total(list(arrays(result.shape)), is_gemm=is_gemm)
