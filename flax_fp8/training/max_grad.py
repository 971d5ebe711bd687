"""Differentiation that accumulates FP8 state by maximum and everything else by sum."""

from __future__ import annotations

import contextlib
import functools
import numbers
import operator
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_fp8 import fields, varying
from flax_fp8.linen.containers import leaves_with_path, map_with_path
from flax_fp8.linen.state import OVERWRITE_WITH_GRADIENT, is_state
from flax_fp8.meta_dtype import fp32_max_grad, is_max_grad, require_float32, to_max_grad
from flax_fp8.state_cast import cast_here, cast_once
from flax_fp8.training.state import overwrite_leaf


def as_max_grad(variables: Any) -> Any:
  """Casts the FP8 state in a tree to ``fp32_max_grad`` and leaves the rest unchanged.

  Differentiate with respect to the result, or to the tree before the cast. The gradient of state
  that is used on several paths is then the maximum over the paths instead of the sum. Cast outside
  every loop, pipeline and remat that takes the state.

  Args:
    variables: any pytree. Its state is every leaf under a key ``_overwrite_with_gradient``.

  Returns:
    The tree with every float32 state leaf as fp32_max_grad; same shapes.

  Raises:
    TypeError: a state leaf is neither float32 nor fp32_max_grad.

  Numerics:
    The cast keeps all bits.

  Example:
    >>> import jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> cast = fp8.as_max_grad({"params": jnp.ones(2), "_overwrite_with_gradient": jnp.ones(1)})
    >>> {name: str(x.dtype) for name, x in sorted(cast.items())}
    {'_overwrite_with_gradient': 'fp32_max_grad', 'params': 'float32'}

  References:
    flax.linen.fp8_ops.fp32_max_grad.
  """
  return map_with_path(_cast_if_state, variables)


def _cast_if_state(path: Any, leaf: Any) -> Any:
  if not is_state(path) or is_max_grad(leaf):
    return leaf
  if not isinstance(leaf, float):
    require_float32("as_max_grad", jax.tree_util.keystr(path), leaf)
  return to_max_grad(cast_once(leaf))


def value_and_grad(
  fun: Callable[..., Any],
  argnums: int | Sequence[int] = 0,
  has_aux: bool = False,
  holomorphic: bool = False,
  allow_int: bool = False,
) -> Callable[..., Any]:
  """Like ``jax.value_and_grad``, but FP8 state accumulates by maximum over its uses.

  Equals ``jax.value_and_grad(fun)(as_max_grad(variables))`` with the state cast back to float32.
  The modules make this cast too, so ``jax.value_and_grad`` differs in two cases only. It sums the
  state if several calls of one remat or jitted function take it as an argument. It returns zero
  for state that no path used.

  Args:
    fun: function that returns a real scalar, or a pair if ``has_aux``. It gets the FP8 state of
      the differentiated arguments as fp32_max_grad.
    argnums: positional arguments to differentiate with respect to.
    has_aux: whether ``fun`` returns ``(value, aux)``.
    holomorphic: as for ``jax.value_and_grad``.
    allow_int: as for ``jax.value_and_grad``.

  Returns:
    A function of the same arguments that returns ``(value, gradients)``. In the gradients, state
    is its new value in float32. State that no path of this call used is its old value.

  Raises:
    TypeError: the conditions of ``jax.value_and_grad``; ``fun`` passes the state through
      ``shard_map(check_vma=False)``, where JAX cannot accumulate by maximum; ``fun`` computes with
      the state; or ``fun`` has a ``custom_vjp`` that closes over the state.
    ValueError: ``argnums`` is empty, repeats an argument, or names an argument that was not passed
      by position.

  Numerics:
    All other gradients equal those of ``jax.value_and_grad``, bit for bit.
    ``jax.lax.stop_gradient`` has no effect on FP8 state here, because JAX returns extended dtypes
    unchanged. To run a frozen teacher with the same variables, use ``jax.value_and_grad`` and
    ``TrainState.apply_fn`` instead.

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
  return value_and_grad_as("value_and_grad", fun, argnums, has_aux, holomorphic, allow_int)


def value_and_grad_as(
  owner: str,
  fun: Any,
  argnums: Any,
  has_aux: Any,
  holomorphic: bool = False,
  allow_int: bool = False,
) -> Callable[..., Any]:
  """Implements ``value_and_grad``; ``owner`` is the function that errors name."""
  fields.function(owner, "fun", fun, "Pass the loss, a function, not its value.")
  fields.flag(owner, "has_aux", has_aux)
  argnums = _check_argnums(owner, argnums)

  def checked(*args: Any, **kwargs: Any) -> Any:
    return require_loss(owner, "fun", fun(*args, **kwargs), has_aux, holomorphic)

  run = value_and_cotangents(
    functools.wraps(fun)(checked), argnums, has_aux, holomorphic, allow_int, owner=owner
  )

  @functools.wraps(fun)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    value, cotangents = run(*args, **kwargs)
    old = args[argnums] if isinstance(argnums, int) else tuple(args[i] for i in argnums)
    return value, collect(cotangents, old)

  return wrapped


def grad(
  fun: Callable[..., Any],
  argnums: int | Sequence[int] = 0,
  has_aux: bool = False,
  holomorphic: bool = False,
  allow_int: bool = False,
) -> Callable[..., Any]:
  """Like ``jax.grad``, but FP8 state accumulates by maximum over its uses.

  Equals ``value_and_grad(fun)(...)[1]``, with the auxiliary output if ``has_aux``.

  Args:
    fun: as for ``value_and_grad``.
    argnums: as for ``value_and_grad``.
    has_aux: as for ``value_and_grad``.
    holomorphic: as for ``value_and_grad``.
    allow_int: as for ``value_and_grad``.

  Returns:
    A function that returns the gradients, or ``(gradients, aux)`` if ``has_aux``.

  Raises:
    TypeError: as for ``value_and_grad``.
    ValueError: as for ``value_and_grad``.

  Numerics:
    As for ``value_and_grad``.

  Example:
    >>> import flax_fp8 as fp8
    >>> float(fp8.grad(lambda x: x * x)(3.0))
    6.0

  References:
    jax.grad.
  """
  run = value_and_grad_as("grad", fun, argnums, has_aux, holomorphic, allow_int)

  @functools.wraps(fun)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    value, grads = run(*args, **kwargs)
    return (grads, value[1]) if has_aux else grads

  return wrapped


def value_and_cotangents(
  fun: Callable[..., Any],
  argnums: int | Sequence[int] = 0,
  has_aux: bool = False,
  holomorphic: bool = False,
  allow_int: bool = False,
  *,
  owner: str = "value_and_grad",
) -> Callable[..., Any]:
  """Like ``value_and_grad``, but returns the raw cotangents, to be combined before ``collect``.

  State is fp32_max_grad, and ``-inf`` if no path used it.
  """
  positions = (argnums,) if isinstance(argnums, int) else tuple(argnums)

  @functools.wraps(fun)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    cast = list(args)
    if not all(-len(args) <= i < len(args) for i in positions):
      raise ValueError(
        f"{owner}: argnums must be positions of the {len(args)} positional arguments; got "
        f"{argnums=} and the keywords {fields.cut([*kwargs])}. Pass the differentiated arguments "
        "by position."
      )
    for i in positions:
      _check_differentiable(owner, args[i], allow_int)
      cast[i] = as_max_grad(args[i])
    # JAX counts extended dtypes as integers here. _check_differentiable refused real integers.
    run = jax.value_and_grad(fun, argnums, has_aux, holomorphic, allow_int=True)
    with cast_here(), _explain_use_of_state(owner):
      return run(*cast, **kwargs)

  return wrapped


def collect(cotangents: Any, old: Any) -> Any:
  """Converts cotangents to gradients for a training loop, with the new value of state.

  Args:
    cotangents: from ``value_and_cotangents``; state is float32 or fp32_max_grad.
    old: the differentiated arguments.
  """
  return map_with_path(_collect, cotangents, old)


def _check_argnums(owner: str, argnums: Any) -> Any:
  """Returns ``argnums`` as an integer or a tuple of integers."""
  try:
    is_one = isinstance(argnums, numbers.Integral)
    if isinstance(argnums, bool | jax.Array | np.ndarray):
      raise TypeError
    positions = tuple(map(operator.index, [argnums] if is_one else argnums))
  except TypeError:
    raise TypeError(
      f"{owner}: argnums must be an integer or a sequence of integers; got "
      f"argnums={fields.show(argnums)}. Pass the positions of the arguments."
    ) from None
  if len({*positions}) != max(len(positions), 1):
    raise ValueError(
      f"{owner}: argnums must name each argument once, and at least one; got {argnums=}. Pass 0 "
      "for the first argument."
    )
  return positions[0] if is_one else positions


def is_real_scalar(value: Any, holomorphic: bool = False) -> bool:
  """Returns whether a value can be differentiated as a loss."""
  try:
    aval = jax.typeof(value)
  except TypeError:
    return False
  return aval.shape == () and jnp.issubdtype(
    aval.dtype, jnp.inexact if holomorphic else jnp.floating
  )


def require_loss(
  owner: str, field: str, value: Any, has_aux: bool, holomorphic: bool = False
) -> Any:
  """Returns the output of a loss function; raises TypeError if it can't be differentiated."""
  is_pair = isinstance(value, tuple | list) and len(value) == 2
  if (has_aux and not is_pair) or not is_real_scalar(value[0] if has_aux else value, holomorphic):
    raise TypeError(
      f"{owner}: {field} must return a real scalar, or (scalar, aux) with has_aux=True; got "
      f"{fields.show(value)} with {has_aux=}. Take the mean if the loss is an array."
    )
  return value


def _check_differentiable(owner: str, argument: Any, allow_int: bool) -> None:
  for path, leaf in leaves_with_path(argument):
    if is_max_grad(leaf):
      continue
    try:
      dtype = jax.typeof(leaf).dtype
    except TypeError:
      dtype = None
    if dtype is None or not (allow_int or jnp.issubdtype(dtype, jnp.inexact)):
      got = type(leaf).__name__ if dtype is None else f"dtype {dtype}"
      cure = "leave it out" if dtype is None else "set allow_int=True"
      raise TypeError(
        f"{owner}: arguments to differentiate must be real or complex arrays; got "
        f"{fields.cut(jax.tree_util.keystr(path)) or 'an argument'} of {got}. Pass it as another "
        f"argument, or {cure}."
      )


def _collect(path: Any, grad: Any, old: Any) -> Any:
  """Converts the cotangent of one leaf to a gradient or to new state."""
  if not is_state(path):
    return grad
  new = overwrite_leaf(old, grad)
  # If a cached program was traced for another body, only the first device may give a nonzero value.
  axes = varying.unchecked_manual_axes()
  return lax.pmax(new, axes) if axes else new


@contextlib.contextmanager
def _explain_use_of_state(owner: str) -> Generator[None]:
  """Rewrites JAX's errors for operations that state does not support, with advice."""
  try:
    yield
  except TypeError as error:
    text, name = str(error), str(fp32_max_grad)
    for words, explanation in _USES_OF_STATE.items():
      if words.format(name) in text:
        rule, cure = explanation
        got = fields.cut(text).rstrip(".")
        raise TypeError(f"{owner}: {rule}; got: {got}. {cure}") from error
    raise


_ARITHMETIC = (
  "FP8 state is fp32_max_grad here and takes no arithmetic",
  "Exclude the state from the loss with partition_for_grad_overwrite(variables).",
)
_CUSTOM_VJP = f'grad_vars=["params", {OVERWRITE_WITH_GRADIENT!r}]'
# Keyed by a part of JAX's error text, where {} is the dtype.
_USES_OF_STATE = {
  "accept dtype {}": _ARITHMETIC,
  "interpret '{}'": _ARITHMETIC,
  "float0": (
    "cotangents of FP8 state and of integers take no arithmetic",
    "In the backward_fn of nn.custom_vjp, return cotangents below "
    f"{OVERWRITE_WITH_GRADIENT!r} unchanged, with jax.tree_util.tree_map_with_path.",
  ),
  "with type {}[": (
    "a function with a custom derivative must take FP8 state as an argument",
    f"Pass nn.custom_vjp(..., {_CUSTOM_VJP}), and the same list as vjp_variables of nn.vjp.",
  ),
}
