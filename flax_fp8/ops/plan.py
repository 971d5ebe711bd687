"""The static description of a contraction: its three tensors and its three GEMMs."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any, TypeAlias

import jax
from jax.sharding import NamedSharding

from flax_fp8 import _compat, contraction, varying
from flax_fp8.contraction import DimensionNumbers, Gemm, View
from flax_fp8.ops import calibration
from flax_fp8.ops.calibration import Calibration
from flax_fp8.recipes.base import GemmKind, Recipe, Role, StatefulRecipe
from flax_fp8.sharding import explicit_sharding, replicated_as

Roles: TypeAlias = tuple[Role, Role]

_GRADIENT_OF = {Role.INPUT: GemmKind.DGRAD, Role.KERNEL: GemmKind.WGRAD}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
  """One of the three tensors of a contraction.

  Attributes:
    role: input, kernel or output gradient.
    kinds: the two GEMMs that take the tensor. For an operand: fprop, then the backward GEMM. For
      the output gradient: the GEMM of the left operand's gradient, then the right operand's.
    views: the views of these two GEMMs.
  """

  role: Role
  kinds: tuple[GemmKind, GemmKind]
  views: tuple[View, View]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operand(Tensor):
  """The left or the right operand.

  Attributes:
    dtype: dtype of the operand and of its gradient.
    varying: mesh axes along which the operand varies, in a checked shard_map.
    sharding: sharding of the operand on a mesh with explicit axes; else None.
  """

  dtype: Any
  varying: frozenset[str]
  sharding: NamedSharding | None

  def reduce(self, grad: jax.Array) -> jax.Array:
    """Sums a gradient over the mesh axes along which the operand is replicated."""
    axes = varying.varying_axes(grad) - self.varying
    return varying.psum(grad, tuple(sorted(axes))) if axes else grad


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedGemm:
  """One of the three GEMMs.

  Attributes:
    kind: fprop, dgrad or wgrad.
    gemm: dimension numbers, views and the transposition of the result.
    dtype: dtype of the result.
  """

  kind: GemmKind
  gemm: Gemm
  dtype: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """The static description of a contraction.

  ::

      out = fprop(lhs, rhs)
      grad_of_lhs = lhs_gemm(output_grad, rhs)  # dgrad, if the left operand is the input
      grad_of_rhs = rhs_gemm(output_grad, lhs)  # wgrad, if the right one is the kernel

  Attributes:
    name: name of the contraction in error messages.
    recipe: the scaling recipe.
    calibration: how to calibrate instead of multiplying in FP8; usually None.
    lhs: the left operand.
    rhs: the right operand.
    output_grad: the gradient of the result.
    fprop: the GEMM of the result.
    lhs_gemm: the GEMM of the left operand's gradient.
    rhs_gemm: the GEMM of the right operand's gradient.
    body: the body of the enclosing ``shard_map(check_vma=False)``, if any.
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

  def in_high_precision(self, tensor: Tensor) -> tuple[bool, bool]:
    """Whether each of the two GEMMs that take a tensor is in high precision."""
    first, second = map(self.recipe.is_high_precision, tensor.kinds)
    return first, second

  def records(self, tensor: Tensor) -> bool:
    """Whether the recipe prepares and records a tensor, as a recipe with state does."""
    stateful = isinstance(self.recipe, StatefulRecipe) and self.calibration is None
    return stateful and not all(self.in_high_precision(tensor))

  @property
  def rounds_gradients(self) -> bool:
    """Whether the output gradient is rounded stochastically, which needs a PRNG key."""
    in_fp8 = not all(self.in_high_precision(self.output_grad))
    return in_fp8 and self.recipe.rounds_by_key and self.calibration is None

  def summed_axes(self) -> tuple[str, ...]:
    """Returns the mesh axes over which JAX will sum the cotangents of this backward pass.

    An unchecked shard_map sums the cotangents of its inputs. JAX does not sum cotangents of a
    function that is differentiated inside of the body.
    """
    axes = varying.unchecked_manual_axes()
    runs_here = axes and self.body is not None and self.body == _compat.running_body()
    return () if runs_here else axes

  @property
  def kernel_is_left(self) -> bool:
    """Whether the left operand is the kernel and the right operand is the input."""
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
    name: name of the contraction in error messages.
    recipe: the scaling recipe.
    dimension_numbers: canonical dimension numbers of the forward product.
    lhs: left operand, or its shape and dtype.
    rhs: right operand, or its shape and dtype.
    roles: roles of the two operands; swapped for a GEMM that takes the kernel first.
    dtype: dtype of the result.
    sharding: sharding of the result on a mesh with explicit axes.
  """
  shapes = lhs.shape, rhs.shape
  kernel = roles.index(Role.KERNEL)
  fprop = contraction.forward_gemm(dimension_numbers, *shapes, kernel=kernel)
  to_lhs, to_rhs = contraction.backward_gemms(dimension_numbers, *shapes)
  lhs_kind, rhs_kind = (_GRADIENT_OF[role] for role in roles)
  # The GEMM of one operand's gradient multiplies the output gradient with the other operand.
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
    body=_compat.running_body() if varying.unchecked_manual_axes() else None,
  )


def _operand(
  x: Any, role: Role, backward: GemmKind, views: tuple[View, View], *, beside: Any
) -> Operand:
  """Describes an operand. Without a mesh of its own, it is replicated over the other's mesh."""
  return Operand(
    role=role,
    kinds=(GemmKind.FPROP, backward),
    views=views,
    dtype=x.dtype,
    varying=varying.varying_axes(x),
    sharding=explicit_sharding(x) or replicated_as(explicit_sharding(beside)),
  )
