"""Measures the effect of quantization on a tensor, as optional leaves of its state.

If a role's state holds ``amax``, ``saturated``, ``flushed``, ``noise`` and ``nonfinite``, their new
values are returned as their gradients, like all state. Otherwise nothing is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flax_fp8.amax import amax
from flax_fp8.contraction import View
from flax_fp8.formats import Float8
from flax_fp8.quantize import QTensor, dequantize, scale_from_amax
from flax_fp8.recipes.base import TensorState

METRICS = ("amax", "saturated", "flushed", "noise", "nonfinite")
# A value counts as saturated beyond this factor, which exceeds rounding of scales and products.
_SLACK = np.float32(1 + 2.0**-20)


def init_metrics() -> dict[str, np.ndarray]:
  """Returns the initial metrics of a tensor: zeros, float32 ``(1,)``."""
  return {name: np.zeros((1,), np.float32) for name in METRICS}


def split(state: Mapping[str, jax.Array]) -> tuple[TensorState, TensorState]:
  """Splits a role's state into the recipe's state and the metrics, ``{}`` if there are none.

  Both are new dicts with the same leaves.
  """
  metrics = {name: leaf for name, leaf in state.items() if name in METRICS}
  return {name: leaf for name, leaf in state.items() if name not in METRICS}, metrics


def measure(
  x: jax.Array, seen_as: Sequence[tuple[QTensor, View]], float8: Float8, state: TensorState
) -> TensorState:
  """Measures the effect of quantization on a tensor.

  ``nonfinite = count(x is not finite) / size(x)``. With ``x_hat = data * scale``, and over elements
  for which both ``x`` and ``x_hat`` are finite::

      amax = max(|x|)
      saturated = count(|x| > max(float8) * scale) / count(x)
      flushed = count(x != 0 and x_hat == 0) / count(x != 0)
      noise = sum((x - x_hat)**2) / sum(x**2)

  Args:
    x: the tensor; float32, bfloat16 or float16; any shape.
    seen_as: each quantized form of ``x``, in the layout of ``Recipe.in_matrices``, with its view.
      If there are several, each metric is the maximum over them.
    float8: the format.
    state: the old metrics. Their batching and sharding decide how far to reduce.

  Returns:
    The new metrics, float32 scalars; zeros for a tensor without elements.

  Numerics:
    Sums are float32 over values scaled to at most 1, which avoids underflow. Counts are exact up to
    ``2**32``. ``saturated`` ignores values that exceed the range by less than ``2**-20`` of it. If
    mapped axes or devices share the state, each metric is the maximum over the parts.
  """
  found = [_compare(view.matrices(x), q, float8) for q, view in seen_as]
  worst = jax.tree.map(lambda *values: jnp.max(jnp.stack(values)), *found)
  return {name: amax(value, state) for name, value in worst.items()}


def _compare(x: jax.Array, q: QTensor, float8: Float8) -> dict[str, jax.Array]:
  """Measures one quantized form of a tensor."""
  x, x_hat = x.astype(jnp.float32), dequantize(q.data, q.scale, jnp.float32)
  finite = jnp.isfinite(x)
  counted = finite & jnp.isfinite(x_hat)
  x, x_hat = jnp.where(counted, x, 0.0), jnp.where(counted, x_hat, 0.0)
  clamped = jnp.abs(q.data.astype(jnp.float32)) == jnp.float32(float8.max)
  saturated = clamped & (jnp.abs(x) > jnp.abs(x_hat) * _SLACK)
  nonzero = x != 0
  largest = jnp.max(jnp.abs(x), initial=0)
  _, to_one = scale_from_amax(largest, jnp.ones_like(largest), 1.0)
  power = lambda values: jnp.sum(jnp.square(values * to_one))
  return {
    "amax": largest,
    "saturated": _ratio(_count(saturated), _count(counted)),
    "flushed": _ratio(_count(nonzero & (x_hat == 0)), _count(nonzero)),
    "noise": _ratio(power(x - x_hat), power(x)),
    "nonfinite": _ratio(_count(~finite), jnp.float32(finite.size)),
  }


def _count(where: jax.Array) -> jax.Array:
  return jnp.sum(where, dtype=jnp.uint32).astype(jnp.float32)


def _ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
  return part / jnp.where(whole == 0, 1.0, whole)
