"""Calibration: fills histories and scales from a few batches before FP8 training starts.

Recipes record amaxes while the model computes in the dtype of its operands, not in FP8. At scale 1,
E5M2 flushes a gradient of 1e-7 to zero, and all earlier layers would record gradients of zero.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, TypeAlias

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress

from flax_fp8 import fields
from flax_fp8.linen.arguments import require_module, require_variables
from flax_fp8.linen.containers import like, map_with_path, plain
from flax_fp8.linen.state import OVERWRITE_WITH_GRADIENT, require_float32_state
from flax_fp8.ops.calibration import Calibration, calibrating
from flax_fp8.recipes.base import Role
from flax_fp8.training.max_grad import is_real_scalar, value_and_grad
from flax_fp8.training.metrics import NAMES, add_metrics, select
from flax_fp8.training.state import merge, partition_for_grad_overwrite
from flax_fp8.training.stats import stats

Loss: TypeAlias = Callable[[Any, Any], Any]
_NOT_FORWARD = f"{Role.OUTPUT_GRAD.value}_"


def calibrate(
  module: nn.Module,
  variables: Any,
  batches: Iterable[Any],
  loss_fn: Loss | None = None,
  *,
  rngs: Any = None,
  percentile: float | None = None,
  progress: bool = True,
) -> Any:
  """Fills the histories and scales of a model from a few batches, without training it.

  For each batch, every FP8 contraction computes in the dtype of its operands. Its recipe records
  the amax of each tensor as in training. At the end, the scales are set for the next step::

      h = roll(h, -1); h[0] = max(|x|)      # for each batch; h: the history, slot 0 is the newest
      scale = max(h) / fp8_max * 2**margin  # once, by the rule of the recipe

  Without ``loss_fn``, only the forward pass runs, and only inputs and kernels are calibrated. This
  is enough to evaluate a model. With ``loss_fn``, output gradients are calibrated too, so the first
  training step flushes none of them.

  Args:
    module: the FP8 model.
    variables: its variables dict, or ``TrainState.params``.
    batches: a few batches. Without ``loss_fn``, each batch is the argument of ``module.apply``
      after the variables, or a tuple of arguments. Arrays are traced. Everything else is static.
    loss_fn: ``loss_fn(variables, batch)`` returns a scalar: the training loss, with the loss scale
      of training.
    rngs: PRNG keys for ``module.apply``, only without ``loss_fn``. All batches use the same keys.
    percentile: in (0, 100]. Records this percentile of the magnitudes of each tensor instead of
      their maximum. Rare outliers then saturate instead of widening the range.
    progress: shows a progress bar on the standard error stream.

  Returns:
    ``variables`` with new FP8 state and nothing else changed. A model without state has nothing to
    fill. For such a model, the ``Stats`` of its metrics, with the worst value over all batches.

  Raises:
    TypeError: ``module`` is not a Linen module; ``batches`` is not an iterable of batches (an
      array is not); ``loss_fn`` is not a function; ``percentile`` is not a number; or the state in
      ``variables`` was cast from float32 to another dtype.
    ValueError: ``batches`` is empty; ``percentile`` is outside (0, 100]; ``variables`` is not a
      variables dict; ``loss_fn`` does not return a real scalar; or both ``loss_fn`` and ``rngs``
      are given. For a model without state: ``percentile`` is given, or ``loss_fn`` is given and
      ``variables`` has no metrics (see ``add_metrics``).

  Numerics:
    A batch is not recorded if its loss is infinite or NaN, or if the gradient of a parameter has a
    NaN. Without ``loss_fn``, it is not recorded if its output has a NaN. A warning gives the number
    of such batches.

    Without ``loss_fn``, the state of output gradients keeps its value. So does the state of layers
    behind a ``stop_gradient``.

    A percentile is computed for each array that a contraction sees. The maximum over devices or
    mapped copies is recorded.

    If a model with state also has metrics, they describe the last batch in FP8 at the new scales.
    This compiles another program, so it is faster to call ``add_metrics`` afterwards.

    Variables that the model updates, such as ``batch_stats``, keep their values. The deprecated
    ``fp8_ops.Fp8DotGeneralOp`` records as it does in training.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> layer = nn.Dense(2, dot_general_cls=fp8.Fp8DotGeneral)
    >>> x = jnp.array([[896.0, 1.0]])
    >>> variables = layer.init(jax.random.key(0), x)
    >>> variables = fp8.calibrate(layer, variables, [x, 0.5 * x], progress=False)
    >>> state = variables["_overwrite_with_gradient"]["Fp8DotGeneral_0"]
    >>> state["input_scale"], state["input_amax_history"][:2]
    (Array([2.], dtype=float32), Array([448.,   0.], dtype=float32))

  References:
    Wu et al., Integer Quantization for Deep Learning Inference, https://arxiv.org/abs/2004.09602,
    section 3.4, calibration by maximum and by percentile.
  """
  _check(module, variables, batches, loss_fn, rngs)
  if percentile is not None:
    advice = "A common value is 99.99. Omit it to record the largest magnitude."
    within = lambda x: 0 < x <= 100
    percentile = fields.number(
      "calibrate", "percentile", percentile, "within (0, 100]", within, advice
    )
  has_loss, run = loss_fn is not None, _Run(module, loss_fn, percentile)
  new = _zero_metrics(variables, has_loss)
  if (stateless := _is_stateless(new)) and percentile is not None:
    raise ValueError(
      f"calibrate: percentile needs a model with state; got {percentile=} and a model without "
      "state. Omit it, or use DelayedScaling."
    )
  total, bad, batch = 0, 0, None
  for batch in _shown(batches, progress):
    if stateless and not total:
      new = _with_metrics(new, module, batch, has_loss)
    new, sound = run.observe(new, batch, rngs)
    total, bad = total + 1, bad + (not sound)
  _report(total, bad)
  if stateless:
    return stats(new)
  new = run.finalize(new, batch, rngs)
  return like(variables, new)


def _check(module: Any, variables: Any, batches: Any, loss_fn: Loss | None, rngs: Any) -> None:
  require_module("calibrate", module)
  require_variables("calibrate", variables)
  require_float32_state("calibrate", variables)
  is_one = isinstance(batches, str | bytes | Mapping) or hasattr(batches, "shape")
  if is_one or not isinstance(batches, Iterable):
    raise TypeError(
      "calibrate: batches must be an iterable of batches; got "
      f"batches={fields.show(batches)}. Pass [batch] for a single batch."
    )
  if loss_fn is not None:
    advice = "Pass loss_fn(variables, batch), or omit it."
    fields.function("calibrate", "loss_fn", loss_fn, advice)
  if loss_fn is not None and rngs is not None:
    raise ValueError(
      "calibrate: rngs must not be given with loss_fn, which calls module.apply itself; got both. "
      "Pass the keys to module.apply in loss_fn, or put them in the batch."
    )


class _Run:
  """The programs that calibration compiles, once for each batch shape."""

  def __init__(self, module: nn.Module, loss_fn: Loss | None, percentile: float | None) -> None:
    self._module = module
    self._loss_fn = loss_fn
    self._observing = Calibration(percentile=percentile)
    self._jitted = jax.jit(self._new_state, static_argnums=(0, 1))

  def observe(self, variables: Any, batch: Any, rngs: Any) -> tuple[Any, bool]:
    """Records a batch; also returns whether it was recorded."""
    return self._run(self._observing, variables, batch, rngs)

  def finalize(self, variables: Any, batch: Any, rngs: Any) -> Any:
    """Computes each scale from its history; metrics are measured on the batch at that scale."""
    return self._run(Calibration(finalizes=True), variables, batch, rngs)[0]

  def _run(self, how: Calibration, variables: Any, batch: Any, rngs: Any) -> tuple[Any, bool]:
    state, rest = partition_for_grad_overwrite(variables)
    new, sound = self._jitted(how, *_split(batch), state, rest, rngs)
    return merge(rest, new), bool(sound)

  def _new_state(
    self, how: Calibration, static: _Static, arrays: Any, state: Any, rest: Any, rngs: Any
  ) -> tuple[Any, jax.Array]:
    loss = lambda state, params: self._loss(
      merge({**rest, "params": params}, state), static.join(arrays), rngs
    )
    argnums = (0,) if self._loss_fn is None or how.finalizes else (0, 1)
    with calibrating(how):
      (_, sound), (new, *gradients) = value_and_grad(loss, argnums, has_aux=True)(
        state, rest["params"]
      )
    sound = (sound & ~_has_nan(gradients)) | how.finalizes

    def record(path: Any, new: jax.Array, old: jax.Array) -> jax.Array:
      name = _variable_name(path)
      if self._loss_fn is None and name.startswith(_NOT_FORWARD):
        return old
      worst = name in NAMES and not how.finalizes
      return jnp.where(sound, jnp.maximum(old, new) if worst else new, old)

    return map_with_path(record, new, state), sound

  def _loss(self, variables: Any, batch: Any, rngs: Any) -> tuple[jax.Array, jax.Array]:
    """Returns a scalar to differentiate, and whether the batch may be recorded."""
    if self._loss_fn is not None:
      loss = _scalar(self._loss_fn(variables, batch))
      return loss, jnp.isfinite(loss)
    mutable = flax.core.DenyList(("params", OVERWRITE_WITH_GRADIENT))
    out, _ = self._module.apply(plain(variables), *_arguments(batch), rngs=rngs, mutable=mutable)
    # Cotangents of zero: the backward pass returns the recorded state and computes nothing else.
    parts = [jnp.sum(leaf.real).astype(jnp.float32) for leaf in _inexact(out)]
    return 0.0 * sum(parts, jnp.float32(0)), ~_has_nan(out)


@dataclasses.dataclass(frozen=True)
class _Static:
  """The static part of a batch: its structure, and leaves that are not arrays."""

  structure: Any
  others: tuple[Any, ...]

  def join(self, arrays: list[Any]) -> Any:
    left = iter(arrays)
    leaves = [next(left) if other is _ARRAY else other for other in self.others]
    return jax.tree.unflatten(self.structure, leaves)


_ARRAY = object()


def _split(batch: Any) -> tuple[_Static, list[Any]]:
  leaves, structure = jax.tree.flatten(batch)
  is_array = [hasattr(leaf, "__array__") for leaf in leaves]
  others = tuple(_ARRAY if is_it else leaf for leaf, is_it in zip(leaves, is_array, strict=True))
  arrays = [leaf for leaf, is_it in zip(leaves, is_array, strict=True) if is_it]
  convert = lambda leaf: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
  return _Static(structure, others), [convert(leaf) for leaf in arrays]


def _arguments(batch: Any) -> tuple[Any, ...]:
  return batch if isinstance(batch, tuple) else (batch,)


def _scalar(loss: Any) -> jax.Array:
  if not is_real_scalar(loss):
    raise ValueError(
      f"calibrate: loss_fn must return a real scalar; got {fields.show(loss)}. Take the mean, and "
      "omit auxiliary outputs."
    )
  return jnp.asarray(loss)


def _inexact(tree: Any) -> list[jax.Array]:
  leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
  return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def _has_nan(tree: Any) -> jax.Array:
  found = [jnp.any(jnp.isnan(leaf)) for leaf in _inexact(tree)]
  return functools.reduce(jnp.logical_or, found, jnp.array(False))


def _is_stateless(variables: Mapping[str, Any]) -> bool:
  state, _ = partition_for_grad_overwrite(variables)
  return not select(state, metrics=False)


def _with_metrics(variables: Any, module: nn.Module, batch: Any, has_loss: bool) -> Any:
  """Adds metrics to the variables of a model without state."""
  if jax.tree.leaves(partition_for_grad_overwrite(variables)[0]):
    return variables
  if has_loss:
    raise ValueError(
      "calibrate: variables of a model without state must have metrics if loss_fn is given; got "
      "none. Pass add_metrics(module, variables, *inputs) as variables."
    )
  return add_metrics(module, variables, *_arguments(batch))


def _variable_name(path: Any) -> str:
  """Returns the name of a variable: the last dict key of its path, since boxes add only fields."""
  return next(entry.key for entry in reversed(path) if isinstance(entry, jax.tree_util.DictKey))


def _zero_metrics(variables: Any, has_loss: bool) -> Any:
  """Resets the metrics, which accumulate the maximum over batches."""
  state, rest = partition_for_grad_overwrite(variables)

  def zero(path: Any, leaf: jax.Array) -> jax.Array:
    name = _variable_name(path)
    fresh = name in NAMES and (has_loss or not name.startswith(_NOT_FORWARD))
    return jnp.zeros_like(leaf) if fresh else leaf

  return merge(rest, map_with_path(zero, state))


def _shown(batches: Iterable[Any], progress: bool) -> Iterator[Any]:
  total = len(batches) if isinstance(batches, Sized) else None
  with Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar:
    yield from bar.track(batches, total=total, description="Calibrating")


def _report(total: int, bad: int) -> None:
  if not total:
    raise ValueError(
      "calibrate: batches must have at least one batch; got none. Pass a list, or a new iterator."
    )
  if bad:
    warnings.warn(
      f"calibrate: {bad} of {total} batches gave NaN or an infinite loss and were not recorded.",
      stacklevel=3,
    )
