"""Adds and removes metrics: leaves beside FP8 state that measure the effect of quantization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_fp8.linen.arguments import fill, require_module, require_variables
from flax_fp8.linen.boxes import has_boxes, unbox
from flax_fp8.linen.containers import like
from flax_fp8.linen.state import OVERWRITE_WITH_GRADIENT, declaring_metrics
from flax_fp8.ops.metrics import METRICS
from flax_fp8.recipes.base import Role
from flax_fp8.training.state import merge

NAMES = frozenset(f"{role.value}_{metric}" for role in Role for metric in METRICS)


def add_metrics(module: nn.Module, variables: Any, *init_args: Any, **init_kwargs: Any) -> Any:
  """Adds metrics to variables, so that every FP8 contraction measures its quantization error.

  Each role gets five float32 leaves of shape ``(1,)``. Their gradients are their new values::

      {role}_amax        max(|x|)
      {role}_saturated   fraction of the values that are beyond the range at their scale
      {role}_flushed     fraction of the nonzero values that became zero
      {role}_noise       sum((x - x_hat)**2) / sum(x**2)     # SQNR = -10 log10(noise) dB
      {role}_nonfinite   fraction of the values that are NaN or infinite

  Metrics are FP8 state for ``value_and_grad``, ``TrainState``, ``nn.scan`` and checkpoints.
  ``stats`` reads them. Each step measures them until ``drop_metrics`` removes them.

  Args:
    module: the FP8 model, with any recipe.
    variables: its variables dict, or ``TrainState.params``.
    *init_args: arguments of the model's ``init`` after the PRNG key; arrays or ShapeDtypeStructs.
    **init_kwargs: keyword arguments of the model's ``init``.

  Returns:
    ``variables`` with metrics of zero in the collection ``_overwrite_with_gradient``. The
    collection is created if the recipe has no state.

  Raises:
    TypeError: ``module`` is not a Linen module.
    ValueError: ``variables`` is not a variables dict, the model has no FP8 contraction, or an
      ``nn.scan`` or ``nn.vmap`` in the model does not map the collection.

  Numerics:
    ``nonfinite`` counts NaN and infinite values. The other metrics exclude these values, and
    values whose scale is NaN. After a step that gave NaN, ``nonfinite`` shows which tensors had
    it. For a tensor that is used on several paths, or shared by mapped axes or devices, each
    metric is the largest over these parts. For a tensor that is quantized differently for its two
    GEMMs, it is the larger of the two. Metrics of tensors that enter no FP8 GEMM stay zero. The
    deprecated ``fp8_ops.Fp8DotGeneralOp`` has no metrics.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> layer = nn.Dense(2, dot_general_cls=fp8.Float8CurrentScaling().dot_general_cls)
    >>> x = jnp.array([[448.0, 100.5, 1e-9]])
    >>> variables = fp8.add_metrics(layer, layer.init(jax.random.key(0), x), x)
    >>> new = jax.jit(fp8.grad(lambda v: jnp.sum(layer.apply(v, x))))(variables)
    >>> leaves = new["_overwrite_with_gradient"]["Fp8DotGeneral_0"]
    >>> [round(float(leaves[f"input_{name}"][0]), 3) for name in ("amax", "saturated", "flushed")]
    [448.0, 0.0, 0.333]

  References:
    Micikevicius et al., FP8 Formats for Deep Learning, https://arxiv.org/abs/2209.05433, section 3.
  """
  require_module("add_metrics", module)
  require_variables("add_metrics", variables)
  rest = drop_metrics(variables)
  made = _declared(module, init_args, init_kwargs)
  if not jax.tree.leaves(made):
    raise ValueError(
      f"add_metrics: the model must have FP8 contractions; got {type(module).__name__} with none. "
      "Set dot_general_cls=flax_fp8.Fp8DotGeneral in its layers."
    )
  made = made if has_boxes(rest) else unbox(made)
  state = merge(rest.get(OVERWRITE_WITH_GRADIENT, {}), made)
  return like(variables, {**rest, OVERWRITE_WITH_GRADIENT: state})


def drop_metrics(variables: Any) -> Any:
  """Removes the metrics that ``add_metrics`` added.

  Args:
    variables: variables dict, or ``TrainState.params``.

  Returns:
    ``variables`` without metrics. The collection ``_overwrite_with_gradient`` is removed if it
    contained nothing else.

  Raises:
    ValueError: ``variables`` is not a variables dict.

  Numerics:
    No other value changes.

  Example:
    >>> import flax_fp8 as fp8
    >>> state = {"layer": {"input_amax": 0.0, "input_noise": 0.0, "input_scale": 1.0}}
    >>> fp8.drop_metrics({"params": {}, "_overwrite_with_gradient": state})
    {'params': {}, '_overwrite_with_gradient': {'layer': {'input_scale': 1.0}}}

  References:
    flax_fp8.add_metrics.
  """
  require_variables("drop_metrics", variables)
  kept = dict(variables)
  if state := select(kept.pop(OVERWRITE_WITH_GRADIENT, {}), metrics=False):
    kept[OVERWRITE_WITH_GRADIENT] = state
  return like(variables, kept)


def select(state: Mapping[str, Any], *, metrics: bool) -> dict[str, Any]:
  """Returns only the metrics of state, or everything else, without empty modules."""
  kept: dict[str, Any] = {}
  for key, value in state.items():
    if isinstance(value, Mapping):
      if below := select(value, metrics=metrics):
        kept[key] = below
    elif (key in NAMES) == metrics:
      kept[key] = value
  return kept


def _declared(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
  """Returns the metrics of a model, all zero, from the shapes of ``module.init``."""

  def init() -> Any:
    full_args, full_kwargs = fill((args, kwargs))
    with declaring_metrics():
      made = module.init(jax.random.key(0), *full_args, **full_kwargs)
    return flax.core.unfreeze(made).get(OVERWRITE_WITH_GRADIENT, {})

  shapes = select(jax.eval_shape(init), metrics=True)
  return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
