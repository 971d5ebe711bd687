"""Products of quantized tensors in plain JAX, one function for each granularity of scales.

Each function takes the data and scales of two operands and returns the GEMM's result. A
hand-written GPU kernel would replace the body of one function and nothing else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from flax_fp8 import varying
from flax_fp8.contraction import Gemm, View
from flax_fp8.fp8_dot import at_least, fp8_dot, is_fp8_gemm
from flax_fp8.platforms import by_platform, in_rows
from flax_fp8.quantize import QTensor, dequantize, dequantize_product, product

Product: TypeAlias = Callable[[QTensor, QTensor], jax.Array]

# Number of elements of a product that keeps all cores of a GPU busy. For smaller products, XLA may
# split the contracted axis and add the parts in a separate kernel, which also applies the scale.
_LARGE = 2**21


def dot_high_precision(lhs: jax.Array, rhs: jax.Array, gemm: Gemm, dtype: Any) -> jax.Array:
  """Multiplies two tensors that are not quantized.

  ``transpose(dot_general(lhs, rhs))`` in the promoted dtype of the operands.

  Args:
    lhs: left operand; float32, bfloat16 or float16.
    rhs: right operand; float32, bfloat16 or float16.
    gemm: dimension numbers, and the transposition of the result.
    dtype: dtype of the result.

  Returns:
    The product in ``dtype``.
  """
  both = jnp.promote_types(lhs.dtype, rhs.dtype)
  operands = lhs.astype(both), rhs.astype(both)
  out = lax.dot_general(*operands, gemm.dimension_numbers, out_sharding=gemm.dot_sharding)
  return lax.transpose(out, gemm.permutation).astype(dtype)


def scaled_matrices(q: QTensor, view: View) -> QTensor:
  """Returns a tensor with per-tensor or rowwise scales in the layout that a GEMM sees.

  Args:
    q: data of the tensor's shape; scale of shape ``()``, or of the data's rank with some sizes 1.
    view: the GEMM's view of the tensor.

  Returns:
    Data and scales, both ``[batch, kept, contracted]``.
  """
  scale = jnp.broadcast_to(q.scale, q.data.shape)
  return QTensor(view.matrices(q.data), view.matrices(scale))


def dot_per_tensor(
  lhs: QTensor,
  rhs: QTensor,
  gemm: Gemm,
  dtype: Any,
  *,
  fast_accumulation: bool,
  shared: int | None = None,
  scales_at_once: bool = False,
) -> jax.Array:
  """Multiplies two tensors that have one scale each.

  ``transpose(dot_general(lhs.data, rhs.data)) * (lhs.scale * rhs.scale)``. In this order the
  transposition is next to the GEMM, and the compiler can fuse it into the GEMM.

  On an NVIDIA GPU, the result type of a large bfloat16 product is bfloat16. XLA then emits one FP8
  GEMM that applies the scale in float32 before it rounds. With a float32 result type, the product
  would be written, read again, and summed over devices in float32.

  Args:
    lhs: left operand; its scale has shape ``()``.
    rhs: right operand; its scale has shape ``()``.
    gemm: dimension numbers, and the transposition of the result.
    dtype: dtype of the result.
    fast_accumulation: allows faster partial sums in less than float32 (about 14 bits on Hopper).
      Other hardware ignores this setting.
    shared: the operand, 0 or 1, that other products may share. XLA would merge GEMMs that share an
      operand, but the merged GEMM can't have one scale. This operand is hidden from that pass.
    scales_at_once: multiplies by the product of both scales on a CPU too, as flax.linen.fp8_ops
      does. If False, a CPU uses ``dequantize_product``.

  Returns:
    The product in ``dtype``.

  Numerics:
    The sums are scaled in float32 (``dequantize_product``) and rounded once, to ``dtype``. For a
    large bfloat16 product on a GPU, sums and scale are first rounded to bfloat16 in three cases:
    with ``--xla_allow_excess_precision=false``; if one device's share is so small that XLA splits
    the contracted axis; and if XLA shards the program and makes the result column-major.
  """
  dims, sharding = gemm.dimension_numbers, gemm.dot_sharding
  is_large = at_least(math.prod(gemm.shape), _LARGE)

  def scaled_after(lhs: QTensor, rhs: QTensor) -> jax.Array:
    out = fp8_dot(lhs.data, rhs.data, dims, jnp.float32, fast_accumulation, sharding)
    out = lax.transpose(out, gemm.permutation)
    if scales_at_once:
      return dequantize(out, product(lhs.scale, rhs.scale), dtype)
    return dequantize_product(out, lhs.scale, rhs.scale, dtype)

  def scaled_within(lhs: QTensor, rhs: QTensor) -> jax.Array:
    both = product(lhs.scale, rhs.scale)
    left, right, scale = _set_apart(lhs.data, rhs.data, both, shared)
    out = _dot_transposed(left, right, gemm, dtype, fast_accumulation) * scale.astype(dtype)
    # With a column-major result, XLA would put a transposition between the GEMM and the scale.
    return in_rows(out)

  def cuda(lhs: QTensor, rhs: QTensor) -> jax.Array:
    if is_large:
      return scaled_within(lhs, rhs)
    hidden = [
      QTensor(lax.optimization_barrier(q.data), q.scale) if index == shared else q
      for index, q in enumerate((lhs, rhs))
    ]
    return scaled_after(*hidden)

  if dtype != jnp.bfloat16 or not is_fp8_gemm(lhs.data, rhs.data, dims):
    return scaled_after(lhs, rhs)

  either = functools.partial(by_platform, cuda=cuda, default=scaled_after)
  return _unless_scales_are_mapped(either, scaled_after)(lhs, rhs)


def _set_apart(
  lhs: jax.Array, rhs: jax.Array, scale: jax.Array, shared: int | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Hides from XLA that another product shares an operand.

  The barrier also keeps reshapes away from the scale's cast. They would make XLA keep its rounding.
  """
  if shared == 0:
    lhs, scale = lax.optimization_barrier((lhs, scale))
  elif shared == 1:
    rhs, scale = lax.optimization_barrier((rhs, scale))
  else:
    scale = lax.optimization_barrier(scale)
  return lhs, rhs, scale


def _unless_scales_are_mapped(multiply: Product, otherwise: Product) -> Product:
  """Makes a product that uses ``otherwise`` under a vmap that maps a scale.

  A batched GEMM, as for several experts, takes one scale for the whole batch.
  """

  @custom_vmap
  def either(lhs: QTensor, rhs: QTensor) -> jax.Array:
    return multiply(lhs, rhs)

  @either.def_vmap
  def rule(axis_size: int, in_batched: Any, lhs: QTensor, rhs: QTensor) -> tuple[jax.Array, bool]:
    axes = jax.tree.map(lambda is_mapped: 0 if is_mapped else None, tuple(in_batched))
    over = lambda product: jax.vmap(product, axes, axis_size=axis_size)
    if any(q.scale for q in in_batched):
      return over(otherwise)(lhs, rhs), True
    return _unless_scales_are_mapped(over(multiply), over(otherwise))(lhs, rhs), True

  return either


def dot_per_row(
  lhs: QTensor, rhs: QTensor, gemm: Gemm, dtype: Any, *, fast_accumulation: bool
) -> jax.Array:
  """Multiplies two tensors that have a scale for each row that the GEMM contracts.

  ``transpose(dot_general(lhs.data, rhs.data) * outer(lhs.scale, rhs.scale))``. The scales are
  applied after the GEMM. Before the GEMM, they would turn its operands into a wider type.

  Args:
    lhs: left operand. The scale has the operand's rank and size 1 along the contracted axes.
    rhs: right operand; same layout as ``lhs``.
    gemm: dimension numbers, and the transposition of the result.
    dtype: dtype of the result.
    fast_accumulation: as for ``dot_per_tensor``.

  Returns:
    The product in ``dtype``.

  Numerics:
    Sums are scaled in float32 and rounded to ``dtype``. Those of a large bfloat16 product are
    rounded before that too. With scales that are powers of two, this changes no result.
  """
  dims, sharding = gemm.dimension_numbers, gemm.dot_sharding
  is_large = at_least(math.prod(gemm.shape), _LARGE)
  sums = dtype if is_large and dtype == jnp.bfloat16 else jnp.float32  # float16 might overflow
  out = fp8_dot(lhs.data, rhs.data, dims, sums, fast_accumulation, sharding)
  n_batch, n_lhs = len(gemm.lhs.batch), len(gemm.lhs.kept)
  lhs_axes = tuple(range(n_batch + n_lhs))
  rhs_axes = (*range(n_batch), *range(n_batch + n_lhs, out.ndim))
  along = lambda scale, axes: lax.broadcast_in_dim(scale, out.shape, axes, out_sharding=sharding)
  lhs_scale = along(_without_contracted(lhs.scale, gemm.lhs), lhs_axes)
  rhs_scale = along(_without_contracted(rhs.scale, gemm.rhs), rhs_axes)
  scaled = dequantize_product(out, lhs_scale, rhs_scale, dtype)
  return lax.transpose(scaled, gemm.permutation)


def _dot_transposed(
  lhs: jax.Array, rhs: jax.Array, gemm: Gemm, dtype: Any, fast_accumulation: bool
) -> jax.Array:
  """``transpose(dot_general(lhs, rhs))``. Swaps the operands if that avoids the transposition."""
  dims = gemm.dimension_numbers
  if gemm.is_exchanged:
    (lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch) = dims
    dims = ((rhs_contracting, lhs_contracting), (rhs_batch, lhs_batch))
    return fp8_dot(rhs, lhs, dims, dtype, fast_accumulation, gemm.sharding)
  out = fp8_dot(lhs, rhs, dims, dtype, fast_accumulation, gemm.dot_sharding)
  return lax.transpose(out, gemm.permutation)


def _without_contracted(scale: jax.Array, view: View) -> jax.Array:
  ordered = lax.transpose(scale, view.batch + view.kept + view.contracting)
  return lax.squeeze(ordered, range(len(view.batch + view.kept), scale.ndim))


def dot_microscaled(lhs: QTensor, rhs: QTensor, dtype: Any) -> jax.Array:
  """Multiplies two stacks of matrices with E8M0 scales for blocks along the contracted axis.

  ``einsum("bmk,bnk->bmn", lhs.data * repeat(lhs.scale), rhs.data * repeat(rhs.scale))``

  On a GPU this calls ``jax.nn.scaled_matmul``. Matrix units that apply block scales compute it:
  NVIDIA GPUs from Blackwell, and AMD gfx95x. On other platforms the dequantized values are
  multiplied in bfloat16, which represents them exactly.

  Args:
    lhs: data ``[batch, M, K]``; scale ``[batch, M, K / block]``, float8_e8m0fnu.
    rhs: data ``[batch, N, K]``; scale ``[batch, N, K / block]``, float8_e8m0fnu.
    dtype: dtype of the result. Sums are float32.

  Returns:
    ``[batch, M, N]`` in ``dtype``.
  """
  if not lhs.data.size or not rhs.data.size:
    return jnp.zeros((lhs.data.shape[0], lhs.data.shape[1], rhs.data.shape[1]), dtype)
  return _microscaled(dtype)(lhs, rhs)


@functools.cache
def _microscaled(dtype: Any) -> Callable[[QTensor, QTensor], jax.Array]:
  """Makes the product for a dtype. JAX's own supports vmap only if it maps both operands."""

  def native(lhs: QTensor, rhs: QTensor) -> jax.Array:
    operands = (lhs.data, rhs.data, lhs.scale, rhs.scale)
    out = jax.nn.scaled_matmul(*operands, preferred_element_type=dtype)
    return varying.vary_as(out, *operands)

  def plain(lhs: QTensor, rhs: QTensor) -> jax.Array:
    operands = _dequantize_microscaled(lhs), _dequantize_microscaled(rhs)
    dims = (((2,), (2,)), ((0,), (0,)))
    out = lax.dot_general(*operands, dims, preferred_element_type=jnp.float32)
    return out.astype(dtype)

  @custom_vmap
  def multiply(lhs: QTensor, rhs: QTensor) -> jax.Array:
    return lax.platform_dependent(lhs, rhs, cuda=native, rocm=native, default=plain)

  @multiply.def_vmap
  def rule(axis_size: int, in_batched: Any, lhs: QTensor, rhs: QTensor) -> tuple[jax.Array, bool]:
    if axis_size == 0:
      batch, m = lhs.data.shape[-3:-1]
      return jnp.zeros((0, batch, m, rhs.data.shape[-2]), dtype), True
    lhs, lhs_mapped = _map_alike(lhs, in_batched[0], axis_size)
    rhs, rhs_mapped = _map_alike(rhs, in_batched[1], axis_size)
    if lhs_mapped and rhs_mapped:
      out = multiply(*jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (lhs, rhs)))
      return out.reshape(-1, lhs.data.shape[1], *out.shape[1:]), True
    mapped = lhs if lhs_mapped else rhs
    stacked = jax.tree.map(_stack_rows, mapped)  # multiplies the unmapped operand once
    out = multiply(stacked, rhs) if lhs_mapped else multiply(lhs, stacked)
    size, batch, rows = mapped.data.shape[:3]
    if lhs_mapped:
      return jnp.moveaxis(out.reshape(batch, size, rows, -1), 1, 0), True
    return jnp.moveaxis(out.reshape(batch, out.shape[1], size, rows), 2, 0), True

  return multiply


def _map_alike(x: QTensor, mapped: QTensor, size: int) -> tuple[QTensor, bool]:
  """Maps both data and scale if one is mapped. Stochastic rounding with mapped keys maps data."""
  if mapped.data == mapped.scale:
    return x, bool(mapped.data)
  widen = lambda leaf: jnp.broadcast_to(leaf, (size, *leaf.shape))
  return jax.tree.map(lambda leaf, own: leaf if own else widen(leaf), x, mapped), True


def _stack_rows(mapped: jax.Array) -> jax.Array:
  """``[mapped, batch, rows, K]`` to ``[batch, mapped * rows, K]``."""
  return jnp.moveaxis(mapped, 0, 1).reshape(mapped.shape[1], -1, mapped.shape[3])


def _dequantize_microscaled(x: QTensor) -> jax.Array:
  block = x.data.shape[-1] // x.scale.shape[-1]
  repeated = jnp.repeat(x.scale.astype(jnp.float32), block, axis=-1)
  values = dequantize(x.data, repeated, jnp.bfloat16)
  # A value near the end of float32's range may round up to 2**128, which overflows.
  return jnp.clip(values, jnp.finfo(jnp.bfloat16).min, jnp.finfo(jnp.bfloat16).max)
