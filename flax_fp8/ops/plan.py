"""What is known of a contraction when it is traced: its three tensors and its three GEMMs."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any, TypeAlias

import jax
from jax.sharding import NamedSharding

from flax_fp8 import _compat, contraction
from flax_fp8.contraction import DimensionNumbers, Gemm, View
from flax_fp8.ops import calibration
from flax_fp8.ops.calibration import Calibration
from flax_fp8.recipes.base import GemmKind, Recipe, Role
from flax_fp8.sharding import explicit_sharding, replicated_as

Roles: TypeAlias = tuple[Role, Role]

_GRADIENT_OF = {Role.INPUT: GemmKind.DGRAD, Role.KERNEL: GemmKind.WGRAD}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
  """One of the three tensors of a contraction.

  Attributes:
    role: what it is.
    kinds: the two GEMMs that take it. Of an operand, fprop and then the backward one; of the output
      gradient, the one that gives the left operand's gradient and then the right one's.
    views: how these two see it.
  """

  role: Role
  kinds: tuple[GemmKind, GemmKind]
  views: tuple[View, View]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operand(Tensor):
  """The left or the right operand.

  Attributes:
    dtype: of the operand, and so of its gradient.
    varying: mesh axes along which it differs, in a checked shard_map.
    sharding: on a mesh with explicit axes; else None.
  """

  dtype: Any
  varying: frozenset[str]
  sharding: NamedSharding | None

  def reduce(self, grad: jax.Array) -> jax.Array:
    """Sums a gradient over the mesh axes over which the operand is replicated."""
    axes = _compat.varying_axes(grad) - self.varying
    return _compat.psum(grad, tuple(sorted(axes))) if axes else grad


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedGemm:
  """One of the three GEMMs.

  Attributes:
    kind: which of the three.
    gemm: its dimension numbers, and what becomes of its result.
    dtype: of its result.
  """

  kind: GemmKind
  gemm: Gemm
  dtype: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What is static about a contraction.

  ::

      out = fprop(lhs, rhs)
      grad_of_lhs = lhs_gemm(output_grad, rhs)  # dgrad, if the left operand is the input
      grad_of_rhs = rhs_gemm(output_grad, lhs)  # wgrad, if the right one is the kernel

  Attributes:
    name: what error messages call the contraction.
    recipe: how its tensors are scaled.
    calibration: what it does instead of multiplying in FP8; None as a rule.
    lhs: its left operand.
    rhs: its right operand.
    output_grad: the gradient of its result.
    fprop: the GEMM that gives the result.
    lhs_gemm: the GEMM that gives the left operand's gradient.
    rhs_gemm: the GEMM that gives the right operand's gradient.
    body: the body of the ``shard_map(check_vma=False)`` that it is in, if any.
  """

  name: str
  recipe: Recipe
  calibration: Calibration | None
  lhs: Operand
  rhs: Operand
  output_grad: Tensor
  fprop: PlannedGemm
  lhs_gemm: PlannedGemm
  rhs_gemm: PlannedGemm
  body: weakref.ref[Any] | None

  @property
  def rounds_gradients(self) -> bool:
    """Whether the output gradient is rounded by a PRNG key."""
    in_fp8 = not all(map(self.recipe.is_high_precision, self.output_grad.kinds))
    return in_fp8 and self.recipe.rounds_by_key and self.calibration is None

  def summed_axes(self) -> tuple[str, ...]:
    """Returns the mesh axes over which JAX will sum the cotangents that this backward pass gives.

    An unchecked shard_map sums the cotangents of what it takes. What is differentiated inside of
    its body is left as it is.
    """
    axes = _compat.unchecked_manual_axes()
    runs_here = axes and self.body is not None and self.body == _compat.running_body()
    return () if runs_here else axes

  @property
  def kernel_is_left(self) -> bool:
    """Whether the left operand is the kernel, the right one the input."""
    return self.lhs.role is Role.KERNEL


def make_plan(
  name: str,
  recipe: Recipe,
  dimension_numbers: DimensionNumbers,
  lhs: jax.Array,
  rhs: jax.Array,
  *,
  roles: Roles = (Role.INPUT, Role.KERNEL),
  dtype: Any,
  sharding: NamedSharding | None = None,
) -> Plan:
  """Plans a contraction.

  Args:
    name: what error messages call it.
    recipe: how to scale.
    dimension_numbers: canonical, of the forward product.
    lhs: left operand, or its shape and dtype.
    rhs: right operand, or its shape and dtype.
    roles: what the two are; exchanged for a GEMM that takes the kernel first.
    dtype: of the result.
    sharding: of the result, on a mesh with explicit axes.
  """
  shapes = lhs.shape, rhs.shape
  kernel = roles.index(Role.KERNEL)
  fprop = contraction.forward_gemm(dimension_numbers, *shapes, kernel=kernel)
  to_lhs, to_rhs = contraction.backward_gemms(dimension_numbers, *shapes)
  lhs_kind, rhs_kind = (_GRADIENT_OF[role] for role in roles)
  # Each operand meets the output gradient in the GEMM that gives the other one's gradient.
  left = _operand(lhs, roles[0], rhs_kind, (fprop.lhs, to_rhs.rhs), beside=rhs)
  right = _operand(rhs, roles[1], lhs_kind, (fprop.rhs, to_lhs.rhs), beside=lhs)
  of_input = lambda role: 1 if role is Role.INPUT else None
  fprop = dataclasses.replace(fprop, sharding=sharding, shared=1 - kernel)
  to_lhs = dataclasses.replace(to_lhs, sharding=left.sharding, shared=of_input(roles[1]))
  to_rhs = dataclasses.replace(to_rhs, sharding=right.sharding, shared=of_input(roles[0]))
  return Plan(
    name=name,
    recipe=recipe,
    calibration=calibration.current(),
    lhs=left,
    rhs=right,
    output_grad=Tensor(
      role=Role.OUTPUT_GRAD, kinds=(lhs_kind, rhs_kind), views=(to_lhs.lhs, to_rhs.lhs)
    ),
    fprop=PlannedGemm(kind=GemmKind.FPROP, gemm=fprop, dtype=dtype),
    lhs_gemm=PlannedGemm(kind=lhs_kind, gemm=to_lhs, dtype=left.dtype),
    rhs_gemm=PlannedGemm(kind=rhs_kind, gemm=to_rhs, dtype=right.dtype),
    body=_compat.running_body() if _compat.unchecked_manual_axes() else None,
  )


def _operand(
  x: Any, role: Role, backward: GemmKind, views: tuple[View, View], *, beside: Any
) -> Operand:
  """Describes an operand; one that knows no mesh is replicated over the mesh of the other."""
  return Operand(
    role=role,
    kinds=(GemmKind.FPROP, backward),
    views=views,
    dtype=x.dtype,
    varying=_compat.varying_axes(x),
    sharding=explicit_sharding(x) or replicated_as(explicit_sharding(beside)),
  )
