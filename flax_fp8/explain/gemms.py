"""Finds the GEMMs of a compiled program, with sizes, dtypes, kernels and modules."""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
from collections.abc import Iterator, Sequence

from flax_fp8.explain import dataflow, mosaic, names
from flax_fp8.explain.dataflow import Value
from flax_fp8.explain.hlo import Array, Instruction, Module, product
from flax_fp8.explain.names import Phase
from flax_fp8.explain.schedule import Launch

_LIBRARY_CALLS = {
  "__cublas$gemm": "cuBLAS",
  "__cublas$lt$matmul": "cuBLASLt",
  "__cublas$lt$matmul$f8": "cuBLASLt FP8",
  "__cublas$lt$matmul$mx": "cuBLASLt MX",
  "__cublas$lt$groupedMatmul": "cuBLASLt grouped",
  "__cudnn$blockScaledDot": "cuDNN block-scaled",
}
# Block-scaled products of ``[batch, m, k]`` and ``[batch, n, k]``: after and before optimization.
_SCALED_CALLS = ("__cudnn$blockScaledDot", "__op$block_scaled_dot")
PLAIN_JAX = "block scales in plain JAX"  # begins a note
_FUSION_KINDS = {"triton": "Triton", "cudnn": "cuDNN", "cutlass": "CUTLASS", "cublas": "cuBLAS"}


class GemmRole(enum.Enum):
  """The role of a GEMM in a training step with the forward GEMM ``input @ kernel``."""

  FPROP = "fprop"
  REMAT = "fprop again"
  DGRAD = "dgrad"
  WGRAD = "wgrad"
  BACKWARD = "backward"


@dataclasses.dataclass(frozen=True)
class Extent:
  """Sizes of a matrix product ``[batch, m, k] @ [batch, k, n]``."""

  batch: int
  m: int
  n: int
  k: int

  @property
  def flops(self) -> int:
    """Number of multiplications and additions: ``2 * batch * m * n * k``."""
    return 2 * self.batch * self.m * self.n * self.k

  @property
  def product(self) -> tuple[frozenset[int], int]:
    """Sizes that do not change if a kernel swaps its operands or splits K into batches."""
    return frozenset((self.m, self.n)), self.batch * self.k


@dataclasses.dataclass(frozen=True)
class Gemm:
  """One GEMM of a compiled program.

  Attributes:
    path: path of its module; empty if the compiler lost it.
    role: fprop, dgrad or wgrad; ``BACKWARD`` if sizes and operands do not determine which.
    extent: its sizes in the kernel, on one device.
    lhs: dtype of the left operand, as XLA prints it.
    rhs: dtype of the right operand.
    out: dtype of the result.
    kernel: library or compiler that made the kernel.
    times: number of runs in a step.
    bytes: bytes that one run reads and writes.
    reason: why it is not FP8; empty if it is.
    notes: remarks, such as padding of operands, or why plain JAX applies its block scales.
    op_name: name stack, as the compiler kept it.
  """

  path: str
  role: GemmRole
  extent: Extent
  lhs: str
  rhs: str
  out: str
  kernel: str
  times: int
  bytes: int
  reason: str = ""
  notes: tuple[str, ...] = ()
  op_name: str = ""

  @property
  def is_fp8(self) -> bool:
    """Whether matrix units multiply two FP8 operands."""
    return not self.reason

  @property
  def flops(self) -> int:
    """FLOPs of all its runs in a step."""
    return self.times * self.extent.flops


@dataclasses.dataclass(frozen=True)
class Site:
  """A GEMM in the optimized module.

  Attributes:
    launch: the kernel that computes it.
    dot: the instruction that multiplies: the kernel itself, or an instruction in its fusion.
    kernel: library or compiler that made the kernel.
    extent: its sizes.
    op_name: name stack; taken from a neighboring instruction if the compiler lost it.
  """

  launch: Launch
  dot: Instruction
  kernel: str
  extent: Extent
  op_name: str

  @functools.cached_property
  def path(self) -> str:
    """Path of its module."""
    return names.model_path(self.op_name)

  @functools.cached_property
  def phase(self) -> Phase:
    """The pass that it belongs to."""
    return names.phase(self.op_name)


def find(module: Module, launched: Sequence[Launch]) -> list[Site]:
  """Returns the GEMMs among the launches of a program."""
  return [site for launch in launched for site in _sites(module, launch)]


def _sites(module: Module, launch: Launch) -> Iterator[Site]:
  for dot, kernel in _dots(module, launch.instruction):
    if extent := extent_of(module, dot):
      yield Site(launch, dot, kernel, extent, _op_name(module, launch, dot))


def _dots(module: Module, instruction: Instruction) -> Iterator[tuple[Instruction, str]]:
  """Yields the multiplying instructions of a kernel, and who made the kernel."""
  if instruction.opcode in ("dot", "scaled-dot"):
    yield instruction, "XLA"
  elif instruction.opcode == "custom-call" and is_gemm_call(instruction):
    yield instruction, _library(instruction)
  elif instruction.opcode == "fusion":
    for name in instruction.called("calls"):
      for inner in module.computations[name].instructions.values():
        for dot, kernel in _dots(module, inner):
          yield dot, _fusion_maker(instruction) if kernel == "XLA" else kernel
        if _is_matrix_vector_product(module, inner):
          yield inner, "XLA, matrix-vector"


def _library(call: Instruction) -> str:
  if mosaic.is_kernel(call):
    return mosaic.NAME
  return _LIBRARY_CALLS.get(call.target, call.target)


def is_gemm_call(instruction: Instruction) -> bool:
  """Returns whether a custom call is a matrix product."""
  if mosaic.is_kernel(instruction):
    return mosaic.is_gemm(instruction)
  return instruction.target in _LIBRARY_CALLS or "gemm_backend_config" in instruction.config


def has_block_scales(instruction: Instruction) -> bool:
  """Returns whether a product has block scales as operands."""
  is_call = instruction.opcode == "custom-call" and instruction.target in _SCALED_CALLS
  return instruction.opcode == "scaled-dot" or is_call


def _is_matrix_vector_product(module: Module, instruction: Instruction) -> bool:
  """Returns whether XLA rewrote a product with a vector to a multiplication and a reduction."""
  if instruction.opcode != "reduce" or not instruction.op_name.endswith("/dot_general"):
    return False
  summand = module.operands(instruction)[0]
  while summand.opcode in ("convert", "bitcast"):
    (summand,) = module.operands(summand)
  return summand.opcode == "multiply"


def _fusion_maker(fusion: Instruction) -> str:
  kind = fusion.config.get("fusion_backend_config", {}).get("kind", "")
  return next((name for key, name in _FUSION_KINDS.items() if key in kind), "XLA")


def extent_of(module: Module, dot: Instruction) -> Extent | None:
  """Returns the sizes of a dot, a library call or a matrix-vector product; None if unknown."""
  operands = module.operands(dot)
  if dot.opcode == "reduce":
    out = dot.array.size
    return Extent(1, out, 1, operands[0].array.size // max(out, 1))
  if len(operands) < 2 or not (axes := _dimension_numbers(dot)):
    return None
  lhs, rhs = operands[0].array.dims, operands[1].array.dims
  if mosaic.is_kernel(dot) and not len(lhs) == len(rhs) == 3:
    return None
  lhs_contract, rhs_contract, lhs_batch, rhs_batch = axes
  batch = product(tuple(lhs[axis] for axis in lhs_batch))
  k = product(tuple(lhs[axis] for axis in lhs_contract))
  m = product(tuple(d for axis, d in enumerate(lhs) if axis not in (*lhs_contract, *lhs_batch)))
  n = product(tuple(d for axis, d in enumerate(rhs) if axis not in (*rhs_contract, *rhs_batch)))
  return Extent(batch, m, n, k)


_AXES = ("contracting_dim", "batch_dim")


def _dimension_numbers(dot: Instruction) -> list[tuple[int, ...]] | None:
  """Returns contracting axes of both operands, then batch axes of both; None if unknown."""
  sides = [(side, kind) for kind in _AXES for side in ("lhs", "rhs")]
  if dot.opcode in ("dot", "scaled-dot"):
    texts = (dot.attributes.get(f"{side}_{kind}s", "{}") for side, kind in sides)
    return [tuple(int(axis) for axis in re.findall(r"\d+", text)) for text in texts]
  if has_block_scales(dot) or mosaic.is_kernel(dot):
    return [(2,), (2,), (0,), (0,)]
  numbers = dot.config.get("gemm_backend_config", {}).get("dot_dimension_numbers")
  if numbers is None:
    return None
  return [
    tuple(int(axis) for axis in numbers.get(f"{side}_{kind}ensions", ())) for side, kind in sides
  ]


def _op_name(module: Module, launch: Launch, dot: Instruction) -> str:
  """Returns the name stack of a GEMM, or of the nearest neighboring instruction with one."""
  kernel = launch.instruction
  if found := dot.op_name or kernel.op_name:
    return names.within_loop(found, launch.loop)
  users = module.computations[kernel.computation].users[kernel.name]
  near = [*users, *module.operands(kernel)]
  near += [further for user in users for further in _users(module, user)]
  return next((other.op_name for other in near if names.model_path(other.op_name)), "")


def _users(module: Module, instruction: Instruction) -> list[Instruction]:
  return module.computations[instruction.computation].users[instruction.name]


def operand_arrays(module: Module, site: Site) -> tuple[Array, Array]:
  """Returns the operand buffers of a GEMM."""
  operands = module.operands(site.dot)
  if site.dot.opcode == "reduce":
    return operands[0].array, operands[0].array
  return operands[0].array, operands[1].array


def is_fp8(module: Module, site: Site) -> bool:
  """Returns whether matrix units multiply two FP8 operands; XLA's own loops do not use them."""
  lhs, rhs = operand_arrays(module, site)
  return lhs.is_fp8 and rhs.is_fp8 and not site.kernel.startswith("XLA")


def padding(module: Module, site: Site) -> tuple[str, ...]:
  """Returns notes on operands that XLA padded for the kernel."""
  notes = []
  for side, operand in zip(("lhs", "rhs"), module.operands(site.dot)[:2], strict=False):
    for found in dataflow.ancestors(module, Value(operand), _through_layout(module)):
      if found.instruction.opcode == "pad":
        source = module.operands(found.instruction)[0].array.dims
        notes.append(
          f"{side} padded from {_times(source)} to {_times(found.instruction.array.dims)}"
        )
        break
  return tuple(notes)


def plain_jax(site: Site) -> tuple[str, ...]:
  """Returns a note if plain JAX computes a block-scaled product, with the reason."""
  reason = names.plain_reason(site.op_name)
  return () if reason is None else (f"{PLAIN_JAX}: {reason}",)


def _through_layout(module: Module) -> dataflow.Step:
  same_data = ("bitcast", "copy", "transpose", "reshape", "convert")

  def step(value: Value) -> list[Value]:
    passes = value.instruction.opcode in same_data
    return dataflow.operands(module, value) if passes else []

  return step


def _times(dims: tuple[int, ...]) -> str:
  return "x".join(map(str, dims))
