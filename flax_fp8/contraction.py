"""Derives the two backward GEMMs of a contraction, and rewrites einsum equations as GEMMs."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import TypeAlias

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from flax_fp8.sharding import MeshAxes, mesh_axes, transposed

Axes: TypeAlias = tuple[int, ...]
DimensionNumbers: TypeAlias = tuple[tuple[Axes, Axes], tuple[Axes, Axes]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
  """A tensor as one GEMM sees it: a stack of matrices, ``[batch, kept, contracted]``.

  Attributes:
    shape: shape of the tensor.
    batch: axes that both operands and the result share.
    kept: axes that only this operand and the result have.
    contracting: axes that the GEMM sums over.
  """

  shape: Axes
  batch: Axes
  kept: Axes
  contracting: Axes

  def matrices(self, x: jax.Array) -> jax.Array:
    """Returns a tensor as ``[batch, kept, contracted]``, with each group of axes merged."""
    axes = self.batch + self.kept + self.contracting
    return lax.transpose(x, axes).reshape(self.sizes)

  @property
  def sizes(self) -> tuple[int, int, int]:
    """The shape that ``matrices`` returns."""
    groups = (self.batch, self.kept, self.contracting)
    batch, kept, contracted = (math.prod(self.shape[axis] for axis in axes) for axes in groups)
    return batch, kept, contracted

  def mesh_axes(self, sharding: NamedSharding) -> tuple[MeshAxes, MeshAxes, MeshAxes]:
    """Returns the mesh axes that shard a tensor's batch, kept and contracted axes."""
    groups = (self.batch, self.kept, self.contracting)
    named = mesh_axes(sharding, sum(map(len, groups)))
    batch, kept, contracting = (sum((named[axis] for axis in axes), ()) for axes in groups)
    return batch, kept, contracting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemm:
  """One ``dot_general`` and the transposition that follows it.

  Attributes:
    dimension_numbers: dimension numbers for ``lax.dot_general``.
    lhs: view of the left operand.
    rhs: view of the right operand. Both views list the contracted axes in the same order.
    shape: shape of the result, ``[*batch, *lhs kept, *rhs kept]``.
    permutation: axes for ``lax.transpose`` of the result.
    sharding: sharding of the transposed result on a mesh with explicit axes; else None.
    shared: the operand, 0 or 1, that other GEMMs may also take, as in layers that share an input.
  """

  dimension_numbers: DimensionNumbers
  lhs: View
  rhs: View
  shape: Axes
  permutation: Axes
  sharding: NamedSharding | None = None
  shared: int | None = None

  @property
  def dot_sharding(self) -> NamedSharding | None:
    """The sharding of the result before the transposition, for ``lax.dot_general``."""
    return transposed(self.sharding, np.argsort(self.permutation).tolist())

  @property
  def is_exchanged(self) -> bool:
    """Whether the same GEMM with its operands swapped needs no transposition of its result."""
    axes, n_batch, n_lhs = range(len(self.shape)), len(self.lhs.batch), len(self.lhs.kept)
    of_lhs, of_rhs = axes[n_batch : n_batch + n_lhs], axes[n_batch + n_lhs :]
    return self.permutation == (*axes[:n_batch], *of_rhs, *of_lhs)

  def sharded(self, sharding: NamedSharding | None) -> Gemm:
    """Returns the same GEMM with another sharding of its transposed result."""
    return dataclasses.replace(self, sharding=sharding)


def forward_gemm(
  dimension_numbers: DimensionNumbers,
  lhs_shape: Sequence[int],
  rhs_shape: Sequence[int],
  *,
  kernel: int = 1,
) -> Gemm:
  """Returns the GEMM of a ``lax.dot_general`` without a transposition of its result.

  Args:
    dimension_numbers: dimension numbers of ``lax.dot_general``.
    lhs_shape: shape of the left operand.
    rhs_shape: shape of the right operand.
    kernel: the operand, 0 or 1, whose order of contracted axes both views take. All GEMMs then see
      the same matrix of this operand, or its transpose.

  Returns:
    fprop, which takes (lhs, rhs).
  """
  contracting, (lhs_batch, rhs_batch) = dimension_numbers
  order = np.argsort(contracting[kernel])
  lhs_contract, rhs_contract = (tuple(axes[i] for i in order) for axes in contracting)
  lhs = _view(lhs_shape, lhs_contract, lhs_batch)
  rhs = _view(rhs_shape, rhs_contract, rhs_batch)
  shape = (
    *(lhs_shape[axis] for axis in lhs.batch + lhs.kept),
    *(rhs_shape[axis] for axis in rhs.kept),
  )
  return Gemm(
    dimension_numbers=dimension_numbers,
    lhs=lhs,
    rhs=rhs,
    shape=shape,
    permutation=tuple(range(len(shape))),
  )


def _view(shape: Sequence[int], contracting: Axes, batch: Axes) -> View:
  kept = tuple(a for a in range(len(shape)) if a not in contracting and a not in batch)
  return View(shape=tuple(shape), batch=batch, kept=kept, contracting=contracting)


def backward_gemms(
  dimension_numbers: DimensionNumbers, lhs_shape: Sequence[int], rhs_shape: Sequence[int]
) -> tuple[Gemm, Gemm]:
  """Derives the GEMMs that compute the gradients of both operands.

  For ``out = dot_general(lhs, rhs, dims)`` with axes ``[batch, lhs kept, rhs kept]``::

      grad_lhs = dot_general(grad_out, rhs, over "rhs kept") transposed to lhs   # dgrad
      grad_rhs = dot_general(grad_out, lhs, over "lhs kept") transposed to rhs   # wgrad

  Args:
    dimension_numbers: dimension numbers of the forward GEMM.
    lhs_shape: shape of the left operand.
    rhs_shape: shape of the right operand.

  Returns:
    dgrad, which takes (output gradient, rhs), and wgrad, which takes (output gradient, lhs).
  """
  forward = forward_gemm(dimension_numbers, lhs_shape, rhs_shape)
  lhs, rhs, shape = forward.lhs, forward.rhs, forward.shape
  n_batch, n_lhs = len(lhs.batch), len(lhs.kept)
  batch = tuple(range(n_batch))
  of_lhs = tuple(range(n_batch, n_batch + n_lhs))
  of_rhs = tuple(range(n_batch + n_lhs, len(shape)))
  dgrad = forward_gemm(((of_rhs, rhs.kept), (batch, rhs.batch)), shape, rhs_shape)
  wgrad = forward_gemm(((of_lhs, lhs.kept), (batch, lhs.batch)), shape, lhs_shape)
  return (
    dataclasses.replace(dgrad, permutation=_back_to(lhs, rhs.contracting)),
    dataclasses.replace(wgrad, permutation=_back_to(rhs, lhs.contracting)),
  )


def _back_to(operand: View, other_contracting: Axes) -> Axes:
  """Returns the transposition from a gradient's axes to its operand's axes.

  The gradient has the batch axes, the kept axes, then the contracted axes in the order of the other
  operand.
  """
  contracted = tuple(operand.contracting[i] for i in np.argsort(other_contracting))
  return tuple(int(a) for a in np.argsort(operand.batch + operand.kept + contracted))


def in_blocks(matrices: jax.Array, rows: int, columns: int) -> jax.Array:
  """Cuts a stack of matrices into blocks. Pads blocks at the edges with zeros.

  Args:
    matrices: ``[batch, R, C]``.
    rows: rows of a block.
    columns: columns of a block.

  Returns:
    ``[batch, ceil(R / rows), rows, ceil(C / columns), columns]``.
  """
  batch, height, width = matrices.shape
  # For symbolic sizes, JAX can prove only in this form that there is at least one block.
  tall, wide = (height + rows - 1) // rows, (width + columns - 1) // columns
  missing = tall * rows - height, wide * columns - width
  padded = lax.pad(matrices, matrices.dtype.type(0), ((0, 0, 0), *((0, n, 0) for n in missing)))
  return padded.reshape(batch, tall, rows, wide, columns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EinsumPlan:
  """The steps of an einsum over two operands: reductions, one GEMM, a transposition.

  Attributes:
    lhs_reduction: unary equation that takes diagonals and sums of the left operand.
    rhs_reduction: unary equation that takes diagonals and sums of the right operand.
    swap: whether the GEMM takes the reduced right operand first.
    dimension_numbers: dimension numbers of the GEMM.
    permutation: transposition of the GEMM's result. It is the identity if one of the two operand
      orders allows that.
  """

  lhs_reduction: str
  rhs_reduction: str
  swap: bool
  dimension_numbers: DimensionNumbers
  permutation: Axes


def plan_einsum(
  equation: str, lhs_shape: Sequence[int], rhs_shape: Sequence[int], name: str = "Fp8Einsum"
) -> EinsumPlan:
  """Splits a two-operand equation into unary reductions, one GEMM and a transposition.

  Labels that occur in only one operand and not in the output are summed before the GEMM. Repeated
  labels of one operand select its diagonal, as in ``jnp.einsum``. A dimension of size 1 broadcasts
  against a larger dimension with the same label.

  Args:
    equation: ``"lhs,rhs->out"`` or ``"lhs,rhs"``; may contain ellipses and blanks. A label is any
      character, such as ``"2"`` in ``"BSD,2KDH->2BSKH"``.
    lhs_shape: shape of the left operand.
    rhs_shape: shape of the right operand.
    name: name of the operation in error messages.

  Returns:
    The plan.

  Raises:
    ValueError: the equation is malformed or does not match the shapes.
  """
  lhs, rhs, out = _labels(name, equation, len(lhs_shape), len(rhs_shape))
  lhs_sizes = _sizes(name, equation, lhs, lhs_shape, rhs_shape)
  rhs_sizes = _sizes(name, equation, rhs, rhs_shape, lhs_shape)
  for label in lhs_sizes.keys() & rhs_sizes.keys():
    sizes = {lhs_sizes[label], rhs_sizes[label]}
    if len(sizes - {1}) > 1:
      raise ValueError(
        f"{name}: a label must have one size; got {equation=} where {label!r} is "
        f"{lhs_sizes[label]} in {tuple(lhs_shape)} and {rhs_sizes[label]} in {tuple(rhs_shape)}. "
        "Fix the equation or the shapes."
      )
    if len(sizes) == 2:  # broadcast: summing over a size of 1 drops the label
      (lhs_sizes if lhs_sizes[label] == 1 else rhs_sizes).pop(label)
  lhs_left = "".join(c for c in lhs_sizes if c in rhs_sizes or c in out)
  rhs_left = "".join(c for c in rhs_sizes if c in lhs_sizes or c in out)
  swap = _result(lhs_left, rhs_left, out) != out
  first, second = (rhs_left, lhs_left) if swap else (lhs_left, rhs_left)
  batch = [c for c in out if c in first and c in second]
  summed = sorted(c for c in first if c in second and c not in out)
  find = lambda labels, wanted: tuple(labels.index(c) for c in wanted)
  return EinsumPlan(
    lhs_reduction=f"{lhs}->{lhs_left}",
    rhs_reduction=f"{rhs}->{rhs_left}",
    swap=swap,
    dimension_numbers=(
      (find(first, summed), find(second, summed)),
      (find(first, batch), find(second, batch)),
    ),
    permutation=find(_result(first, second, out), out),
  )


def _result(first: str, second: str, out: str) -> str:
  """Returns the labels of a GEMM's result: batch, first operand only, second operand only."""
  batch = "".join(c for c in out if c in first and c in second)
  own = lambda labels, other: "".join(c for c in labels if c not in other)
  return batch + own(first, second) + own(second, first)


def _labels(name: str, equation: str, lhs_ndim: int, rhs_ndim: int) -> tuple[str, str, str]:
  """Splits an equation into label strings, with ellipses expanded and an explicit output."""
  inputs, arrow, out = equation.replace(" ", "").partition("->")
  operands = inputs.split(",")
  if len(operands) != 2:
    raise ValueError(
      f"{name}: the equation must have two operands; got {equation=}. Use jnp.einsum for other "
      "equations, or split it."
    )
  dots = [
    ndim - len(labels.replace("...", "")) if "..." in labels else 0
    for labels, ndim in zip(operands, (lhs_ndim, rhs_ndim), strict=True)
  ]
  unused = [c for c in map(chr, range(ord("A"), ord("z") + 1)) if c.isalpha() and c not in equation]
  ellipsis = unused[: max(0, *dots)]
  lhs, rhs = (
    labels.replace("...", "".join(ellipsis[len(ellipsis) - n :]) if n > 0 else "")
    for labels, n in zip(operands, dots, strict=True)
  )
  if not arrow:
    counts = collections.Counter(lhs + rhs)
    once = sorted(c for c, n in counts.items() if n == 1 and c not in ellipsis)
    out = "..." + "".join(once)
  out = out.replace("...", "".join(ellipsis))
  legal = not set(lhs + rhs + out) & set(",.->")
  if not legal or len(set(out)) != len(out) or not set(out) <= set(lhs + rhs) or min(dots) < 0:
    raise ValueError(
      f"{name}: labels must be single characters, and each output label must occur once in the "
      f"output and in an operand; got {equation=} for operands of rank {lhs_ndim} and {rhs_ndim}. "
      "Fix the equation."
    )
  return lhs, rhs, out


def _sizes(
  name: str, equation: str, labels: str, shape: Sequence[int], other: Sequence[int]
) -> dict[str, int]:
  """Maps each label of one operand to its size, in order of first occurrence."""
  sizes: dict[str, int] = {}
  for label, size in zip(labels, shape, strict=False):
    if sizes.setdefault(label, size) != size:
      labels = ""
  if len(labels) != len(shape):
    raise ValueError(
      f"{name}: an operand must have one dimension for each label; got {equation=} with shapes "
      f"{tuple(shape)} and {tuple(other)}. Fix the equation or the shapes."
    )
  return sizes
