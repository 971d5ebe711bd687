"""Splits FP8 state from a tree of variables, and overwrites it with its new value."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_fp8 import fields
from flax_fp8.linen.boxes import rebox, unbox
from flax_fp8.linen.containers import leaves_with_path, like, with_items
from flax_fp8.linen.state import OVERWRITE_WITH_GRADIENT, require_float32_state
from flax_fp8.meta_dtype import to_float32
from flax_fp8.recipes.base import Role
from flax_fp8.training import paths


def partition_for_grad_overwrite(tree: Any) -> tuple[Any, Any]:
  """Splits variables or their gradients into FP8 state and the rest.

  Use it in your own training loop to keep FP8 state from the optimizer. ``rest`` also holds other
  collections, such as ``batch_stats``. Give the optimizer only ``rest["params"]``, because weight
  decay would change the others.

  Args:
    tree: nested mapping of collections, or any pytree, such as the gradients of ``fp8.grad``.

  Returns:
    ``(overwrite, rest)``: nested mappings of the same types as in ``tree``. ``overwrite`` has
    everything under keys ``_overwrite_with_gradient``, and ``rest`` everything else. A tree that is
    not a mapping is returned as ``rest``.

  Raises:
    ValueError: ``tree`` is the pair that ``value_and_grad`` returns.

  Numerics:
    No value changes.

  Example:
    >>> import flax_fp8 as fp8
    >>> fp8.partition_for_grad_overwrite({"params": 1.0, "_overwrite_with_gradient": 2.0})
    ({'_overwrite_with_gradient': 2.0}, {'params': 1.0})

  References:
    haliax.quantization.partition_for_grad_overwrite.
  """
  if not isinstance(tree, Mapping):
    refuse_pair("partition_for_grad_overwrite", tree)
    return {}, tree
  overwrites, rest = {}, {}
  for key, value in tree.items():
    if key == OVERWRITE_WITH_GRADIENT:
      overwrites[key] = value
      continue
    below, rest[key] = partition_for_grad_overwrite(value)
    if below:
      overwrites[key] = below
  return with_items(tree, overwrites), with_items(tree, rest)


def refuse_pair(owner: str, tree: Any) -> None:
  """Raises ValueError if ``tree`` is the pair that ``value_and_grad`` returns."""
  if type(tree) is not tuple or len(tree) != 2 or not isinstance(tree[1], Mapping):
    return
  loss = tree[0][0] if type(tree[0]) is tuple and tree[0] else tree[0]
  if isinstance(loss, jax.Array) and loss.ndim == 0:
    raise ValueError(
      f"{owner}: gradients must have the structure of the variables; got the pair that "
      "value_and_grad returns. Unpack it: loss, grads = value_and_grad(loss_fn)(variables)."
    )


def parameters(tree: Any) -> Any:
  """Returns the parameters that an optimizer trains.

  Args:
    tree: bare parameters, a variables dict, or a mapping of models to one of these.

  Returns:
    The collection ``params`` of each variables dict. ``tree`` itself if it has neither FP8 state
    nor a variables dict.
  """
  if not isinstance(tree, Mapping):
    return tree
  if "params" in tree:
    return tree["params"]
  if not partition_for_grad_overwrite(tree)[0]:
    return tree
  own = {key: parameters(value) for key, value in tree.items() if key != OVERWRITE_WITH_GRADIENT}
  return with_items(tree, own)


def with_parameters(variables: Any, params: Any) -> Any:
  """Replaces ``parameters(variables)`` by ``params`` and keeps everything else."""
  if not isinstance(variables, Mapping):
    return params
  if "params" in variables:
    return with_items(variables, {**variables, "params": params})
  if not partition_for_grad_overwrite(variables)[0]:
    return params
  own = {key: with_parameters(variables[key], value) for key, value in params.items()}
  return with_items(variables, {**variables, **own})


def as_variables(params: Any, like: Any) -> Any:
  """Inverts ``parameters``: nests ``params`` as in ``like``, without other collections."""
  if not isinstance(like, Mapping):
    return params
  if "params" in like:
    return {"params": params}
  if not partition_for_grad_overwrite(like)[0]:
    return params
  return {key: as_variables(value, like[key]) for key, value in params.items()}


def apply_updates(variables: Any, updates: Any, overwrite: Any) -> Any:
  """Adds updates to parameters, overwrites FP8 state, and keeps everything else.

  It computes ``{"params": params + updates, "_overwrite_with_gradient": overwrite, ...}``.

  Give the optimizer only the collection ``params``. An optimizer that takes the loss in ``update``,
  such as ``optax.lbfgs``, gets a function of ``params``::

      loss, grads = value_and_grad(loss_fn)(variables)
      overwrite, _ = partition_for_grad_overwrite(grads)
      value_fn = lambda params: loss_fn({**variables, "params": params})
      more = {"value": loss, "grad": grads["params"], "value_fn": value_fn}
      updates, opt_state = tx.update(grads["params"], opt_state, variables["params"], **more)
      variables = apply_updates(variables, {"params": updates}, overwrite)

  Args:
    variables: nested mapping of collections before the step.
    updates: updates from ``optax`` in a dict of collections, usually ``{"params": updates}``. Other
      collections keep their values.
    overwrite: new state, from ``partition_for_grad_overwrite(gradients)[0]``.

  Returns:
    Variables after the step, with the structure of ``variables``.

  Raises:
    TypeError: the state in ``variables`` was cast from float32 to another dtype.
    ValueError: ``overwrite`` and ``variables`` do not have the same state, or ``updates`` has
      leaves or shapes that ``variables`` does not have. The error names the paths. Also if an
      argument is the pair that ``value_and_grad`` returns.

  Numerics:
    The gradient marks unused state by ``-inf`` or by a scale of zero. ``apply_updates`` keeps the
    old value there. State is float32 after the step.

  Example:
    >>> import flax_fp8 as fp8, jax.numpy as jnp
    >>> variables = {"params": jnp.array(1.0), "_overwrite_with_gradient": jnp.array(5.0)}
    >>> new = fp8.apply_updates(
    ...   variables, {"params": jnp.array(0.5)}, {"_overwrite_with_gradient": jnp.array(7.0)}
    ... )
    >>> {name: float(x) for name, x in sorted(new.items())}
    {'_overwrite_with_gradient': 7.0, 'params': 1.5}

  References:
    haliax.quantization.apply_updates; optax.apply_updates.
  """
  for given in (updates, overwrite):
    refuse_pair("apply_updates", given)
  require_float32_state("apply_updates", variables)
  old_state, old_rest = partition_for_grad_overwrite(variables)
  _check_same_paths("overwrite", overwrite, old_state)
  new_state = keep_unused(old_state, overwrite)
  new_rest = _add(old_rest, updates, ())
  return like(variables, merge(new_rest, new_state))


def _check_same_paths(name: str, given: Any, expected: Any) -> None:
  shapes = lambda tree: {paths.name(path): jnp.shape(leaf) for path, leaf in leaves_with_path(tree)}
  got, want = shapes(given), shapes(expected)
  missing = sorted(want.keys() - got.keys())
  extra = sorted(got.keys() - want.keys())
  other = sorted(
    f"{k} {got[k]} for {want[k]}" for k in want.keys() & got.keys() if got[k] != want[k]
  )
  if missing or extra or other:
    cut = functools.partial(fields.cut, limit=125)
    raise ValueError(
      f"apply_updates: {name} must have the FP8 state of the variables; got "
      f"missing={cut(missing)}, extra={cut(extra)}, other shapes={cut(other)}. "
      "Differentiate with respect to the whole variables dict, params and state, and pass the "
      "gradient of the state unchanged."
    )


def _add(old: Any, updates: Any, path: tuple[str, ...]) -> Any:
  """Adds updates to the leaves that they name, and keeps all other leaves."""
  if not isinstance(old, Mapping) or not isinstance(updates, Mapping):
    _check_fits(old, updates, path)
    return optax.apply_updates(old, updates)
  if unknown := sorted(set(updates) - set(old)):
    raise ValueError(
      f"apply_updates: updates must name parameters of the variables; got {unknown} at "
      f"{'/'.join(path) or 'the top level'}, where variables have {sorted(old)}. Pass the result "
      "of tx.update for the gradients of these variables."
    )
  return {
    key: _add(value, updates[key], (*path, key)) if key in updates else value
    for key, value in old.items()
  }


def _check_fits(old: Any, updates: Any, path: tuple[str, ...]) -> None:
  shapes = lambda tree: [np.shape(leaf) for leaf in jax.tree.leaves(tree)]
  pairs = zip(shapes(old), shapes(updates), strict=False)
  same = jax.tree.structure(old) == jax.tree.structure(updates)
  if not same or any(update not in (shape, ()) for shape, update in pairs):
    raise ValueError(
      "apply_updates: updates must have the structure and shapes of the parameters; got, at "
      f"{'/'.join(path) or 'the top level'}, {fields.show(updates)} for {fields.show(old)}. Pass "
      "the result of tx.update for the gradients of these variables."
    )


def merge(rest: Any, state: Any) -> Any:
  """Inverts ``partition_for_grad_overwrite``; returns nested dicts."""
  if not state:
    return rest
  both = {key: merge(value, state[key]) if key in state else value for key, value in rest.items()}
  return {**both, **{key: value for key, value in state.items() if key not in rest}}


def keep_unused(old: Any, new: Any) -> Any:
  """Returns the new state, or the old state where no path of the step used it.

  Args:
    old: state before the step; nested mappings down to the variables of a module.
    new: its gradient with the same structure; float32 or fp32_max_grad.

  Returns:
    Nested dicts with the structure of ``old``; float32.
  """
  if not isinstance(old, Mapping):
    return overwrite_leaf(old, new)
  if any(isinstance(value, Mapping) for value in old.values()):
    return {key: keep_unused(value, new[key]) for key, value in old.items()}
  plain = unbox(dict(old)), unbox(dict(new))
  return {key: rebox(_keep_unused_variable(key, *plain), old[key]) for key in old}


def _keep_unused_variable(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> jax.Array:
  """Keeps an old variable if its new value is -inf or the scale beside it is zero."""
  kept = overwrite_leaf(old[name], new[name])
  roles = [role.value for role in Role if name.startswith(f"{role.value}_")]
  scales = [f"{role}_scale" for role in roles if f"{role}_scale" in new]
  for scale in scales:
    kept = _keep_where_zero(new[scale], old[name], kept)
  return kept


@functools.partial(jax.jit, inline=True)
def _keep_where_zero(scale: Any, old: Any, new: jax.Array) -> jax.Array:
  return jnp.where(to_float32(scale) == 0, to_float32(old), new)


# jit, so that JAX's debug modes do not see the -inf of unused state in eager mode.
@functools.partial(jax.jit, inline=True)
def overwrite_leaf(old: Any, new: Any) -> jax.Array:
  """Returns the new state as float32, or the old state where no path of the model used it.

  Args:
    old: state before the step; float32 or fp32_max_grad.
    new: its gradient; float32 or fp32_max_grad; ``-inf`` if no path used the state.

  Returns:
    The state after the step; float32; shape of ``old``.
  """
  old, new = to_float32(old), to_float32(new)
  return jnp.where(jnp.isneginf(new), old, new)
