"""Dimension-number algebra: the two GEMMs of a backward pass, and einsum equations as GEMMs."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_fp8.quantize import QTensor, dequantize, product

Axes: TypeAlias = tuple[int, ...]
DimensionNumbers: TypeAlias = tuple[tuple[Axes, Axes], tuple[Axes, Axes]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemm:
  """One ``dot_general`` and the transposition that follows it.

  Attributes:
    dimension_numbers: of ``lax.dot_general``.
    permutation: axes for ``lax.transpose`` of its result.
  """

  dimension_numbers: DimensionNumbers
  permutation: Axes


def plain_gemm(dimension_numbers: DimensionNumbers, lhs_ndim: int, rhs_ndim: int) -> Gemm:
  """Returns the GEMM of a ``lax.dot_general`` whose result stays as it is."""
  (contract, _), (batch, _) = dimension_numbers
  ndim = lhs_ndim + rhs_ndim - 2 * len(contract) - len(batch)
  return Gemm(dimension_numbers=dimension_numbers, permutation=tuple(range(ndim)))


def kept_axes(ndim: int, contracting: Axes, batch: Axes) -> Axes:
  """Returns the axes of an operand that are neither contracted nor batch."""
  return tuple(a for a in range(ndim) if a not in contracting and a not in batch)


def backward_gemms(
  dimension_numbers: DimensionNumbers, lhs_ndim: int, rhs_ndim: int
) -> tuple[Gemm, Gemm]:
  """Derives the GEMMs that give the gradients of both operands.

  For ``out = dot_general(lhs, rhs, dims)`` with axes ``[batch, lhs kept, rhs kept]``::

      grad_lhs = dot_general(grad_out, rhs, over "rhs kept") transposed to lhs   # dgrad
      grad_rhs = dot_general(grad_out, lhs, over "lhs kept") transposed to rhs   # wgrad

  Args:
    dimension_numbers: of the forward GEMM.
    lhs_ndim: rank of the left operand.
    rhs_ndim: rank of the right operand.

  Returns:
    dgrad, to be called with (output gradient, rhs); and wgrad, with (output gradient, lhs).
  """
  (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
  lhs_kept = kept_axes(lhs_ndim, lhs_contract, lhs_batch)
  rhs_kept = kept_axes(rhs_ndim, rhs_contract, rhs_batch)
  n_batch, n_lhs = len(lhs_batch), len(lhs_kept)
  grad_batch = tuple(range(n_batch))
  grad_lhs = tuple(range(n_batch, n_batch + n_lhs))
  grad_rhs = tuple(range(n_batch + n_lhs, n_batch + n_lhs + len(rhs_kept)))
  dgrad = Gemm(
    dimension_numbers=((grad_rhs, rhs_kept), (grad_batch, rhs_batch)),
    permutation=_back_to(lhs_batch, lhs_kept, lhs_contract, rhs_contract),
  )
  wgrad = Gemm(
    dimension_numbers=((grad_lhs, lhs_kept), (grad_batch, lhs_batch)),
    permutation=_back_to(rhs_batch, rhs_kept, rhs_contract, lhs_contract),
  )
  return dgrad, wgrad


def _back_to(batch: Axes, kept: Axes, contract: Axes, other_contract: Axes) -> Axes:
  """Returns the transposition that puts a gradient's axes in its operand's order.

  The gradient comes as batch, kept, then the contracted axes in the other operand's order.
  """
  contract_in_result = tuple(contract[i] for i in np.argsort(other_contract))
  return tuple(int(a) for a in np.argsort(batch + kept + contract_in_result))


def dot_per_tensor(
  lhs: QTensor, rhs: QTensor, gemm: Gemm, dtype: Any, *, fast_accumulation: bool
) -> jax.Array:
  """Multiplies two tensors that have one scale each.

  ``transpose(dot_general(lhs.data, rhs.data)) * (lhs.scale * rhs.scale)``, in this order, so that
  the compiler sees the transposition beside the GEMM and can make the GEMM write it.

  Args:
    lhs: left operand, scale of shape ``()``.
    rhs: right operand, scale of shape ``()``.
    gemm: dimension numbers, and the transposition of the result.
    dtype: of the result; the product is scaled in float32 before it is cast.
    fast_accumulation: lets the tensor core keep partial sums in less than float32 (Hopper keeps
      about 14 bits), which is faster. On other hardware it changes nothing.

  Returns:
    The product in ``dtype``.
  """
  precision = lax.Precision.DEFAULT if fast_accumulation else lax.Precision.HIGHEST
  out = lax.dot_general(
    lhs.data,
    rhs.data,
    gemm.dimension_numbers,
    precision=precision,
    preferred_element_type=jnp.float32,
  )
  out = lax.transpose(out, gemm.permutation)
  return dequantize(out, product(lhs.scale, rhs.scale), dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EinsumPlan:
  """An einsum over two operands, taken apart.

  Attributes:
    lhs_reduction: unary equation that takes diagonals and sums of the left operand.
    rhs_reduction: the same for the right operand.
    swap: whether the GEMM takes what is left of the right operand first.
    dimension_numbers: of the GEMM.
    permutation: transposition of the GEMM's result; the identity where either order allows it.
  """

  lhs_reduction: str
  rhs_reduction: str
  swap: bool
  dimension_numbers: DimensionNumbers
  permutation: Axes


def plan_einsum(equation: str, lhs_shape: Sequence[int], rhs_shape: Sequence[int]) -> EinsumPlan:
  """Takes a two-operand equation apart into unary reductions, one GEMM and a transposition.

  Labels that occur in one operand alone and not in the output are summed out before the GEMM, and
  repeated labels of one operand are its diagonal, as in ``jnp.einsum``. A dimension of size 1 that
  meets a larger one under the same label broadcasts.

  Args:
    equation: ``"lhs,rhs->out"`` or ``"lhs,rhs"``; may hold ellipses and blanks.
    lhs_shape: of the left operand.
    rhs_shape: of the right operand.

  Returns:
    The plan.

  Raises:
    ValueError: the equation is malformed, or does not fit the shapes.
  """
  lhs, rhs, out = _labels(equation, len(lhs_shape), len(rhs_shape))
  lhs_sizes = _sizes(equation, lhs, lhs_shape, rhs_shape)
  rhs_sizes = _sizes(equation, rhs, rhs_shape, lhs_shape)
  for label in lhs_sizes.keys() & rhs_sizes.keys():
    sizes = {lhs_sizes[label], rhs_sizes[label]}
    if len(sizes - {1}) > 1:
      raise ValueError(
        f"Fp8Einsum: a label must have one size; got {equation=} where {label!r} is "
        f"{lhs_sizes[label]} in {tuple(lhs_shape)} and {rhs_sizes[label]} in {tuple(rhs_shape)}. "
        "Mend the equation or the shapes."
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
  """Returns the labels of a GEMM's result: batch, the first operand's own, the second's own."""
  batch = "".join(c for c in out if c in first and c in second)
  own = lambda labels, other: "".join(c for c in labels if c not in other)
  return batch + own(first, second) + own(second, first)


def _labels(equation: str, lhs_ndim: int, rhs_ndim: int) -> tuple[str, str, str]:
  """Splits an equation into label strings, ellipses spelled out, the output made explicit."""
  inputs, arrow, out = equation.replace(" ", "").partition("->")
  operands = inputs.split(",")
  if len(operands) != 2:
    raise ValueError(
      f"Fp8Einsum: the equation must have two operands; got {equation=}. Use jnp.einsum for "
      "others, or split it."
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
  legal = all(c.isalpha() for c in lhs + rhs + out)
  if not legal or len(set(out)) != len(out) or not set(out) <= set(lhs + rhs) or min(dots) < 0:
    raise ValueError(
      "Fp8Einsum: labels are letters, and each label of the output must occur there once and in "
      f"an operand; got {equation=} for operands of rank {lhs_ndim} and {rhs_ndim}. Mend it."
    )
  return lhs, rhs, out


def _sizes(
  equation: str, labels: str, shape: Sequence[int], other: Sequence[int]
) -> dict[str, int]:
  """Maps each label of one operand to its size, in order of first occurrence."""
  sizes: dict[str, int] = {}
  for label, size in zip(labels, shape, strict=False):
    if sizes.setdefault(label, size) != size:
      labels = ""
  if len(labels) != len(shape):
    raise ValueError(
      f"Fp8Einsum: an operand must have one dimension a label; got {equation=} with shapes "
      f"{tuple(shape)} and {tuple(other)}. Mend the equation or the shapes."
    )
  return sizes
