"""Reads the module and the pass of an operation from its JAX name stack."""

from __future__ import annotations

import enum
import re

from flax_fp8 import scopes

# Parts of a name stack that come from control flow and transformations, not from modules.
_STEPS = frozenset(
  {
    "while",
    "body",
    "cond",
    "scan",
    "closed_call",
    "checkpoint",
    "remat",
    "rematted_computation",
    "call_exported",
    "pjit",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "shard_map",
    "shmap_body",
    "core_call",
    "eval_jaxpr",
  }
)
_KERNELS = (scopes.GEMM, scopes.QUANTIZE)
_BRANCH = re.compile(r"branch_\d+_fun$")
_TRANSFORM = re.compile(r"^(jvp|transpose|vmap|remat|checkpoint)\((.*)\)$")


class Phase(enum.Enum):
  """The part of a training step that an operation belongs to."""

  FORWARD = "forward"
  RECOMPUTED = "recomputed"
  BACKWARD = "backward"


def split(op_name: str) -> list[str]:
  """Splits a name stack at the slashes outside parentheses."""
  parts, depth, start = [], 0, 0
  for index, mark in enumerate(op_name):
    depth += (mark == "(") - (mark == ")")
    if mark == "/" and depth == 0:
      parts.append(op_name[start:index])
      start = index + 1
  return [*parts, op_name[start:]]


def model_path(op_name: str) -> str:
  """Returns the path of the module that an operation belongs to.

  ``jit(step)/transpose(jvp(Net))/while/body/closed_call/layers/layers.mlp/up/dot_general`` gives
  ``Net/layers/up``. Transformations, control flow, methods of modules and the operation itself are
  dropped. So is everything from a scope that ``flax_fp8.scopes`` defines.
  """
  path: list[str] = []
  for part in split(op_name)[:-1]:
    name = _bare(part)
    if _is_ours(name):
      break
    if name and not (path and name.startswith(f"{path[-1]}.")):
      path.append(name)
  return "/".join(path)


def kernel_scope(op_name: str) -> str:
  """Returns the innermost scope that says what a kernel computes; empty if there is none."""
  found = (name for part in reversed(split(op_name)) if (name := _bare(part)) in _KERNELS)
  return next(found, "")


def plain_reason(op_name: str) -> str | None:
  """Returns why plain JAX computes a block-scaled product; None for any other operation."""
  reasons = (scopes.plain_reason(_bare(part)) for part in split(op_name))
  return next((reason for reason in reasons if reason is not None), None)


def _is_ours(name: str) -> bool:
  return name in _KERNELS or scopes.plain_reason(name) is not None


def within_loop(op_name: str, loop: str) -> str:
  """Moves the name stack of an operation from one loop to another loop with the same body.

  ``net/up/while/body/dot_general`` within ``net/down/while`` gives
  ``net/down/while/body/dot_general``.
  """
  if op_name.startswith(f"{loop}/body/") or not loop.endswith("/while"):
    return op_name
  _, found, inside = op_name.rpartition("/while/body/")
  return f"{loop}/body/{inside}" if found else op_name


def _bare(part: str) -> str:
  """Removes transformations from a part of a name stack; may return an empty string."""
  while found := _TRANSFORM.match(part):
    if found[1] == "vmap" and "->" in found[2]:
      return ""  # an einsum's equation
    part = found[2]
  if part.startswith("jit(") or part in _STEPS or _BRANCH.match(part) or "->" in part:
    return ""
  return part


def phase(op_name: str) -> Phase:
  """Returns whether an operation is forward, recomputed or backward."""
  if "rematted_computation" in op_name:
    return Phase.RECOMPUTED
  return Phase.BACKWARD if "transpose(" in op_name else Phase.FORWARD
