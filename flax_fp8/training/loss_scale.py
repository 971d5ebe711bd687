"""Loss scaling for float16 that unscales the gradients of parameters but not FP8 state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.training import dynamic_scale
from jax import lax

from flax_fp8 import fields
from flax_fp8.linen.containers import leaves_with_path, map_with_path
from flax_fp8.linen.state import is_state
from flax_fp8.training.max_grad import require_loss, value_and_grad_as
from flax_fp8.training.state import refuse_pair

DynamicScaleResult = dynamic_scale.DynamicScaleResult


class DynamicScale(dynamic_scale.DynamicScale):
  """Flax's ``DynamicScale`` with support for FP8 state.

  The loss is multiplied by the scale before differentiation. Gradients are divided by the scale
  afterwards. The gradient of FP8 state is its new value, so it is not divided. A step is finite if
  all gradients of parameters are finite. After each step, the scale changes as follows::

      scale = min(scale * growth_factor, max(float32))  # after growth_interval + 1 finite steps
      scale = max(scale * backoff_factor, minimum_scale)  # after a nonfinite step

  Use it with ``TrainState.create(..., skip_nonfinite=True)``, which skips nonfinite steps.

  Attributes:
    growth_factor: factor by which the scale grows.
    backoff_factor: factor by which the scale shrinks.
    growth_interval: number of consecutive finite steps; the next finite step grows the scale, as
      in Flax.
    fin_steps: number of consecutive finite steps so far.
    scale: multiplier of the loss.
    minimum_scale: lower bound of the scale; None for no bound.

  Raises:
    TypeError: a factor is not a number, or ``growth_interval`` is not an integer.
    ValueError: a factor is not positive and finite, or ``growth_interval`` or ``minimum_scale`` is
      below 0.

  Numerics:
    ``scale`` and ``fin_steps`` equal those of Flax, bit for bit. The loss is scaled in float32 and
    returned unscaled. Return a float32 loss, because the first scale, 65536, is infinite in
    float16.

    FP8 state describes the *scaled* output gradients, so it follows the scale. When the scale
    doubles, output gradients double too. For one step, a delayed scale is then too small, and
    values above half of the old amax saturate. ``DelayedScaling(margin=1)`` has enough headroom for
    this step. ``DelayedScaling(overflow="current")`` detects the overflow.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
    >>> import flax_fp8 as fp8
    >>> model = nn.Dense(4, dtype=jnp.float16, dot_general_cls=fp8.Fp8DotGeneral)
    >>> x = jnp.ones((2, 4))
    >>> state = fp8.TrainState.create(
    ...   apply_fn=model.apply,
    ...   params=model.init(jax.random.key(0), x),
    ...   tx=optax.sgd(0.1),
    ...   skip_nonfinite=True,
    ... )
    >>> loss_fn = lambda v: jnp.mean(state.apply_fn(v, x).astype(jnp.float32) ** 2)
    >>> dynamic_scale = fp8.DynamicScale()
    >>> dynamic_scale, finite, loss, grads = dynamic_scale.value_and_grad(loss_fn)(state.params)
    >>> state = state.apply_gradients(grads=grads)
    >>> bool(finite), int(state.skipped_steps)
    (True, 0)

  References:
    flax.training.dynamic_scale.DynamicScale; Micikevicius et al., Mixed Precision Training,
    https://arxiv.org/abs/1710.03740, section 3.2.
  """

  def __post_init__(self) -> None:
    owner, default = "DynamicScale", "Omit it for the default."
    for field in ("growth_factor", "backoff_factor"):
      positive = lambda x: 0 < x < np.inf
      value = getattr(self, field)
      value = fields.number(owner, field, value, "a number above 0", positive, default)
      object.__setattr__(self, field, value)
    if self.minimum_scale is not None:
      rule, finite = "a number of at least 0, or None", lambda x: 0 <= x < np.inf
      least = fields.number(owner, "minimum_scale", self.minimum_scale, rule, finite, default)
      object.__setattr__(self, "minimum_scale", least)
    advice = "It counts steps; the default is 2000."
    interval = fields.integer(owner, "growth_interval", self.growth_interval, advice, least=0)
    object.__setattr__(self, "growth_interval", interval)

  def value_and_grad(
    self,
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    axis_name: str | None = None,
  ) -> Callable[..., DynamicScaleResult]:
    """Like ``flax_fp8.value_and_grad``, but differentiates the scaled loss and unscales gradients.

    Args:
      fun: function that returns a real scalar, or a pair if ``has_aux``.
      argnums: positional arguments to differentiate with respect to.
      has_aux: whether ``fun`` returns ``(value, aux)``.
      axis_name: axis of ``pmap`` or ``shard_map``. Gradients of parameters are averaged over this
        axis. FP8 state becomes the maximum over it.

    Returns:
      A function of the same arguments that returns ``(dynamic_scale, finite, aux, grad)``.
      ``dynamic_scale`` is for the next step. ``finite`` is whether all gradients of parameters are
      finite. ``aux`` is the value of ``fun``. In ``grad``, state is its new value.

    Raises:
      TypeError: as for ``flax_fp8.value_and_grad``.
      ValueError: as for ``flax_fp8.value_and_grad``.
    """
    owner = "DynamicScale.value_and_grad"
    fields.function(owner, "fun", fun, "Pass the loss, a function, not its value.")
    fields.flag(owner, "has_aux", has_aux)

    @functools.wraps(fun)
    def scaled(*args: Any) -> tuple[jax.Array, Any]:
      value = require_loss(owner, "fun", fun(*args), has_aux)
      loss = value[0] if has_aux else value
      return loss * jnp.asarray(self.scale, jnp.float32), value

    run = value_and_grad_as(owner, scaled, argnums, has_aux=True)

    def wrapped(*args: Any) -> DynamicScaleResult:
      (_, value), grads = run(*args)
      following, finite, grads = self.unscale(grads, axis_name)
      return DynamicScaleResult(following, finite, value, grads)

    return wrapped

  def unscale(
    self, grads: Any, axis_name: str | None = None
  ) -> tuple[DynamicScale, jax.Array, Any]:
    """Divides gradients by ``scale``, and updates the scale.

    Use it in a loop that differentiates ``dynamic_scale.scale * loss`` itself, for example with
    ``flax_fp8.accumulate_gradients``. ``value_and_grad`` calls it after
    ``flax_fp8.value_and_grad``.

    Args:
      grads: any pytree of gradients. Its state is every leaf under a key
        ``_overwrite_with_gradient``.
      axis_name: as for ``value_and_grad``.

    Returns:
      ``(dynamic_scale, finite, grads)``, as for ``value_and_grad``; gradients are float32.

    Raises:
      ValueError: ``grads`` is the pair that ``value_and_grad`` returns.
    """
    refuse_pair("DynamicScale.unscale", grads)
    grads = map_with_path(self._unscale_leaf, grads)
    if axis_name is not None:
      across = lambda path, leaf: (lax.pmax if is_state(path) else lax.pmean)(leaf, axis_name)
      grads = map_with_path(across, grads)
    finite = all_finite(grads)
    return self._after(finite), finite, grads

  def _unscale_leaf(self, path: Any, leaf: Any) -> jax.Array:
    return leaf if is_state(path) else jnp.asarray(leaf, jnp.float32) / self.scale

  def _after(self, finite: jax.Array) -> DynamicScale:
    """Returns the dynamic scale of the next step; a test compares it with Flax's."""
    grown = jnp.minimum(self.scale * self.growth_factor, np.finfo(np.float32).max)
    shrunk = self.scale * self.backoff_factor
    if self.minimum_scale is not None:
      shrunk = jnp.maximum(shrunk, self.minimum_scale)
    grows = self.fin_steps == self.growth_interval
    return self.replace(
      fin_steps=jnp.where(grows | ~finite, 0, self.fin_steps + 1),
      scale=jnp.where(finite, jnp.where(grows, grown, self.scale), shrunk),
    )


def all_finite(grads: Any) -> jax.Array:
  """Returns whether all gradients of parameters are finite; FP8 state is ignored.

  Args:
    grads: any pytree of gradients.

  Returns:
    bool scalar.
  """
  checks = [
    jnp.all(jnp.isfinite(leaf)) for path, leaf in leaves_with_path(grads) if not is_state(path)
  ]
  return functools.reduce(jnp.logical_and, checks, jnp.array(True))
