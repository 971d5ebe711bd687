"""The GEMMs of a compiled program: how large, in what types, by which kernel, for which module."""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
from collections.abc import Iterator, Sequence

from flax_fp8.explain import dataflow, names
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
# Products with scales of blocks, ``[batch, m, k]`` by ``[batch, n, k]``: as compiled, as asked for.
_SCALED_CALLS = ("__cudnn$blockScaledDot", "__op$block_scaled_dot")
_FUSION_KINDS = {"triton": "Triton", "cudnn": "cuDNN", "cutlass": "CUTLASS", "cublas": "cuBLAS"}


class GemmRole(enum.Enum):
  """What a GEMM is to a training step, its forward GEMM being ``input @ kernel``."""

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
    """Multiplications and additions: ``2 * batch * m * n * k``."""
    return 2 * self.batch * self.m * self.n * self.k

  @property
  def product(self) -> tuple[frozenset[int], int]:
    """What stays of the sizes where a kernel swaps the operands or splits K into batches."""
    return frozenset((self.m, self.n)), self.batch * self.k


@dataclasses.dataclass(frozen=True)
class Gemm:
  """One GEMM of a compiled program.

  Attributes:
    path: the module that it comes from; empty if the compiler lost it.
    role: fprop, dgrad, wgrad; ``BACKWARD`` where the sizes and operands do not tell which.
    extent: its sizes as the kernel computes them, on one device.
    lhs: dtype of the left operand, in XLA's words.
    rhs: dtype of the right operand.
    out: dtype of the result.
    kernel: the library or compiler that computes it.
    times: how often a step runs it.
    bytes: read and written by one run.
    reason: why it is not FP8; empty if it is.
    notes: what else is worth knowing, padding for one.
    op_name: JAX's name stack, as the compiler kept it.
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
    """Of all its runs in a step."""
    return self.times * self.extent.flops


@dataclasses.dataclass(frozen=True)
class Site:
  """A GEMM where it stands in the optimized module.

  Attributes:
    launch: the kernel that computes it.
    dot: the instruction that multiplies: the kernel itself, or one inside its fusion.
    kernel: who made the kernel.
    extent: its sizes.
    op_name: JAX's name stack; borrowed from a neighbor where the compiler lost it.
  """

  launch: Launch
  dot: Instruction
  kernel: str
  extent: Extent
  op_name: str

  @functools.cached_property
  def path(self) -> str:
    """The module that it comes from."""
    return names.model_path(self.op_name)

  @functools.cached_property
  def phase(self) -> Phase:
    """The pass that it is in."""
    return names.phase(self.op_name)


def find(module: Module, launched: Sequence[Launch]) -> list[Site]:
  """Finds the GEMMs among what a program launches."""
  return [site for launch in launched for site in _sites(module, launch)]


def _sites(module: Module, launch: Launch) -> Iterator[Site]:
  for dot, kernel in _dots(module, launch.instruction):
    if extent := extent_of(module, dot):
      yield Site(launch, dot, kernel, extent, _op_name(module, launch, dot))


def _dots(module: Module, instruction: Instruction) -> Iterator[tuple[Instruction, str]]:
  """The multiplying instructions of a kernel, each with the kernel's maker."""
  if instruction.opcode in ("dot", "scaled-dot"):
    yield instruction, "XLA"
  elif instruction.opcode == "custom-call" and is_gemm_call(instruction):
    yield instruction, _LIBRARY_CALLS.get(instruction.target, instruction.target)
  elif instruction.opcode == "fusion":
    for name in instruction.called("calls"):
      for inner in module.computations[name].instructions.values():
        for dot, kernel in _dots(module, inner):
          yield dot, _fusion_maker(instruction) if kernel == "XLA" else kernel
        if _is_product_by_hand(module, inner):
          yield inner, "XLA, matrix-vector"


def is_gemm_call(instruction: Instruction) -> bool:
  """Whether a custom call is a matrix product."""
  return instruction.target in _LIBRARY_CALLS or "gemm_backend_config" in instruction.config


def has_block_scales(instruction: Instruction) -> bool:
  """Whether a product is one of values and of scales for their blocks."""
  is_call = instruction.opcode == "custom-call" and instruction.target in _SCALED_CALLS
  return instruction.opcode == "scaled-dot" or is_call


def _is_product_by_hand(module: Module, instruction: Instruction) -> bool:
  """Whether XLA made a product with a vector into multiplications and a reduction."""
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
  """Sizes of a dot, a library call or a reduction that stands for one; None if they are unknown."""
  operands = module.operands(dot)
  if dot.opcode == "reduce":
    out = dot.array.size
    return Extent(1, out, 1, operands[0].array.size // max(out, 1))
  if len(operands) < 2 or not (axes := _dimension_numbers(dot)):
    return None
  lhs, rhs = operands[0].array.dims, operands[1].array.dims
  lhs_contract, rhs_contract, lhs_batch, rhs_batch = axes
  batch = product(tuple(lhs[axis] for axis in lhs_batch))
  k = product(tuple(lhs[axis] for axis in lhs_contract))
  m = product(tuple(d for axis, d in enumerate(lhs) if axis not in (*lhs_contract, *lhs_batch)))
  n = product(tuple(d for axis, d in enumerate(rhs) if axis not in (*rhs_contract, *rhs_batch)))
  return Extent(batch, m, n, k)


_AXES = ("contracting_dim", "batch_dim")


def _dimension_numbers(dot: Instruction) -> list[tuple[int, ...]] | None:
  """Contracting axes of both operands, then batch axes of both; None if the text has none."""
  sides = [(side, kind) for kind in _AXES for side in ("lhs", "rhs")]
  if dot.opcode in ("dot", "scaled-dot"):
    texts = (dot.attributes.get(f"{side}_{kind}s", "{}") for side, kind in sides)
    return [tuple(int(axis) for axis in re.findall(r"\d+", text)) for text in texts]
  if has_block_scales(dot):
    return [(2,), (2,), (0,), (0,)]
  numbers = dot.config.get("gemm_backend_config", {}).get("dot_dimension_numbers")
  if numbers is None:
    return None
  return [
    tuple(int(axis) for axis in numbers.get(f"{side}_{kind}ensions", ())) for side, kind in sides
  ]


def _op_name(module: Module, launch: Launch, dot: Instruction) -> str:
  """The name stack of a GEMM, or that of the nearest neighbor that has one."""
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
  """The buffers that a GEMM multiplies."""
  operands = module.operands(site.dot)
  if site.dot.opcode == "reduce":
    return operands[0].array, operands[0].array
  return operands[0].array, operands[1].array


def is_fp8(module: Module, site: Site) -> bool:
  """Whether matrix units multiply two FP8 operands; XLA's own loops have none."""
  lhs, rhs = operand_arrays(module, site)
  return lhs.is_fp8 and rhs.is_fp8 and not site.kernel.startswith("XLA")


def padding(module: Module, site: Site) -> tuple[str, ...]:
  """Notes on operands that were padded for the kernel."""
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


def _through_layout(module: Module) -> dataflow.Step:
  same_data = ("bitcast", "copy", "transpose", "reshape", "convert")

  def step(value: Value) -> list[Value]:
    passes = value.instruction.opcode in same_data
    return dataflow.operands(module, value) if passes else []

  return step


def _times(dims: tuple[int, ...]) -> str:
  return "x".join(map(str, dims))
