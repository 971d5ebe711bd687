"""One source of FP8's error alone: a BF16 product of operands that were rounded to E4M3.

The backward pass is BF16's with the rounded operands. Rounding itself passes gradients through.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
from jax import lax

from flax_fp8.formats import E4M3
from flax_fp8.quantize import current_scale, dequantize, quantize

Rounding = Literal["", "nearest", "stochastic"]  # "" does not round


def rounded(x: jax.Array, key: jax.Array | None) -> jax.Array:
  """Rounds to E4M3 with one scale for the tensor; the derivative is that of ``x``."""
  scale, inverse = current_scale(lax.stop_gradient(x), E4M3)
  q = quantize(lax.stop_gradient(x), scale, E4M3, inverse, key)
  return x + lax.stop_gradient(dequantize(q.data, q.scale, x.dtype) - x)


class RoundedDot(nn.Module):
  """``lax.dot_general`` of rounded operands, for ``dot_general_cls``; keys come from ``sr_rng``."""

  inputs: Rounding = ""
  kernels: Rounding = ""

  @nn.compact
  def __call__(self, lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    return lax.dot_general(
      self._round(lhs, self.inputs), self._round(rhs, self.kernels), *args, **kwargs
    )

  def _round(self, x: jax.Array, how: Rounding) -> jax.Array:
    if not how:
      return x
    return rounded(x, self.make_rng("sr_rng") if how == "stochastic" else None)
