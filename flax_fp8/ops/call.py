"""What is known of a contraction when it is traced: of the call, and of each operand."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import jax
from jax.sharding import NamedSharding

from flax_fp8 import _compat, contraction
from flax_fp8.contraction import DimensionNumbers, Gemm
from flax_fp8.ops.calibration import Calibration
from flax_fp8.recipes.base import GemmKind, Recipe, Role
from flax_fp8.sharding import explicit_sharding

Roles: TypeAlias = tuple[Role, Role]

_GRADIENT_OF = {Role.INPUT: GemmKind.DGRAD, Role.KERNEL: GemmKind.WGRAD}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
  """What is static about a contraction."""

  recipe: Recipe
  dimension_numbers: DimensionNumbers
  dtypes: tuple[Any, Any]  # in which the operands are multiplied
  dtype: Any  # of the result
  sharding: NamedSharding | None
  roles: Roles
  kernel_is_stored: bool
  kernels_once: bool
  in_loop: bool
  name: str
  calibration: Calibration | None

  @property
  def kernel(self) -> int:
    """Which operand the kernel is."""
    return self.roles.index(Role.KERNEL)

  def is_stored(self, index: int) -> bool:
    """Tells whether an operand is a kernel that is read from memory."""
    return self.kernel_is_stored and index == self.kernel

  def is_again(self, index: int) -> bool:
    """Tells whether an operand is kept as it is, and quantised again going backward."""
    return self.is_stored(index) and not self.kernels_once

  @property
  def backward_kinds(self) -> tuple[GemmKind, GemmKind]:
    """The GEMMs that give the gradients of the left and of the right operand."""
    return _GRADIENT_OF[self.roles[0]], _GRADIENT_OF[self.roles[1]]

  def forward_gemm(self, operands: tuple[Operand, Operand]) -> Gemm:
    """The GEMM that gives the result."""
    shapes = [operand.shape for operand in operands]
    return contraction.forward_gemm(self.dimension_numbers, *shapes, kernel=self.kernel)

  def backward_gemms(self, operands: tuple[Operand, Operand]) -> tuple[Gemm, Gemm]:
    """The GEMMs that give the gradients of the left and of the right operand."""
    shapes = [operand.shape for operand in operands]
    return contraction.backward_gemms(self.dimension_numbers, *shapes)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Operand:
  """What the backward pass must know of an operand, without keeping the operand."""

  shape: tuple[int, ...]
  dtype: Any
  varying: frozenset[str]
  sharding: NamedSharding | None

  @classmethod
  def of(cls, operand: jax.Array) -> Operand:
    """Describes an array."""
    varying, sharding = _compat.varying_axes(operand), explicit_sharding(operand)
    return cls(operand.shape, operand.dtype, varying, sharding)

  def reduce(self, grad: jax.Array) -> jax.Array:
    """Makes a gradient the operand's: sums it over mesh axes along which the operand is one."""
    axes = _compat.varying_axes(grad) - self.varying
    summed = _compat.psum(grad, tuple(sorted(axes))) if axes else grad
    return summed.astype(self.dtype)
