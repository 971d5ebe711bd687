"""A ``TrainState`` that overwrites FP8 state and passes only parameters to the optimizer."""

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
  """Flax's ``TrainState`` with support for FP8 state.

  ``params`` may be bare parameters or a variables dict. It may also be a mapping of models to one
  of these, such as ``{"generator": variables, "discriminator": variables}``. For a variables dict,
  ``apply_gradients`` passes only the collection ``params`` to the optimizer. It replaces
  ``_overwrite_with_gradient`` by its gradient, and leaves every other collection unchanged. So
  gradient clipping, weight decay and parameter averages in ``tx`` never see a scale.

  Attributes:
    step: number of calls of ``apply_gradients``.
    apply_fn: the function given to ``create``. It casts the FP8 state of its first argument to
      fp32_max_grad, so state used on several paths accumulates by maximum.
    params: bare parameters, a variables dict, or a mapping of models to one of these.
    tx: optimizer.
    opt_state: optimizer state, which covers parameters only.
    skipped_steps: number of skipped steps, with ``create(..., skip_nonfinite=True)``. Otherwise
      None, and not a field.

  Raises:
    ValueError: ``apply_gradients`` got gradients without the structure of ``params``. The error
      names the collections or paths.

  Numerics:
    Parameters are updated exactly as by Flax's class. State that no path of the step used keeps
    its value.

    FP8 state stays finite, whatever values a step contains. With ``skip_nonfinite=True``, a step
    is skipped if a parameter gradient is not finite. A skipped step leaves parameters, optimizer
    state and FP8 state unchanged, bit for bit. It increments ``step`` and ``skipped_steps``. It
    still writes the metrics of ``flax_fp8.add_metrics``, so ``stats`` shows which tensors were not
    finite. Fields that you pass to ``replace``, such as batch statistics, are not protected.

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

  # Not a field: a field would add a leaf, or a None that Orbax stores, to every checkpoint.
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
    """Creates the state of step 0.

    Args:
      apply_fn: as in Flax.
      params: bare parameters, a variables dict, or a mapping of models to one of these.
      tx: as in Flax.
      skip_nonfinite: skips each step in which a parameter gradient is not finite. The state is
        then an instance of a subclass with one more leaf, ``skipped_steps``. To restore a
        checkpoint without it, use ``restore_checkpoint(..., allow_missing=["skipped_steps"])``.
      **kwargs: other fields.

    Returns:
      The training state.

    Raises:
      TypeError: ``tx`` is not an optimizer, ``apply_fn`` is not a function, or ``skip_nonfinite``
        is not a boolean.
      ValueError: ``params`` is None, a string or the pair that ``value_and_grad`` returns, or has
        FP8 state outside nested mappings.
    """
    _check_create(apply_fn, params, tx, skip_nonfinite)
    if any(is_state(path) for path, _ in leaves_with_path(parameters(params))):
      raise ValueError(
        "TrainState.create: FP8 state must be in nested mappings, which keep it from the "
        f"optimizer; got params of {type(params).__name__}. Pass a mapping of models to variables: "
        "{'generator': ...}."
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
    """Takes one optimizer step and overwrites the FP8 state.

    Pass ``value``, ``grad`` and ``value_fn`` to optimizers that use them in ``update``, such as
    ``optax.lbfgs`` and ``optax.contrib.reduce_on_plateau``. They may be part of an
    ``optax.chain``. Other optimizers ignore these arguments.

    Args:
      grads: gradients with the structure of ``params``; always pass this one. Collections other
        than ``params`` and ``_overwrite_with_gradient`` may be missing and are not read.
      value: the loss.
      grad: gradients with the structure of ``params``, for an optimizer that takes ``grad`` in
        addition to ``grads``. The default is ``grads``. The optimizer gets only the gradients of
        parameters.
      value_fn: the loss as a function of a tree with the structure of ``params``. A line search
        calls it with other parameters, but with the FP8 state and other collections of this step.
      **kwargs: other fields to replace.

    Returns:
      The state after the step.

    Raises:
      ValueError: a collection of ``params`` is missing from ``grads`` or has another structure.
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
    """Returns the extra arguments that the optimizer takes, restricted to parameters."""
    more = {"grad": grad}
    if value is not None:
      more["value"] = value
    if value_fn is not None:
      more["value_fn"] = lambda params: value_fn(with_parameters(self.params, params))
    taken = inspect.signature(self.tx.update).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in taken.values())
    return {name: each for name, each in more.items() if takes_any or name in taken}

  def _unless_nonfinite(self, new: TrainState, grads: Any) -> TrainState:
    """Undoes a step with nonfinite gradients, except for its count and the metrics."""
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
  """Returns the subclass that counts skipped steps; cached, so that states have equal types."""

  class Skipping(cls):
    skipped_steps: Any = flax.struct.field(default=0, kw_only=True)

    def __reduce__(self) -> Any:
      # pickle finds classes by name, and this class has no importable name.
      return _blank, (cls,), vars(self)

  Skipping.__name__, Skipping.__qualname__ = cls.__name__, cls.__qualname__
  Skipping.__doc__ = cls.__doc__
  return Skipping


def _blank(cls: Any) -> Any:
  return object.__new__(_skipping(cls))


@dataclasses.dataclass(frozen=True)
class _MaxGradApply:
  """Casts the FP8 state of the first argument; instances with equal ``apply_fn`` are equal."""

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
      "state.params, and pass the gradient unchanged."
    )


def _check_collections(grads: Any, variables: Any, where: str = "params") -> None:
  """Raises ValueError if a trained or overwritten collection is missing from gradients."""
  own = [name for name in ("params", OVERWRITE_WITH_GRADIENT) if name in variables]
  below = [] if "params" in own else [name for name in variables if name not in own]
  for name in (*own, *below):
    if not isinstance(grads, Mapping) or name not in grads:
      raise ValueError(
        f"TrainState.apply_gradients: grads must hold {'the collection ' if name in own else ''}"
        f"{name!r}, as {where} does; got "
        f"{fields.cut(sorted(grads)) if isinstance(grads, Mapping) else type(grads).__name__}. "
        "Differentiate the loss with respect to the whole state.params."
      )
    if name in below and partition_for_grad_overwrite(variables[name])[0]:
      _check_collections(grads[name], variables[name], f"{where}[{name!r}]")
      continue
    _check_structure(grads[name], variables[name], f"{where}[{name!r}]")
