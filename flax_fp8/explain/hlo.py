"""Parses XLA's HLO text.

The text differs slightly between JAX versions since 0.8. The parser accepts all variants: operands
with or without shapes and percent signs, index comments, and constants over several lines. Lines
that it cannot read are kept in ``Module.unread``, so nothing is dropped silently.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Array:
  """Dtype and shape of one buffer.

  Attributes:
    dtype: dtype as XLA prints it, such as ``bf16`` or ``f8e4m3fn``.
    dims: dimensions.
    layout: axes from minor to major, as printed; empty if the text has no layout.
  """

  dtype: str
  dims: tuple[int, ...]
  layout: tuple[int, ...] = ()

  @property
  def size(self) -> int:
    """Number of elements."""
    return product(self.dims)

  @property
  def bytes(self) -> int:
    """Bytes in memory; elements with fewer than 8 bits are packed."""
    return -(-self.size * bits(self.dtype) // 8)

  @property
  def is_fp8(self) -> bool:
    """Whether the elements are FP8."""
    return self.dtype.startswith("f8")


Shape: TypeAlias = "Array | tuple[Shape, ...]"


def opcodes(words: str) -> frozenset[str]:
  """Returns a set of opcodes from a string of words."""
  return frozenset(words.split())


def product(dims: tuple[int, ...]) -> int:
  """Returns the product of dimensions."""
  total = 1
  for dim in dims:
    total *= dim
  return total


def bits(dtype: str) -> int:
  """Returns the number of bits of an element."""
  if dtype in _BITS:
    return _BITS[dtype]
  found = re.match(r"[a-z]+(\d+)", dtype)
  return int(found[1]) if found else 8


def arrays(shape: Shape) -> Iterator[Array]:
  """Yields all buffers of a shape."""
  if isinstance(shape, Array):
    yield shape
  else:
    for part in shape:
      yield from arrays(part)


def shape_bytes(shape: Shape) -> int:
  """Returns the bytes of all buffers of a shape."""
  return sum(array.bytes for array in arrays(shape))


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
  """One instruction of a computation.

  Attributes:
    name: name, unique in its computation.
    shape: shape of its result.
    opcode: ``fusion``, ``custom-call``, and so on.
    operands: names of its operands, in the same computation.
    literal: text in parentheses: the number of a parameter, or the value of a constant.
    attributes: attributes by name, as printed.
    computation: name of its computation.
  """

  name: str
  shape: Shape
  opcode: str
  operands: tuple[str, ...]
  literal: str
  attributes: Mapping[str, str]
  computation: str

  @property
  def array(self) -> Array:
    """First buffer of the result."""
    return next(arrays(self.shape), Array("token", ()))

  @property
  def op_name(self) -> str:
    """Name stack of the operation; empty if the compiler lost it."""
    found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes.get("metadata", ""))
    return found[1].replace('\\"', '"') if found else ""

  @property
  def target(self) -> str:
    """Target of a custom call; empty for other instructions."""
    return self.attributes.get("custom_call_target", "").strip('"')

  @property
  def number(self) -> int:
    """Position of a parameter, or index of a get-tuple-element."""
    if self.opcode == "parameter":
      return int(self.literal)
    return int(self.attributes["index"])

  @functools.cached_property
  def config(self) -> dict[str, Any]:
    """Backend configuration; empty if there is none or it is not JSON."""
    text = self.attributes.get("backend_config", "")
    try:
      found = json.loads(text) if text.startswith("{") else {}
    except json.JSONDecodeError:
      return {}
    return found if isinstance(found, dict) else {}

  def called(self, *names: str) -> list[str]:
    """Returns the names of computations in the given attributes."""
    found = (self.attributes.get(name, "") for name in names)
    return [word for text in found for word in re.findall(r"[\w.$\-]+", text)]


@dataclasses.dataclass(eq=False)
class Computation:
  """A computation: its instructions by name, in execution order."""

  name: str
  instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
  root_name: str = ""

  @property
  def root(self) -> Instruction:
    """Instruction that computes the result."""
    return self.instructions[self.root_name]

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    """Parameters by number."""
    found = (i for i in self.instructions.values() if i.opcode == "parameter")
    return {parameter.number: parameter for parameter in found}

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """Users of each instruction."""
    readers: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
    for instruction in self.instructions.values():
      for operand in instruction.operands:
        readers.setdefault(operand, []).append(instruction)
    return readers


@dataclasses.dataclass(eq=False)
class Module:
  """A whole program.

  Attributes:
    computations: computations by name.
    entry: name of the entry computation.
    unread: lines that the parser could not read.
  """

  computations: dict[str, Computation] = dataclasses.field(default_factory=dict)
  entry: str = ""
  unread: list[str] = dataclasses.field(default_factory=list)

  def operands(self, instruction: Instruction) -> list[Instruction]:
    """Returns the operands of an instruction, with placeholders for unread instructions."""
    where = instruction.computation
    found = self.computations[where].instructions
    return [found.get(name) or placeholder(name, where) for name in instruction.operands]

  @functools.cached_property
  def callers(self) -> dict[str, list[Instruction]]:
    """Instructions that call each computation."""
    found: dict[str, list[Instruction]] = {name: [] for name in self.computations}
    for computation in self.computations.values():
      for instruction in computation.instructions.values():
        for name in instruction.called(*CALLS):
          if name in found:
            found[name].append(instruction)
    return found


def placeholder(name: str, computation: str) -> Instruction:
  """Returns a placeholder for an unread instruction, without buffers and operands."""
  return Instruction(name, Array("token", ()), "unread", (), "", {}, computation)


# Attributes that name the computations of a conditional, and of any calling instruction.
BRANCHES = ("branch_computations", "true_computation", "false_computation")
CALLS = ("calls", "body", "condition", "to_apply", "called_computations", *BRANCHES)
_HEADER = re.compile(r"^(ENTRY )?%?([\w.$\-]+) .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.$\-]+) = (.*)$")
_COMMENT = re.compile(r"/\*.*?\*/")
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")


def parse(text: str) -> Module:
  """Parses the text of an HLO module."""
  module, current = Module(), None
  for line in _logical_lines(text):
    if header := _HEADER.match(line):
      if line.startswith("HloModule"):
        continue
      current = Computation(header[2])
      module.computations[current.name] = current
      if header[1]:
        module.entry = current.name
    elif line.startswith("}"):
      current = None
    elif current is not None and not _read(line, current):
      module.unread.append(line.strip())
      if named := _LINE.match(line):
        _add(placeholder(named[2], current.name), current, is_root=bool(named[1]))
  return module


def _logical_lines(text: str) -> Iterator[str]:
  """Joins instructions that span several lines, such as constants, to one line each."""
  pending = ""
  for line in text.splitlines():
    if pending and _LINE.match(line):  # the pending instruction has no end
      yield pending
      pending = ""
    whole = pending + line
    if _LINE.match(whole) and whole.count("{") > whole.count("}") and '"' not in whole:
      pending = whole + " "
      continue
    pending = ""
    yield whole
  if pending:
    yield pending


def _read(line: str, computation: Computation) -> bool:
  """Adds the instruction of a line to its computation; returns False if it can't be parsed."""
  if not line.strip():
    return True
  found = _LINE.match(line)
  if not found:
    return False
  rest = found[3]
  try:
    shape_text, rest = _cut_shape(rest)
    opcode, rest = rest.lstrip().split("(", 1)
    if not re.fullmatch(r"[a-z][\w\-]*", opcode):
      return False
    inside, rest = _cut_balanced("(" + rest)
    instruction = Instruction(
      name=found[2],
      shape=_shape(_COMMENT.sub("", shape_text)),
      opcode=opcode,
      operands=() if opcode in ("parameter", "constant") else _operands(inside[1:-1]),
      literal=inside[1:-1],
      attributes=_attributes(rest),
      computation=computation.name,
    )
  except ValueError:
    return False
  _add(instruction, computation, is_root=bool(found[1]))
  return True


def _add(instruction: Instruction, computation: Computation, *, is_root: bool) -> None:
  computation.instructions[instruction.name] = instruction
  if is_root or not computation.root_name:
    computation.root_name = instruction.name


def _cut_shape(text: str) -> tuple[str, str]:
  if text.startswith("("):
    return _cut_balanced(text)
  shape, _, rest = text.partition(" ")
  return shape, rest


_OPEN, _CLOSE = "([{", ")]}"


def _cut_balanced(text: str) -> tuple[str, str]:
  """Splits a text after the parenthesis that closes its first one; quoted text is skipped."""
  depth = 0
  for found in re.finditer(r'"(?:[^"\\]|\\.)*"|[()\[\]{}]', text):
    mark = found[0]
    if mark in _OPEN:
      depth += 1
    elif mark in _CLOSE:
      depth -= 1
      if depth == 0:
        return text[: found.end()], text[found.end() :]
  raise ValueError("the parentheses do not match")


def _split(text: str) -> list[str]:
  """Splits a text at the commas outside parentheses and quotes."""
  parts, depth, start = [], 0, 0
  for found in re.finditer(r'"(?:[^"\\]|\\.)*"|[()\[\]{},]', text):
    mark = found[0]
    if mark in _OPEN:
      depth += 1
    elif mark in _CLOSE:
      depth -= 1
    elif mark == "," and depth == 0:
      parts.append(text[start : found.start()])
      start = found.end()
  return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def _operands(text: str) -> tuple[str, ...]:
  """Returns the names of operands; a shape may precede each name."""
  parts = _split(_COMMENT.sub("", text))
  return tuple(part.split()[-1].lstrip("%") for part in parts)


def _attributes(text: str) -> dict[str, str]:
  pairs = (part.partition("=") for part in _split(text))
  return {key: value for key, _, value in pairs}


def _shape(text: str) -> Shape:
  if text.startswith("("):
    return tuple(_shape(part) for part in _split(text[1:-1]))
  found = _ARRAY.match(text)
  if not found:
    raise ValueError(f"no shape: {text}")
  dims = tuple(int(dim.strip("<=? ") or 0) for dim in found[2].split(",") if dim.strip())
  layout = (found[3] or "").partition(":")[0]
  return Array(found[1], dims, tuple(int(i) for i in layout.split(",") if i.strip().isdigit()))
