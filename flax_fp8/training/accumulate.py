"""Gradient accumulation over microbatches that counts as one step of the FP8 state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_fp8 import fields, varying
from flax_fp8.linen.containers import leaves_with_path, map_with_path
from flax_fp8.linen.state import is_state
from flax_fp8.meta_dtype import to_float32
from flax_fp8.training.max_grad import collect, require_loss, value_and_cotangents
from flax_fp8.training.once import kernels_first

Reduction: TypeAlias = Literal["mean", "sum"]


def accumulate_gradients(
  loss_fn: Callable[[Any, Any], Any],
  variables: Any,
  microbatches: Any,
  has_aux: bool = False,
  reduction: Reduction = "mean",
  weights: Any = None,
) -> tuple[Any, Any]:
  """Computes the loss and gradients of a batch, one microbatch at a time.

  It computes the following in the memory of one microbatch::

      value_and_grad(lambda v: reduction([loss_fn(v, m) for m in microbatches]))(variables)

  A ``lax.scan`` adds the gradients. Kernels are quantized once, before the scan, for all
  microbatches. They stay in memory in FP8 during the scan, in one or two bytes per element.

  Gradients of parameters are averaged or summed. FP8 state takes the maximum. All microbatches use
  the old FP8 state. Together, they make one step of it: one slot of the amax histories. Call the
  optimizer once, with the returned gradients.

  ``optax.MultiSteps`` as ``tx`` of a ``TrainState`` is correct too. Then each microbatch is one
  call of ``apply_gradients`` and one step of the FP8 state, and ``amax_history_len`` counts
  microbatches.

  Args:
    loss_fn: ``loss_fn(variables, microbatch)`` returns a real scalar, or ``(loss, aux)``. Put all
      arrays of a batch into one pytree, such as ``(x, y)``.
    variables: variables dict or ``TrainState.params``, to differentiate with respect to.
    microbatches: pytree of arrays ``[microbatches, ...]``, not a list of microbatches. ``loss_fn``
      gets one slice of each array. PRNG keys are arrays too:
      ``{"x": x, "key": jax.random.split(key, n)}``.
    has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
    reduction: "mean" or "sum" of the losses of the microbatches. The mean of means is the mean
      over the batch if all microbatches have the same weight.
    weights: weight of each microbatch in the mean; shape ``[microbatches]``. With masked tokens,
      pass the number of tokens in each microbatch. The loss is then
      ``sum(weights * losses) / sum(weights)``. This equals one pass over the batch if ``loss_fn``
      returns the mean over its own tokens. Do not divide the returned gradients instead, because
      that also divides the FP8 state in them.

  Returns:
    ``(loss, gradients)``, or ``((loss, aux), gradients)`` with ``aux`` stacked to
    ``[microbatches, ...]``. In the gradients, state is its new value in float32. State that no
    microbatch used is its old value.

  Raises:
    ValueError: ``microbatches`` is a list, is empty, or its leaves have no common leading axis;
      ``reduction`` is unknown; or ``weights`` are not one real number per microbatch, or are given
      for a sum.
    TypeError: ``loss_fn`` is not a function, or does not return a real scalar or a pair; or the
      conditions of ``value_and_grad``.

  Numerics:
    Each loss is multiplied by its weight in the mean before differentiation. So output gradients
    and their amaxes have the same magnitude as in one pass over the batch. Gradients accumulate in
    float32 or wider, and are rounded to the dtype of the parameter at the end. Scales and histories
    do not depend on the order or the number of microbatches. With ``reduction="mean"``, this is
    exact if the number of microbatches is a power of two.

    A microbatch of weight 0 adds nothing to loss and gradients, even if its mean over no tokens is
    NaN. Inside ``shard_map``, the weights are those of one device. To weight across devices, use
    ``reduction="sum"`` and divide in ``loss_fn`` by a ``psum`` of the tokens.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> layer = nn.Dense(4, dot_general_cls=fp8.Fp8DotGeneral)
    >>> microbatches = jnp.stack([jnp.ones((2, 4)), 3 * jnp.ones((2, 4)), jnp.zeros((2, 4))])
    >>> variables = layer.init(jax.random.key(0), microbatches[0])
    >>> loss_fn = lambda variables, x: jnp.mean(layer.apply(variables, x))
    >>> loss, grads = fp8.accumulate_gradients(loss_fn, variables, microbatches)
    >>> grads["_overwrite_with_gradient"]["Fp8DotGeneral_0"]["input_amax_history"][:2]
    Array([3., 0.], dtype=float32)

  References:
    optax.MultiSteps; haliax.quantization, for accumulation by maximum.
  """
  owner = "accumulate_gradients"
  fields.function(owner, "loss_fn", loss_fn, "Pass loss_fn(variables, microbatch).")
  is_array = isinstance(has_aux, jax.Array | np.ndarray)
  advice = "Put all arrays into microbatches, as in (x, y)." if is_array else "Pass a bool."
  fields.flag(owner, "has_aux", has_aux, advice)
  fields.choice(owner, "reduction", reduction, get_args(Reduction))
  count = _count(microbatches)
  shares = None if weights is None else _shares(weights, count, reduction)
  equal_share = 1 / count if reduction == "mean" else 1.0

  def shared(variables: Any, item: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
    microbatch, share = item
    value = require_loss(owner, "loss_fn", loss_fn(variables, microbatch), has_aux)
    loss, aux = value if has_aux else (value, None)
    return loss * (equal_share if share is None else share), (loss, aux)

  run = value_and_cotangents(shared, has_aux=True, owner=owner)

  # jit, so that JAX's debug modes do not see the -inf of unused state in eager mode.
  @functools.partial(jax.jit, inline=True)
  def run_all(variables: Any, items: Any) -> tuple[jax.Array, Any, Any]:
    run_one = functools.partial(run, variables)
    if count > 1:
      run_one = kernels_first(run, variables, jax.tree.map(lambda leaf: leaf[0], items))

    def step(total: Any, item: Any) -> tuple[Any, tuple[jax.Array, Any]]:
      (_, seen), cotangents = run_one(item)
      return map_with_path(functools.partial(_add, share=item[1]), total, cotangents), seen

    total, (losses, aux) = lax.scan(step, map_with_path(_nothing, variables), items)
    rounded = map_with_path(_round, total, variables)
    return _reduce(losses, reduction, items[1]), aux, collect(rounded, variables)

  loss, aux, grads = run_all(variables, (microbatches, shares))
  return ((loss, aux) if has_aux else loss), grads


def _reduce(losses: jax.Array, reduction: str, shares: jax.Array | None) -> jax.Array:
  if shares is not None:
    return jnp.sum(jnp.where(shares == 0, 0, losses * shares)).astype(losses.dtype)
  return jnp.mean(losses) if reduction == "mean" else jnp.sum(losses)


def _count(microbatches: Any) -> int:
  if type(microbatches) is list and microbatches:
    raise ValueError(
      "accumulate_gradients: microbatches must be arrays stacked along a leading axis, not a list "
      f"of microbatches; got {len(microbatches)} elements, the first "
      f"{fields.show(microbatches[0])}. Pass jax.tree.map(lambda *x: jnp.stack(x), *microbatches), "
      "or a tuple of stacked arrays."
    )
  shapes = {
    jax.tree_util.keystr(path) or "microbatches": np.shape(leaf)
    for path, leaf in leaves_with_path(microbatches)
  }
  counts = {shape[:1] for shape in shapes.values()}
  if len(counts) != 1 or not all(counts) or counts == {(0,)}:
    raise ValueError(
      "accumulate_gradients: the leaves of microbatches must have one leading axis in common, the "
      f"number of microbatches, at least 1; got shapes {fields.cut(shapes)}. Reshape arrays to "
      "(microbatches, batch // microbatches, ...), and split keys with "
      "jax.random.split(key, microbatches)."
    )
  return counts.pop()[0]


def _shares(weights: Any, count: int, reduction: str) -> jax.Array:
  """Returns the share of each microbatch in the mean: ``weights / sum(weights)``."""
  shape, dtype = jnp.shape(weights), jnp.result_type(weights)
  if shape != (count,) or jnp.issubdtype(dtype, jnp.complexfloating) or reduction != "mean":
    raise ValueError(
      "accumulate_gradients: weights must be one real number per microbatch, with "
      f"reduction='mean'; got weights of shape {shape} and dtype {dtype} for {count} microbatches, "
      f"and {reduction=}. Pass the number of tokens of each microbatch, shape (microbatches,), or "
      "omit weights for a sum."
    )
  weights = jnp.asarray(weights, float)
  total = jnp.sum(weights)
  return jnp.where(weights == 0, 0, weights / jnp.where(total == 0, 1, total))


def _wide(leaf: Any) -> Any:
  return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


def _nothing(path: Any, leaf: Any) -> jax.Array:
  """Returns the initial value of a sum, or of a maximum if ``leaf`` is state."""
  like = to_float32(leaf) if is_state(path) else leaf
  empty = jnp.full_like(like, -jnp.inf if is_state(path) else 0, dtype=_wide(like))
  return varying.vary_as(empty, like)


def _add(path: Any, total: jax.Array, cotangent: jax.Array, share: jax.Array | None) -> jax.Array:
  if is_state(path):
    return lax.max(total, to_float32(cotangent))
  if share is not None:  # a mean over no tokens may be NaN
    cotangent = jnp.where(share == 0, 0, cotangent)
  return total + cotangent.astype(total.dtype)


def _round(path: Any, total: jax.Array, leaf: Any) -> jax.Array:
  return total if is_state(path) else total.astype(jnp.result_type(leaf))
