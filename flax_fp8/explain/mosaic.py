"""Recognizes the Pallas Mosaic GPU kernels of flax_fp8, and reads what ptxas says about them.

A kernel is a custom call. Only the name scopes in its name stack tell what it computes.
"""

from __future__ import annotations

import dataclasses
import re

from flax_fp8 import scopes
from flax_fp8.explain import names
from flax_fp8.explain.hlo import Instruction

NAME = "Mosaic GPU"

_TARGET = "mosaic_gpu"
_SUFFIX = "_mosaic_gpu_kernel"


def is_kernel(instruction: Instruction) -> bool:
  """Returns whether an instruction calls a Mosaic GPU kernel."""
  return instruction.opcode == "custom-call" and instruction.target.startswith(_TARGET)


def is_gemm(instruction: Instruction, op_name: str = "") -> bool:
  """Returns whether an instruction calls flax_fp8's GEMM of ``[batch, m, k]``, ``[batch, n, k]``.

  Args:
    instruction: any instruction.
    op_name: its full name stack, if its own lacks the functions that call it.
  """
  return is_kernel(instruction) and _scope(instruction, op_name) == scopes.GEMM


def is_quantizer(instruction: Instruction) -> bool:
  """Returns whether an instruction calls flax_fp8's kernel that quantizes to FP8."""
  return is_kernel(instruction) and _scope(instruction) == scopes.QUANTIZE


def _scope(instruction: Instruction, op_name: str = "") -> str:
  return names.kernel_scope(op_name or instruction.op_name)


@dataclasses.dataclass(frozen=True)
class Registers:
  """Registers of a compiled Mosaic GPU kernel.

  Attributes:
    kernel: name of its function. Kernels of other sizes may have the same name.
    registers: registers of a thread.
    spilled: bytes of registers that a thread spills to local memory.
  """

  kernel: str
  registers: int
  spilled: int


_ENTRY = re.compile(r"ptxas info\s*: Compiling entry function '([^']+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"ptxas info\s*: Used (\d+) registers")


def read_registers(log: str) -> tuple[Registers, ...]:
  """Returns the distinct kernels in what ptxas printed; empty if it printed nothing."""
  found: dict[Registers, None] = {}
  name, spilled = "", 0
  for line in log.splitlines():
    if entry := _ENTRY.search(line):
      name, spilled = entry[1], 0
    elif spills := _SPILLS.search(line):  # once for each function of a kernel
      spilled += max(int(spills[1]), int(spills[2]))
    elif (used := _USED.search(line)) and name.endswith(_SUFFIX):
      found[Registers(name.removesuffix(_SUFFIX), int(used[1]), spilled)] = None
      name = ""
  return tuple(found)


_NO_TOOLS = re.compile(
  r"No PTX compilation provider|libdevice\S*: Could not open|libdevice not found"
)


def missing_tools(words: str, install: str) -> RuntimeError | None:
  """Returns an error with advice if a text of the compiler says that it misses CUDA's tools.

  Args:
    words: message or log of the compiler.
    install: the package that has the tools.
  """
  if not _NO_TOOLS.search(words):
    return None
  return RuntimeError(
    "explain: compiling Pallas Mosaic GPU kernels needs ptxas and libdevice of the CUDA toolkit; "
    f"the compiler did not find them. Run: pip install {install}"
  )
