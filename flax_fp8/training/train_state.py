"""A ``TrainState`` that writes FP8 state over and sends parameters to the optimiser."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from flax.training import train_state

from flax_fp8 import fields
from flax_fp8.linen.containers import leaves_with_path, map_with_path, plain
from flax_fp8.linen.state import OVERWRITE_WITH_GRADIENT, is_state, require_float32_state
from flax_fp8.state_cast import cast_here
from flax_fp8.training import paths
from flax_fp8.training.loss_scale import all_finite
from flax_fp8.training.max_grad import as_max_grad
from flax_fp8.training.metrics import NAMES
from flax_fp8.training.state import (
  apply_updates,
  as_variables,
  parameters,
  partition_for_grad_overwrite,
  refuse_pair,
  with_parameters,
)


class TrainState(train_state.TrainState):
  """Flax's ``TrainState``, right for FP8 state.

  ``params`` may be bare parameters, a variables dict, or a mapping with one of these for each of
  several models, ``{"generator": variables, "discriminator": variables}``. Of a variables dict, the
  optimizer sees the collection ``params`` alone; ``_overwrite_with_gradient`` is replaced by its
  gradient; every other collection stays as it is. So gradient clipping, weight decay and averages
  inside ``tx`` never see a scale.

  Attributes:
    step: counts calls of ``apply_gradients``.
    apply_fn: the function given to ``create``, with FP8 state cast to fp32_max_grad on the way in,
      so that state used on several paths accumulates by maximum.
    params: bare parameters or variables dict.
    tx: optimiser.
    opt_state: its state, of the parameters alone.
    skipped_steps: counts the steps that were not taken, with ``create(..., skip_nonfinite=True)``;
      else None, and no field.

  Raises:
    ValueError: from ``apply_gradients``, where the gradients are not of the structure of
      ``params``; names the collections or paths.

  Numerics:
    Parameters are updated exactly as by Flax's class. State that no path of the step used keeps
    its value.

    FP8 state stays finite whatever a step holds. With ``skip_nonfinite=True``, a step whose
    gradients of parameters are not all finite leaves parameters, optimiser and FP8 state as they
    were, bit for bit: the next step is as if the bad batch had not come, and there is nothing to
    recover from. ``step`` counts on, and ``skipped_steps`` with it. The metrics of
    ``flax_fp8.add_metrics`` are still written, so that ``stats`` tells in which tensors it was.
    What you ``replace`` yourself, statistics of batches say, is yours to guard.

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

  # No field here, where it would be a leaf, or a None that Orbax writes down, of every checkpoint.
  skipped_steps: ClassVar[int | jax.Array | None] = None

  @classmethod
  def create(
    cls,
    *,
    apply_fn: Callable[..., Any],
    params: Any,
    tx: Any,
    skip_nonfinite: bool = False,
    **kwargs: Any,
  ) -> TrainState:
    """Makes the state of step 0.

    Args:
      apply_fn: as Flax's.
      params: bare parameters or variables dict.
      tx: as Flax's.
      skip_nonfinite: does not take a step whose gradients of parameters are not all finite. The
        state is then of a subclass with one leaf more, ``skipped_steps``. A checkpoint from before
        goes into it by ``restore_checkpoint(..., allow_missing=["skipped_steps"])``.
      **kwargs: other fields.

    Raises:
      TypeError: ``tx`` is no optimizer, ``apply_fn`` no function.
      ValueError: ``params`` are none, or hold FP8 state outside of nested mappings.
    """
    _check_create(apply_fn, params, tx, skip_nonfinite)
    if any(is_state(path) for path, _ in leaves_with_path(parameters(params))):
      raise ValueError(
        "TrainState.create: FP8 state must lie in nested mappings, so that the optimizer does not "
        f"get it; got params of {type(params).__name__}. Name the models: {{'generator': ...}}."
      )
    require_float32_state("TrainState.create", params)
    made = _skipping(cls) if skip_nonfinite and cls.skipped_steps is None else cls
    return made(
      step=0,
      apply_fn=_MaxGradApply(apply_fn),
      params=params,
      tx=tx,
      opt_state=tx.init(parameters(params)),
      **kwargs,
    )

  def apply_gradients(
    self,
    *,
    grads: Any,
    value: Any = None,
    grad: Any = None,
    value_fn: Callable[[Any], Any] | None = None,
    **kwargs: Any,
  ) -> TrainState:
    """Takes one step.

    ``value``, ``grad`` and ``value_fn`` are for optimizers whose ``update`` takes them, such as
    ``optax.lbfgs`` and ``optax.contrib.reduce_on_plateau``, alone or within ``optax.chain``. An
    optimizer that takes none of them ignores them.

    Args:
      grads: gradients of the structure of ``params``; collections other than ``params`` and
        ``_overwrite_with_gradient`` may be missing and are not read.
      value: the loss.
      grad: gradients of the structure of ``params``, where the optimizer is to see others than
        ``grads``. The optimizer gets those of parameters alone.
      value_fn: the loss as a function of what ``params`` is. A line search calls it with other
        parameters, and with the FP8 state and the other collections of this step.
      **kwargs: fields to replace besides.

    Returns:
      The state after the step.

    Raises:
      ValueError: a collection that ``params`` has is missing from ``grads``, or differs in
        structure.
    """
    refuse_pair("TrainState.apply_gradients", grads)
    if (trained := parameters(self.params)) is self.params:
      _check_structure(grads, self.params, "params")
    else:
      _check_collections(grads, self.params)
    own = parameters(grads)
    more: dict[str, Any] = {}
    if value is not None or grad is not None or value_fn is not None:
      more = self._more(value, own if grad is None else parameters(grad), value_fn)
    updates, opt_state = self.tx.update(own, self.opt_state, trained, **more)
    overwrite, _ = partition_for_grad_overwrite(grads)
    params = apply_updates(self.params, as_variables(updates, self.params), overwrite)
    new = self.replace(step=self.step + 1, params=params, opt_state=opt_state, **kwargs)
    return self._unless_nonfinite(new, own)

  def _more(self, value: Any, grad: Any, value_fn: Callable[[Any], Any] | None) -> dict[str, Any]:
    """Gathers what the optimizer takes besides gradients, in terms of the parameters alone."""
    more = {"grad": grad}
    if value is not None:
      more["value"] = value
    if value_fn is not None:
      more["value_fn"] = lambda params: value_fn(with_parameters(self.params, params))
    taken = inspect.signature(self.tx.update).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in taken.values())
    return {name: each for name, each in more.items() if takes_any or name in taken}

  def _unless_nonfinite(self, new: TrainState, grads: Any) -> TrainState:
    """Takes back what a step did, but its count and the metrics, where gradients are not finite."""
    if self.skipped_steps is None:
      return new
    finite = all_finite(grads)
    keep = lambda path, new, old: new if _is_metric(path) else jnp.where(finite, new, old)
    return new.replace(
      params=map_with_path(keep, new.params, self.params),
      opt_state=map_with_path(keep, new.opt_state, self.opt_state),
      skipped_steps=jnp.where(finite, self.skipped_steps, self.skipped_steps + 1),
    )


@functools.cache
def _skipping(cls: Any) -> Any:
  """Makes the subclass that counts skipped steps; one for each class, so that states compare."""

  class Skipping(cls):
    skipped_steps: Any = flax.struct.field(default=0, kw_only=True)

    def __reduce__(self) -> Any:
      # pickle finds classes by name, and this one has none.
      return _blank, (cls,), vars(self)

  Skipping.__name__, Skipping.__qualname__ = cls.__name__, cls.__qualname__
  Skipping.__doc__ = cls.__doc__
  return Skipping


def _blank(cls: Any) -> Any:
  return object.__new__(_skipping(cls))


@dataclasses.dataclass(frozen=True)
class _MaxGradApply:
  """``apply_fn`` with the FP8 state of its first argument cast; equal if the functions are."""

  apply_fn: Callable[..., Any]

  def __call__(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
    with cast_here():
      return self.apply_fn(as_max_grad(variables), *args, **kwargs)


def _is_metric(path: Any) -> bool:
  return is_state(path) and getattr(path[-1], "key", None) in NAMES


def _check_create(apply_fn: Any, params: Any, tx: Any, skip_nonfinite: Any) -> None:
  owner = "TrainState.create"
  if apply_fn is not None:
    fields.function(owner, "apply_fn", apply_fn, "Pass model.apply.")
  fields.flag(owner, "skip_nonfinite", skip_nonfinite)
  if not (hasattr(tx, "init") and hasattr(tx, "update")):
    raise TypeError(
      f"{owner}: tx must be an optax.GradientTransformation; got tx={fields.show(tx)}. Pass an "
      "optimizer, such as optax.adam(1e-3)."
    )
  refuse_pair(owner, params)
  if params is None or isinstance(params, str):
    raise ValueError(
      f"{owner}: params must be parameters or a variables dict; got params={params!r}. Pass what "
      "model.init returned."
    )


def _check_structure(grads: Any, params: Any, where: str) -> None:
  want, got = (jax.tree.structure(plain(tree)) for tree in (params, grads))
  if want != got:
    given, wanted = ({paths.name(path) for path, _ in leaves_with_path(t)} for t in (grads, params))
    raise ValueError(
      f"TrainState.apply_gradients: grads must have the structure of {where}; got "
      f"{type(grads).__name__} with missing={fields.cut(sorted(wanted - given), 100)}, "
      f"extra={fields.cut(sorted(given - wanted), 100)}. Differentiate the loss with respect to "
      "state.params, and pass on its gradient unchanged."
    )


def _check_collections(grads: Any, variables: Any, where: str = "params") -> None:
  """Raises ValueError where gradients lack what is trained or overwritten."""
  own = [name for name in ("params", OVERWRITE_WITH_GRADIENT) if name in variables]
  below = [] if "params" in own else [name for name in variables if name not in own]
  for name in (*own, *below):
    if not isinstance(grads, Mapping) or name not in grads:
      raise ValueError(
        f"TrainState.apply_gradients: grads must hold {'the collection ' if name in own else ''}"
        f"{name!r}, as {where} does; got "
        f"{fields.cut(sorted(grads)) if isinstance(grads, Mapping) else type(grads).__name__}. "
        "Differentiate the loss with respect to the whole of state.params."
      )
    if name in below and partition_for_grad_overwrite(variables[name])[0]:
      _check_collections(grads[name], variables[name], f"{where}[{name!r}]")
      continue
    _check_structure(grads[name], variables[name], f"{where}[{name!r}]")
