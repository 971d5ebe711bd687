"""A ``TrainState`` that writes FP8 state over and sends parameters to the optimiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.core
import jax
from flax.training import train_state

from flax_fp8.linen.state import OVERWRITE_WITH_GRADIENT
from flax_fp8.meta_dtype import cast_here
from flax_fp8.training.max_grad import as_max_grad
from flax_fp8.training.state import apply_updates


class TrainState(train_state.TrainState):
  """Flax's ``TrainState``, right for FP8 state.

  ``params`` may be the bare parameters or the whole variables dict. Of a variables dict, the
  optimiser sees the collection ``params`` alone; ``_overwrite_with_gradient`` is replaced by its
  gradient; every other collection stays as it is. So gradient clipping, weight decay and averages
  inside ``tx`` never see a scale.

  Attributes:
    step: counts calls of ``apply_gradients``.
    apply_fn: the function given to ``create``, with FP8 state cast to fp32_max_grad on the way in,
      so that state used on several paths accumulates by maximum.
    params: bare parameters or variables dict.
    tx: optimiser.
    opt_state: its state, of the parameters alone.

  Raises:
    ValueError: from ``apply_gradients``, where the gradients are not of the structure of
      ``params``; names the collections or paths.

  Numerics:
    Parameters are updated exactly as by Flax's class. State that no path of the step used keeps
    its value.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
    >>> import flax_fp8 as fp8
    >>> model = nn.Dense(4, dot_general_cls=fp8.Fp8DotGeneral)
    >>> x = jnp.ones((2, 4))
    >>> variables = model.init(jax.random.key(0), x)
    >>> state = fp8.TrainState.create(apply_fn=model.apply, params=variables, tx=optax.adam(1e-3))
    >>> loss_fn = lambda variables: jnp.mean(state.apply_fn(variables, x) ** 2)
    >>> loss, grads = fp8.value_and_grad(loss_fn)(state.params)
    >>> state = state.apply_gradients(grads=grads)
    >>> float(state.params["_overwrite_with_gradient"]["Fp8DotGeneral_0"]["input_amax_history"][0])
    1.0

  References:
    flax.training.train_state.TrainState.
  """

  @classmethod
  def create(
    cls, *, apply_fn: Callable[..., Any], params: Any, tx: Any, **kwargs: Any
  ) -> TrainState:
    """Makes the state of step 0; arguments as Flax's."""
    return cls(
      step=0,
      apply_fn=_MaxGradApply(apply_fn),
      params=params,
      tx=tx,
      opt_state=tx.init(_parameters(params)),
      **kwargs,
    )

  def apply_gradients(self, *, grads: Any, **kwargs: Any) -> TrainState:
    """Takes one step.

    Args:
      grads: gradients of the structure of ``params``; collections other than ``params`` and
        ``_overwrite_with_gradient`` may be missing and are not read.
      **kwargs: fields to replace besides.

    Returns:
      The state after the step.

    Raises:
      ValueError: a collection that ``params`` has is missing from ``grads``, or differs in
        structure.
    """
    if not _is_variables(self.params):
      return super().apply_gradients(grads=grads, **kwargs)
    _check_collections(grads, self.params)
    updates, opt_state = self.tx.update(grads["params"], self.opt_state, self.params["params"])
    overwrite = {k: grads[k] for k in (OVERWRITE_WITH_GRADIENT,) if k in self.params}
    params = apply_updates(self.params, {"params": updates}, overwrite)
    return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **kwargs)


@dataclasses.dataclass(frozen=True)
class _MaxGradApply:
  """``apply_fn`` with the FP8 state of its first argument cast; equal if the functions are."""

  apply_fn: Callable[..., Any]

  def __call__(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
    with cast_here():
      return self.apply_fn(as_max_grad(variables), *args, **kwargs)


def _is_variables(params: Any) -> bool:
  return isinstance(params, Mapping) and "params" in params


def _parameters(params: Any) -> Any:
  return params["params"] if _is_variables(params) else params


def _check_collections(grads: Any, variables: Any) -> None:
  for collection in ("params", OVERWRITE_WITH_GRADIENT):
    if collection not in variables:
      continue
    if collection not in grads:
      raise ValueError(
        f"TrainState.apply_gradients: grads must hold the collection {collection!r}, as params "
        f"does; got collections {sorted(grads)}. Differentiate the loss with respect to the whole "
        "of state.params."
      )
    want, got = (jax.tree.structure(flax.core.unfreeze(t[collection])) for t in (variables, grads))
    if want != got:
      raise ValueError(
        f"TrainState.apply_gradients: grads must have the structure of params; got, in "
        f"{collection!r}, {got} where params has {want}. Differentiate the loss with respect to "
        "state.params, and pass on its gradient unchanged."
      )
