"""FP8 state in trees of variables and gradients: find it, differentiate it, write it over."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import flax.core
import jax
import jax.numpy as jnp
import optax
from jax import lax

from flax_fp8 import _compat
from flax_fp8.linen.state import OVERWRITE_WITH_GRADIENT
from flax_fp8.meta_dtype import fp32_max_grad, is_max_grad, to_float32, to_max_grad
from flax_fp8.recipes.base import Role


def as_max_grad(variables: Any) -> Any:
  """Casts the FP8 state in a tree to ``fp32_max_grad`` and leaves the rest.

  Differentiated with respect to the tree so cast, or to the tree before the cast, state that is
  used on several paths comes back as the maximum over them instead of the sum. Cast outside of
  every loop, pipeline and remat that the state enters.

  Args:
    variables: any pytree; its state is what lies under a key ``_overwrite_with_gradient``.

  Returns:
    The tree with every float32 leaf under such a key as fp32_max_grad; same shapes.

  Raises:
    TypeError: a leaf under such a key is neither float32 nor fp32_max_grad.

  Numerics:
    The bits stay as they are.

  Example:
    >>> import jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> cast = fp8.as_max_grad({"params": jnp.ones(2), "_overwrite_with_gradient": jnp.ones(1)})
    >>> {name: str(x.dtype) for name, x in sorted(cast.items())}
    {'_overwrite_with_gradient': 'fp32_max_grad', 'params': 'float32'}

  References:
    flax.linen.fp8_ops.fp32_max_grad.
  """
  return jax.tree_util.tree_map_with_path(_cast_if_state, variables)


def _is_state(path: Sequence[Any]) -> bool:
  return any(getattr(entry, "key", None) == OVERWRITE_WITH_GRADIENT for entry in path)


def _cast_if_state(path: Any, leaf: Any) -> Any:
  if not _is_state(path) or is_max_grad(leaf):
    return leaf
  if (dtype := jnp.result_type(leaf)) != jnp.float32:
    raise TypeError(
      f"as_max_grad: FP8 state must be float32; got {jax.tree_util.keystr(path)} of {dtype=}. "
      f"Keep the collection {OVERWRITE_WITH_GRADIENT!r} out of casts of parameters."
    )
  return to_max_grad(leaf)


def value_and_grad(
  fun: Callable[..., Any],
  argnums: int | Sequence[int] = 0,
  has_aux: bool = False,
  holomorphic: bool = False,
  allow_int: bool = False,
) -> Callable[..., Any]:
  """Like ``jax.value_and_grad``, but state met on several paths comes back as the maximum.

  ``jax.value_and_grad(fun)(as_max_grad(variables))``, the state then cast back to float32.

  Args:
    fun: function of arrays and pytrees, returning a real scalar, or a pair if ``has_aux``. It sees
      the FP8 state of the differentiated arguments as fp32_max_grad.
    argnums: which positional arguments to differentiate with respect to.
    has_aux: whether ``fun`` returns ``(value, aux)``.
    holomorphic: as for ``jax.value_and_grad``.
    allow_int: as for ``jax.value_and_grad``.

  Returns:
    A function of the same arguments that returns ``(value, gradients)``. In the gradients, state
    is its new value in float32; state that no path of this call used is its old value.

  Raises:
    TypeError: as ``jax.value_and_grad``; or ``fun`` takes the state through
      ``shard_map(check_vma=False)``, across whose boundary JAX cannot take a maximum.

  Numerics:
    Gradients of everything else are those of ``jax.value_and_grad``, bit for bit.

  Example:
    >>> import jax, jax.numpy as jnp, flax.linen as nn
    >>> import flax_fp8 as fp8
    >>> layer = nn.Dense(4, dot_general_cls=fp8.Fp8DotGeneral)
    >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 4)))
    >>> twice = lambda v: jnp.sum(
    ...   layer.apply(v, jnp.ones((2, 4))) + layer.apply(v, jnp.zeros((2, 4)))
    ... )
    >>> loss, grads = fp8.value_and_grad(twice)(variables)
    >>> float(grads["_overwrite_with_gradient"]["Fp8DotGeneral_0"]["input_amax_history"][0])
    1.0

  References:
    jax.value_and_grad.
  """
  positions = (argnums,) if isinstance(argnums, int) else tuple(argnums)

  @functools.wraps(fun)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    cast = list(args)
    for i in positions:
      _check_differentiable(args[i], allow_int)
      cast[i] = as_max_grad(args[i])
    # JAX counts extended dtypes as integers here; _check_differentiable kept real integers out.
    run = jax.value_and_grad(fun, argnums, has_aux, holomorphic, allow_int=True)
    with _explain_arithmetic_on_state():
      value, grads = run(*cast, **kwargs)
    old = args[argnums] if isinstance(argnums, int) else tuple(args[i] for i in positions)
    return value, jax.tree_util.tree_map_with_path(_collect, grads, old)

  return wrapped


def grad(
  fun: Callable[..., Any],
  argnums: int | Sequence[int] = 0,
  has_aux: bool = False,
  holomorphic: bool = False,
  allow_int: bool = False,
) -> Callable[..., Any]:
  """Like ``jax.grad``, but state met on several paths comes back as the maximum.

  ``value_and_grad(fun)(...)[1]``, with the auxiliary output if ``has_aux``.

  Args:
    fun: as for ``value_and_grad``.
    argnums: as for ``value_and_grad``.
    has_aux: as for ``value_and_grad``.
    holomorphic: as for ``value_and_grad``.
    allow_int: as for ``value_and_grad``.

  Returns:
    A function that returns the gradients, or ``(gradients, aux)`` if ``has_aux``.

  Raises:
    TypeError: as ``value_and_grad``.

  Numerics:
    As ``value_and_grad``.

  Example:
    >>> import flax_fp8 as fp8
    >>> float(fp8.grad(lambda x: x * x)(3.0))
    6.0

  References:
    jax.grad.
  """
  run = value_and_grad(fun, argnums, has_aux, holomorphic, allow_int)

  @functools.wraps(fun)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    value, grads = run(*args, **kwargs)
    return (grads, value[1]) if has_aux else grads

  return wrapped


def _check_differentiable(argument: Any, allow_int: bool) -> None:
  for path, leaf in jax.tree_util.tree_leaves_with_path(argument):
    if (
      not allow_int
      and not is_max_grad(leaf)
      and not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    ):
      raise TypeError(
        "value_and_grad: arguments to differentiate must be real or complex; got "
        f"{jax.tree_util.keystr(path) or 'an argument'} of dtype {jnp.result_type(leaf)}. Pass it "
        "as another argument, or set allow_int=True."
      )


def _collect(path: Any, grad: Any, old: Any) -> Any:
  """Turns a leaf of a gradient into what the training loop takes: new state, or a gradient."""
  if not _is_state(path):
    return grad
  new = overwrite_leaf(old, grad)
  # Inside an unchecked shard_map all devices but the first emitted zero (flax_fp8.amax.emit_once).
  axes = _compat.unchecked_manual_axes()
  return lax.pmax(new, axes) if axes else new


def overwrite_leaf(old: Any, new: Any) -> jax.Array:
  """Returns new state as float32, or the old one where no path of the model used it.

  Args:
    old: state before the step; float32 or fp32_max_grad.
    new: its gradient; float32 or fp32_max_grad; ``-inf`` means that no path used the state.

  Returns:
    float32; shape of ``old``.
  """
  old, new = to_float32(old), to_float32(new)
  return jnp.where(jnp.isneginf(new), old, new)


@contextlib.contextmanager
def _explain_arithmetic_on_state() -> Generator[None]:
  """Says what to do where something, JAX's shard_map as a rule, calculates with fp32_max_grad."""
  try:
    yield
  except TypeError as error:
    if f"does not accept dtype {fp32_max_grad}" not in str(error):
      raise
    raise TypeError(
      "value_and_grad: FP8 state is fp32_max_grad in here and takes no arithmetic; got: "
      f"{error} shard_map(check_vma=False) does this at its boundary, where it sums cotangents: "
      "call it with check_vma=True, or call flax_fp8.value_and_grad inside the mapped function, "
      "or cast inside it, with as_max_grad(variables), and differentiate with jax.value_and_grad. "
      "In a loss of your own, leave the state out, with partition_for_grad_overwrite(variables)."
    ) from error


def partition_for_grad_overwrite(tree: Any) -> tuple[Any, Any]:
  """Splits variables or their gradients into FP8 state and the rest.

  Args:
    tree: nested mapping of collections, or any pytree; gradients of ``fp8.grad``, say.

  Returns:
    ``(overwrite, rest)``: nested dicts, the first with nothing but what lies under keys
    ``_overwrite_with_gradient``, the second with everything else. A tree that is no mapping is all
    rest.

  Example:
    >>> import flax_fp8 as fp8
    >>> fp8.partition_for_grad_overwrite({"params": 1.0, "_overwrite_with_gradient": 2.0})
    ({'_overwrite_with_gradient': 2.0}, {'params': 1.0})

  References:
    haliax.quantization.partition_for_grad_overwrite.
  """
  if not isinstance(tree, Mapping):
    return {}, tree
  overwrites, rest = {}, {}
  for key, value in tree.items():
    if key == OVERWRITE_WITH_GRADIENT:
      overwrites[key] = value
      continue
    below, rest[key] = partition_for_grad_overwrite(value)
    if below:
      overwrites[key] = below
  return overwrites, rest


def apply_updates(variables: Any, updates: Any, overwrite: Any) -> Any:
  """Adds updates to parameters, writes new FP8 state over the old, and keeps all else.

  ``{"params": params + updates, "_overwrite_with_gradient": overwrite, ...}``

  Args:
    variables: nested mapping of collections before the step.
    updates: of ``optax``; a tree of the shape of ``partition_for_grad_overwrite(variables)[1]``, or
      of some of its collections.
    overwrite: new state, as ``partition_for_grad_overwrite(gradients)[0]``.

  Returns:
    Variables after the step, of the structure of ``variables``.

  Raises:
    ValueError: ``overwrite`` does not hold exactly the state that ``variables`` holds, or
      ``updates`` holds what ``variables`` does not; names the paths.

  Numerics:
    State that no path of the step used (its new value is ``-inf``, or its scale is zero, which no
    scale ever is) keeps its old value. State is float32 after the step.

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
  old_state, old_rest = partition_for_grad_overwrite(variables)
  _check_same_paths("overwrite", overwrite, old_state)
  new_state = keep_unused(old_state, overwrite)
  new_rest = _add(old_rest, updates, ())
  merged = merge(new_rest, new_state)
  return flax.core.freeze(merged) if isinstance(variables, flax.core.FrozenDict) else merged


def _check_same_paths(name: str, given: Any, expected: Any) -> None:
  shapes = lambda tree: {
    jax.tree_util.keystr(path): jnp.shape(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(flax.core.unfreeze(tree))
  }
  got, want = shapes(given), shapes(expected)
  missing = sorted(want.keys() - got.keys())
  extra = sorted(got.keys() - want.keys())
  other = sorted(
    f"{k} {got[k]} for {want[k]}" for k in want.keys() & got.keys() if got[k] != want[k]
  )
  if missing or extra or other:
    raise ValueError(
      f"apply_updates: {name} must have the FP8 state of the variables; got {missing=}, "
      f"{extra=}, other shapes={other}. Differentiate with respect to the whole variables dict, "
      "params and state, and pass on its gradient unchanged."
    )


def _add(old: Any, updates: Any, path: tuple[str, ...]) -> Any:
  """Adds updates to what they name, and keeps what they don't."""
  if not isinstance(old, Mapping) or not isinstance(updates, Mapping):
    return optax.apply_updates(old, updates)
  if unknown := sorted(set(updates) - set(old)):
    raise ValueError(
      f"apply_updates: updates must name parameters of the variables; got {unknown} at "
      f"{'/'.join(path) or 'the top'}, where there are {sorted(old)}. Pass what tx.update returned "
      "for the gradients of these variables."
    )
  return {
    key: _add(value, updates[key], (*path, key)) if key in updates else value
    for key, value in old.items()
  }


def merge(rest: Any, state: Any) -> Any:
  """Puts together again what ``partition_for_grad_overwrite`` split."""
  if not state:
    return rest
  both = {key: merge(value, state[key]) if key in state else value for key, value in rest.items()}
  return {**both, **{key: value for key, value in state.items() if key not in rest}}


def keep_unused(old: Any, new: Any) -> Any:
  """Returns the new state, but the old one where no path of the step used it.

  Args:
    old: state before the step; nested mapping down to the variables of a module.
    new: its gradient, of the same structure; float32 or fp32_max_grad.

  Returns:
    float32; of the structure of ``old``, as nested dicts.
  """
  if not isinstance(old, Mapping):
    return overwrite_leaf(old, new)
  if any(isinstance(value, Mapping) for value in old.values()):
    return {key: keep_unused(value, new[key]) for key, value in old.items()}
  return {key: _keep_unused_variable(key, old, new) for key in old}


def _keep_unused_variable(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> jax.Array:
  """Decides by the variable itself (-inf), and by the scale beside it (zero)."""
  kept = overwrite_leaf(old[name], new[name])
  roles = [role.value for role in Role if name.startswith(f"{role.value}_")]
  scales = [f"{role}_scale" for role in roles if f"{role}_scale" in new]
  for scale in scales:
    kept = jnp.where(to_float32(new[scale]) == 0, to_float32(old[name]), kept)
  return kept
