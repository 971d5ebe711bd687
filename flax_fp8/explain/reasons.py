"""Determines why a GEMM is not FP8, from the program before optimization.

The optimized program does not show the reason. If XLA finds no FP8 kernel, it computes in a wider
dtype, and also removes the rounding to FP8. The program before optimization shows each product with
its operands and how they were computed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

from flax_fp8.explain import dataflow, names
from flax_fp8.explain.asked import Asked, candidates
from flax_fp8.explain.dataflow import Value
from flax_fp8.explain.gemms import Site, has_block_scales
from flax_fp8.explain.hlo import Instruction, Module, opcodes

# Operations that move or scale an FP8 value, but do not change it otherwise.
_CARRIES = opcodes(
  "convert bitcast bitcast-convert copy reshape transpose broadcast slice dynamic-slice pad select "
  "concatenate dynamic-update-slice multiply divide all-gather all-to-all collective-permute "
  "reduce-precision opt-barrier"
)
_ANNOTATIONS = re.compile(r"Sharding|sharding|SPMD|sdy|annotate|LayoutConstraint")
# Elementwise operations that change an FP8 value.
_CHANGES = opcodes(
  "add subtract negate abs sign exponential exponential-minus-one log log-plus-one logistic tanh "
  "sqrt rsqrt cbrt power maximum minimum clamp floor ceil round-nearest-even round-nearest-afz "
  "sine cosine tan erf remainder atan2 compare and or not xor is-finite reverse"
)
_NVIDIA = ("f8e4m3fn", "f8e5m2")
_SIDES = ("left", "right")


def reason(
  module: Module, asked: Sequence[Asked], site: Site, operands: tuple[str, str], fp8_units: bool
) -> str:
  """Returns why a GEMM is not FP8, with advice.

  Args:
    module: the program before optimization.
    asked: its products.
    site: a GEMM of the program after optimization.
    operands: operand dtypes of its kernel.
    fp8_units: whether the GPU has FP8 matrix units.
  """
  found = candidates(asked, site)
  if not found:
    return f"multiplies {operands[0]} by {operands[1]}, and does not come from a dot_general"
  reasons = {_reason_of(module, candidate, site, fp8_units): None for candidate in found}
  return " | or: ".join(reasons)


def _reason_of(module: Module, asked: Asked, site: Site, fp8_units: bool) -> str:
  operands = module.operands(asked.dot)[:2]
  origins = [_origin(module, operand) for operand in operands]
  if not any(origin.dtype for origin in origins):
    return "FP8 was not asked for"
  found = _operand_reason(module, operands, origins) or _format_reason(origins, fp8_units)
  if found:
    return found
  if has_block_scales(asked.dot):
    return (
      "it has block scales, and XLA chose no kernel that applies them: GPUs before Blackwell have "
      "no such kernel, and in JAX 0.12 XLA chooses kernels by timing on the attached GPU"
    )
  if site.kernel.endswith("matrix-vector"):
    return "a product with a vector does not use matrix units: exclude it from FP8"
  if site.kernel.startswith("XLA"):
    return "XLA emits a loop for it, without matrix units: exclude it from FP8"
  if "algorithm" not in asked.dot.attributes:
    return (
      "both operands are FP8, but the product names no FP8 algorithm, so XLA may choose a Triton "
      "GEMM in a wider dtype: set XLA_FLAGS=--xla_gpu_enable_triton_gemm=false"
    )
  return (
    "both operands are FP8, and the reason is unknown: set TF_CPP_VMODULE=gemm_rewriter=1 to see "
    "XLA's reason in its log"
  )


@dataclasses.dataclass(frozen=True)
class _Origin:
  """How an operand was computed from FP8 values.

  Attributes:
    dtype: FP8 dtype of the values; empty if the operand does not come from FP8.
    changed: operations that changed the values.
    scaled_by: shapes of factors with more than one element.
  """

  dtype: str = ""
  changed: tuple[str, ...] = ()
  scaled_by: tuple[str, ...] = ()


def _origin(module: Module, operand: Instruction) -> _Origin:
  for through in (_CARRIES, _CARRIES | _CHANGES):
    changed: dict[str, None] = {}
    scaled: dict[str, None] = {}
    for value in dataflow.ancestors(module, Value(operand), _step(module, through)):
      instruction = value.instruction
      if instruction.array.is_fp8:
        return _Origin(instruction.array.dtype, tuple(changed), tuple(scaled))
      if instruction.opcode in _CHANGES:
        changed[instruction.opcode] = None
      scaled |= dict.fromkeys(_factors(module, instruction))
  return _Origin()


def _step(module: Module, opcodes: frozenset[str]) -> dataflow.Step:
  def step(value: Value) -> list[Value]:
    instruction = value.instruction
    annotates = instruction.opcode == "custom-call" and _ANNOTATIONS.search(instruction.target)
    if instruction.opcode not in opcodes and not annotates:
      return []
    return [Value(o) for o in module.operands(instruction) if _size(o) >= _size(instruction)]

  return step


def _size(instruction: Instruction) -> int:
  return instruction.array.size


def _factors(module: Module, instruction: Instruction) -> Iterator[str]:
  """Yields the shapes of broadcast factors with more than one element."""
  if instruction.opcode not in ("multiply", "divide"):
    return
  for operand in module.operands(instruction):
    for value in dataflow.computed_by(module, Value(operand)):
      if value.instruction.opcode == "broadcast":
        (source,) = module.operands(value.instruction)
        if 1 < source.array.size < instruction.array.size:
          yield "x".join(map(str, source.array.dims))


def _operand_reason(module: Module, operands: list[Instruction], origins: list[_Origin]) -> str:
  """Returns why one operand prevents an FP8 GEMM; empty if none does."""
  for side, operand, origin in zip(_SIDES, operands, origins, strict=True):
    if not origin.dtype:
      return (
        f"the {side} operand is {operand.array.dtype}, {_maker(module, operand)}: both must be FP8"
      )
  for side, operand, origin in zip(_SIDES, operands, origins, strict=True):
    if origin.changed:
      return (
        f"the {side} operand was FP8, but {', '.join(origin.changed)} changed it in "
        f"{operand.array.dtype}: quantize after that"
      )
    if origin.scaled_by:
      return (
        f"the {side} operand is scaled by {', '.join(origin.scaled_by)} numbers before the GEMM, "
        "and XLA takes one: scale the result"
      )
  return ""


def _maker(module: Module, operand: Instruction) -> str:
  """Returns the operation or the argument that an operand comes from."""
  for value in dataflow.ancestors(module, Value(operand), _step(module, _CARRIES)):
    found = value.instruction
    if found.opcode == "parameter":
      return f"the argument {_argument(module, found)}"
    if found.opcode not in _CARRIES:
      return f"made by {names.split(found.op_name)[-1] or found.opcode}"
  return f"made by {operand.opcode}"


def _argument(module: Module, parameter: Instruction) -> str:
  """Returns the name of an argument; for exported functions, only the callee has the name."""
  for user in module.computations[parameter.computation].users[parameter.name]:
    if user.opcode == "call":
      callee = module.computations[user.called("to_apply")[0]]
      return callee.parameters[user.operands.index(parameter.name)].op_name or parameter.name
  return parameter.op_name or parameter.name


def _format_reason(origins: list[_Origin], fp8_units: bool) -> str:
  """Returns why the two formats prevent an FP8 GEMM on this GPU; empty if they do not."""
  formats = [origin.dtype for origin in origins]
  if not fp8_units:
    return "the GPU has no FP8 matrix units: Ada (8.9), Hopper or newer has them"
  if foreign := [dtype for dtype in formats if dtype not in _NVIDIA]:
    return f"{foreign[0]} is not a format of NVIDIA's matrix units: use f8e4m3fn or f8e5m2"
  if formats == ["f8e5m2", "f8e5m2"]:
    return "both operands are f8e5m2: cuBLASLt wants at least one f8e4m3fn"
  return ""
