"""Why a GEMM is not FP8: read off the program as it was before the compiler changed it.

The optimized program cannot tell. Where XLA finds no FP8 kernel it computes in a wider type, and
removes the rounding to FP8 as well, so that no trace is left. The program before optimization shows
each product with its operands and what made them.
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

# Operations behind which an FP8 value is still the same FP8 value, moved or scaled.
_CARRIES = opcodes(
  "convert bitcast bitcast-convert copy reshape transpose broadcast slice dynamic-slice pad select "
  "concatenate dynamic-update-slice multiply divide all-gather all-to-all collective-permute "
  "reduce-precision opt-barrier"
)
_ANNOTATIONS = re.compile(r"Sharding|sharding|SPMD|sdy|annotate|LayoutConstraint")
# Operations on each element, behind which it is another value.
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
  """Says why a GEMM is not FP8, in words to act on.

  Args:
    module: the program before optimization.
    asked: its products.
    site: a GEMM of the program after optimization.
    operands: dtypes that its kernel multiplies.
    fp8_units: whether the GPU multiplies FP8 at all.
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
      "none, and in JAX 0.12 XLA chooses by timing on the attached GPU"
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
    "both operands are FP8, and flax_fp8 knows no reason: TF_CPP_VMODULE=gemm_rewriter=1 makes XLA "
    "log its own"
  )


@dataclasses.dataclass(frozen=True)
class _Origin:
  """How an operand came from FP8.

  Attributes:
    dtype: of the FP8 values; empty if it did not.
    changed: operations that made other values of them.
    scaled_by: sizes of factors that are no single number.
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
  """Sizes of the factors of a product that are spread from more than one number."""
  if instruction.opcode not in ("multiply", "divide"):
    return
  for operand in module.operands(instruction):
    for value in dataflow.computed_by(module, Value(operand)):
      if value.instruction.opcode == "broadcast":
        (source,) = module.operands(value.instruction)
        if 1 < source.array.size < instruction.array.size:
          yield "x".join(map(str, source.array.dims))


def _operand_reason(module: Module, operands: list[Instruction], origins: list[_Origin]) -> str:
  """What is wrong with one operand by itself."""
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
  """The operation that made an operand's values, or the argument that they are."""
  for value in dataflow.ancestors(module, Value(operand), _step(module, _CARRIES)):
    found = value.instruction
    if found.opcode == "parameter":
      return f"the argument {_argument(module, found)}"
    if found.opcode not in _CARRIES:
      return f"made by {names.split(found.op_name)[-1] or found.opcode}"
  return f"made by {operand.opcode}"


def _argument(module: Module, parameter: Instruction) -> str:
  """The user's name of an argument; an exported function knows it, its caller has a number."""
  for user in module.computations[parameter.computation].users[parameter.name]:
    if user.opcode == "call":
      callee = module.computations[user.called("to_apply")[0]]
      return callee.parameters[user.operands.index(parameter.name)].op_name or parameter.name
  return parameter.op_name or parameter.name


def _format_reason(origins: list[_Origin], fp8_units: bool) -> str:
  """What is wrong with the two formats on this GPU."""
  formats = [origin.dtype for origin in origins]
  if not fp8_units:
    return "the GPU has no FP8 matrix units: Ada (8.9), Hopper or newer has them"
  if foreign := [dtype for dtype in formats if dtype not in _NVIDIA]:
    return f"{foreign[0]} is not a format of NVIDIA's matrix units: use f8e4m3fn or f8e5m2"
  if formats == ["f8e5m2", "f8e5m2"]:
    return "both operands are f8e5m2: cuBLASLt wants at least one f8e4m3fn"
  return ""
