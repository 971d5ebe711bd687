"""Contractions whose kernel was quantised once, for inference: nothing is updated.

What the forward pass of ``ops.dot_general`` and ``ops.einsum`` does, bit for bit, in two parts: the
kernel's, which is done once, and the input's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from flax_fp8 import contraction
from flax_fp8.contraction import DimensionNumbers, Gemm, View, plan_einsum
from flax_fp8.ops import check
from flax_fp8.ops.dot_general import State
from flax_fp8.products import dot_high_precision
from flax_fp8.quantize import QTensor
from flax_fp8.recipes.base import GemmKind, Recipe, Role
from flax_fp8.sharding import transposed

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contraction:
  """A contraction of an input with a kernel, the operands' shapes left open.

  Attributes:
    dimension_numbers: of the GEMM.
    kernel: the operand, 0 or 1, that is the kernel.
    reductions: einsum equations for what precedes the GEMM, of the input and of the kernel.
    permutation: transposition of the GEMM's result.
  """

  dimension_numbers: DimensionNumbers
  kernel: int = 1
  reductions: tuple[str, str] = ("...->...", "...->...")
  permutation: Shape | None = None

  @classmethod
  def of_dot_general(cls, lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any) -> Contraction:
    """The contraction that ``lax.dot_general`` makes; ``rhs`` is the kernel."""
    numbers = check.dimension_numbers("dot_general", dimension_numbers, lhs, rhs)
    return cls(dimension_numbers=numbers)

  @classmethod
  def of_einsum(cls, lhs: jax.Array, rhs: jax.Array, equation: str) -> Contraction:
    """The contraction that ``jnp.einsum`` makes; ``rhs`` is the kernel."""
    plan = plan_einsum(equation, lhs.shape, rhs.shape)
    return cls(
      dimension_numbers=plan.dimension_numbers,
      kernel=0 if plan.swap else 1,
      reductions=(plan.lhs_reduction, plan.rhs_reduction),
      permutation=plan.permutation,
    )

  def quantize_kernel(
    self, kernel: jax.Array, input_shape: Shape, *, recipe: Recipe, state: State
  ) -> QTensor:
    """Quantises a kernel for the forward GEMM.

    Args:
      kernel: float32, bfloat16 or float16, in the dtype in which it would be multiplied.
      input_shape: of an input.
      recipe: how to scale.
      state: of the contraction.

    Returns:
      Data and scale as the recipe lays them out; but data of the kernel's own shape with the
      contracted axes last, the only order that FP8 GEMMs of NVIDIA GPUs before Blackwell read.
    """
    x = jax.ShapeDtypeStruct(input_shape, kernel.dtype)
    x, kernel = jax.eval_shape(lambda x: jnp.einsum(self.reductions[0], x), x), self._reduce(kernel)
    views = self._views(x.shape, kernel.shape)[self.kernel]
    (q, _), _ = recipe.quantize(kernel, state.get("kernel", {}), Role.KERNEL, views, None)
    return QTensor(lax.transpose(q.data, _order(views[0])), q.scale) if _is_plain(q) else q

  def contract(
    self,
    x: jax.Array,
    kernel: QTensor,
    like: jax.Array,
    *,
    recipe: Recipe,
    state: State,
    dtype: Any,
    out_sharding: Any = None,
  ) -> jax.Array:
    """Contracts an input with a quantised kernel.

    Args:
      x: the input; float32, bfloat16 or float16.
      kernel: as ``quantize_kernel`` returned it.
      like: an array of the kernel's shape before that; its values are not read.
      recipe: how to scale the input.
      state: of the contraction.
      dtype: of the result.
      out_sharding: of the result, as for ``ops.dot_general``.

    Returns:
      The product; shape as of the JAX function.
    """
    x = jnp.einsum(self.reductions[0], x)
    kernel_shape = jax.eval_shape(self._reduce, like).shape
    views = self._views(x.shape, kernel_shape)[1 - self.kernel]
    (q, _), _ = recipe.quantize(x, state.get("input", {}), Role.INPUT, views, None)
    if _is_plain(kernel):
      order = _order(self._views(x.shape, kernel_shape)[self.kernel][0])
      kernel = QTensor(lax.transpose(kernel.data, np.argsort(order).tolist()), kernel.scale)
    operands = (kernel, q) if self.kernel == 0 else (q, kernel)
    gemm = contraction.forward_gemm(
      self.dimension_numbers, *self._shapes(x.shape, kernel_shape), kernel=self.kernel
    )
    gemm = gemm.sharded(self._sharding(gemm, out_sharding))
    out = recipe.contract(*operands, gemm, GemmKind.FPROP, jnp.dtype(dtype))
    return out if self.permutation is None else lax.transpose(out, self.permutation)

  def contract_as_is(
    self, x: jax.Array, kernel: jax.Array, *, dtype: Any, out_sharding: Any = None
  ) -> jax.Array:
    """Contracts in the dtype of the operands, where the recipe leaves the forward GEMM in it."""
    x, kernel = jnp.einsum(self.reductions[0], x), self._reduce(kernel)
    operands = (kernel, x) if self.kernel == 0 else (x, kernel)
    shapes = self._shapes(x.shape, kernel.shape)
    gemm = contraction.forward_gemm(self.dimension_numbers, *shapes, kernel=self.kernel)
    gemm = gemm.sharded(self._sharding(gemm, out_sharding))
    out = dot_high_precision(*operands, gemm, dtype)
    return out if self.permutation is None else lax.transpose(out, self.permutation)

  def _reduce(self, kernel: jax.Array) -> jax.Array:
    return jnp.einsum(self.reductions[1], kernel)

  def _sharding(self, gemm: Gemm, out_sharding: Any) -> NamedSharding | None:
    """Returns the sharding of the GEMM's result, where one was asked for."""
    sharding = check.canonical_sharding("freeze_for_inference", out_sharding, len(gemm.shape))
    order = range(len(gemm.shape)) if self.permutation is None else self.permutation
    return transposed(sharding, np.argsort(order).tolist())

  def _shapes(self, x: Shape, kernel: Shape) -> tuple[Shape, Shape]:
    return (kernel, x) if self.kernel == 0 else (x, kernel)

  def _views(self, x: Shape, kernel: Shape) -> tuple[tuple[View, View], tuple[View, View]]:
    """Returns how the forward and a backward GEMM see the left operand, and the right one."""
    shapes = self._shapes(x, kernel)
    gemm = contraction.forward_gemm(self.dimension_numbers, *shapes, kernel=self.kernel)
    to_lhs, to_rhs = contraction.backward_gemms(self.dimension_numbers, *shapes)
    return (gemm.lhs, to_rhs.rhs), (gemm.rhs, to_lhs.rhs)


def _is_plain(q: QTensor) -> bool:
  """Tells whether data has the axes of the tensor, not blocks of its own."""
  return q.scale.dtype == jnp.float32 and q.scale.ndim in (0, q.data.ndim)


def _order(view: View) -> Shape:
  return view.batch + view.kept + view.contracting
