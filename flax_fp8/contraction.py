"""Dimension-number algebra: the two GEMMs of a backward pass, and einsum equations as GEMMs."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

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
  lhs: QTensor, rhs: QTensor, dimension_numbers: DimensionNumbers, *, fast_accumulation: bool
) -> jax.Array:
  """Multiplies two tensors that have one scale each.

  ``dot_general(lhs.data, rhs.data) * (lhs.scale * rhs.scale)``

  Args:
    lhs: left operand, scale of shape ``()``.
    rhs: right operand, scale of shape ``()``.
    dimension_numbers: of ``lax.dot_general``.
    fast_accumulation: lets the tensor core keep partial sums in less than float32 (Hopper keeps
      about 14 bits), which is faster. On other hardware it changes nothing.

  Returns:
    The product in float32.
  """
  precision = lax.Precision.DEFAULT if fast_accumulation else lax.Precision.HIGHEST
  out = lax.dot_general(
    lhs.data,
    rhs.data,
    dimension_numbers,
    precision=precision,
    preferred_element_type=jnp.float32,
  )
  return dequantize(out, product(lhs.scale, rhs.scale), jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EinsumPlan:
  """An einsum over two operands, taken apart.

  Attributes:
    lhs_reduction: unary equation that takes diagonals and sums of the left operand.
    rhs_reduction: the same for the right operand.
    dimension_numbers: of the GEMM between what is left of them.
    permutation: transposition of the GEMM's result.
  """

  lhs_reduction: str
  rhs_reduction: str
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
  lhs_left = [c for c in lhs_sizes if c in rhs_sizes or c in out]
  rhs_left = [c for c in rhs_sizes if c in lhs_sizes or c in out]
  batch = [c for c in out if c in lhs_left and c in rhs_left]
  summed = sorted(c for c in lhs_left if c in rhs_left and c not in out)
  result = batch + [c for c in lhs_left if c not in rhs_left]
  result += [c for c in rhs_left if c not in lhs_left]
  find = lambda labels, wanted: tuple(labels.index(c) for c in wanted)
  return EinsumPlan(
    lhs_reduction=f"{lhs}->{''.join(lhs_left)}",
    rhs_reduction=f"{rhs}->{''.join(rhs_left)}",
    dimension_numbers=(
      (find(lhs_left, summed), find(rhs_left, summed)),
      (find(lhs_left, batch), find(rhs_left, batch)),
    ),
    permutation=find(result, out),
  )


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
