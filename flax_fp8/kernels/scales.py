"""The scales of delayed scaling, of several tensors in one kernel."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from flax_fp8 import _compat
from flax_fp8.kernels import choice
from flax_fp8.kernels.dispatch import kernel_unless_mapped
from flax_fp8.quantize import scale_from_amax

AmaxComputeAlgo = Literal["max", "most_recent"]
Scales: TypeAlias = tuple[tuple[jax.Array, jax.Array], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """How a scale follows from a history.

  Attributes:
    algo: "max" over the history, or its "most_recent" amax.
    margin: headroom in powers of two.
    power_of_two: rounds scales up to powers of two.
  """

  algo: AmaxComputeAlgo = "max"
  margin: float = 0
  power_of_two: bool = False


def next_scale(
  scale: jax.Array, history: jax.Array, float8_max: float, rule: Rule
) -> tuple[jax.Array, jax.Array]:
  """Computes the scale of this step from the history of the steps before it.

  ``scale_from_amax(max(history), fallback=scale)``

  Args:
    scale: of the step before; float32; shape ``()`` or ``(1,)``.
    history: float32; shape ``(length,)``.
    float8_max: largest value of the format that the scale is for.
    rule: which amax, and how much headroom.

  Returns:
    The scale and its inverse; float32; shape of ``scale``. The old scale where the history is
    empty.
  """
  largest = jnp.max(history, axis=0) if rule.algo == "max" else history[0]
  return _from_amax(jnp.broadcast_to(largest, scale.shape), scale, float8_max, rule)


def next_scales(
  scales: Sequence[jax.Array],
  histories: Sequence[jax.Array],
  float8_maxima: Sequence[float],
  rule: Rule,
) -> Scales:
  """Computes the scales of several tensors; on a GPU, where there are kernels, in one.

  ``next_scale`` of each.

  Args:
    scales: of the step before; float32 ``(1,)``.
    histories: float32 ``(length,)``.
    float8_maxima: largest values of the formats.
    rule: as for ``next_scale``.

  Returns:
    Scale and inverse of each; float32 ``(1,)``.
  """
  given = tuple(scales), tuple(histories)
  plain = _plain(tuple(float8_maxima), rule)
  if not choice.available() or len({*map(_compat.varying_axes, [*scales, *histories])}) > 1:
    return plain(*given)
  kernel = functools.partial(_by_kernel, float8_maxima=tuple(float8_maxima), rule=rule)
  is_mapped = lambda *_: ((True, True),) * len(scales)
  return kernel_unless_mapped(kernel, plain, is_mapped)(*given)


def _plain(float8_maxima: tuple[float, ...], rule: Rule) -> Callable[..., Scales]:
  def each(scales: tuple[jax.Array, ...], histories: tuple[jax.Array, ...]) -> Scales:
    tensors = zip(scales, histories, float8_maxima, strict=True)
    return tuple(next_scale(*tensor, rule) for tensor in tensors)

  return each


def _from_amax(
  amax: jax.Array, scale: jax.Array, float8_max: float, rule: Rule
) -> tuple[jax.Array, jax.Array]:
  return scale_from_amax(amax, scale, float8_max, rule.margin, rule.power_of_two)


# Traced once, so that XLA sees that two calls with the same operands are the same: a kernel's text
# names the lines it was traced from.
@functools.partial(jax.jit, static_argnames=("float8_maxima", "rule", "interpret"), inline=True)
def _by_kernel(
  scales: tuple[jax.Array, ...],
  histories: tuple[jax.Array, ...],
  *,
  float8_maxima: tuple[float, ...],
  rule: Rule,
  interpret: bool = False,
) -> Scales:
  """One kernel, of one program."""
  one = _compat.shape_like(scales[0], (1,), np.float32)
  call = pl.pallas_call(
    functools.partial(_kernel, float8_maxima=float8_maxima, rule=rule),
    out_shape=[one] * (2 * len(scales)),
    interpret=interpret,
    name="flax_fp8_scales",
    compiler_params=_compat.triton_parameters(num_warps=4, num_stages=1),
  )
  out: list[jax.Array] = call(*scales, *histories)
  return tuple(zip(out[::2], out[1::2], strict=True))


def _kernel(*refs: Any, float8_maxima: tuple[float, ...], rule: Rule) -> None:
  count = len(float8_maxima)
  scales, histories, out = refs[:count], refs[count : 2 * count], refs[2 * count :]
  for i, float8_max in enumerate(float8_maxima):
    amax = histories[i][0] if rule.algo == "most_recent" else _largest(histories[i])
    out[2 * i][0], out[2 * i + 1][0] = _from_amax(amax, scales[i][0], float8_max, rule)


def _largest(history: Any) -> jax.Array:
  """The largest slot of a history, NaN above all: as numbers, Triton's maximum forgets a NaN."""
  length = history.shape[0]
  slots = jnp.minimum(jnp.arange(pl.next_power_of_2(length)), length - 1)
  bits = lax.bitcast_convert_type(history[slots], jnp.int32) & np.int32(0x7FFFFFFF)
  return lax.bitcast_convert_type(jnp.max(bits), jnp.float32)
