"""Casts state to ``fp32_max_grad`` at the place where all of its cotangents meet after the cast.

The cast must be outside of every loop. It must also be inside of every boundary at which JAX itself
sums cotangents, such as an unchecked shard_map.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import operator
import weakref
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax

from flax_fp8 import _compat, varying
from flax_fp8.meta_dtype import is_max_grad, to_float32, to_max_grad

# For each live float32 tracer: a reference to the tracer, and a function that returns its cast.
_casts: dict[int, tuple[weakref.ref[Any], Callable[[], Any]]] = {}


def emit_once(new_state: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """Prepares a new state for the sum over devices that JAX applies to a shard_map's cotangents.

  Args:
    new_state: one leaf; float32; equal on all devices.
    axes: mesh axes that JAX will sum over; may be empty.

  Returns:
    The cotangent: ``new_state`` on the first device and zero on the others.
  """
  if not axes:
    return new_state
  is_first = functools.reduce(operator.and_, [lax.axis_index(axis) == 0 for axis in axes])
  return jnp.where(is_first, new_state, jnp.zeros_like(new_state))


def cast_once(value: Any) -> Any:
  """Casts a traced float32 value to fp32_max_grad, once for each tracer.

  A program may read state in several places, such as inside and after a loop, or in two applies of
  one loss. If each place made its own cast, their cotangents would meet in float32 and be summed.
  This function therefore makes one cast under the tracer's own trace, outside of every loop that
  closes over it. The cast is cached as long as the tracer is alive.

  Args:
    value: any value.

  Returns:
    The cast of a float32 tracer. Values of dtype fp32_max_grad and values that are not traced are
    returned unchanged. If the body of a ``shard_map(check_vma=False)`` closes over the tracer, the
    cast is made inside of the body.
  """
  if not isinstance(value, jax.core.Tracer):
    return value
  cast = value if is_max_grad(value) else _cast_under_own_trace(value)
  axes = frozenset(varying.unchecked_manual_axes()) - varying.manual_axes(value)
  if not axes or _compat.is_of_running_body(value):
    return cast
  # JAX sums cotangents at this boundary, which it can do only in float32.
  with _compat.under_trace_of(cast):
    plain = _in_float32(cast)
  with _compat.in_running_body():
    return _enter(tuple(sorted(axes)), plain)


@jax.custom_vjp
def _in_float32(value: jax.Array) -> jax.Array:
  """``to_float32`` with a derivative. JAX's conversion from an extended dtype has none."""
  return to_float32(value)


_in_float32.defvjp(lambda value: (to_float32(value), None), lambda _, new: (to_max_grad(new),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _enter(axes: tuple[str, ...], value: jax.Array) -> jax.Array:
  """Casts a value from outside of a shard_map. Only one device contributes its cotangent."""
  del axes
  return to_max_grad(value)


def _enter_forward(axes: tuple[str, ...], value: jax.Array) -> tuple[jax.Array, None]:
  return _enter(axes, value), None


def _enter_backward(axes: tuple[str, ...], _: None, new: jax.Array) -> tuple[jax.Array]:
  return (emit_once(to_float32(new), axes),)


_enter.defvjp(_enter_forward, _enter_backward)


def _cast_under_own_trace(value: Any) -> jax.Array:
  """Casts a float32 tracer, or returns its cached cast."""
  key = id(value)
  if key in _casts:
    tracer, cast_of = _casts[key]
    if tracer() is value and (cast := cast_of()) is not None:
      return cast
  with _compat.under_trace_of(value):
    cast = to_max_grad(value)

  def forget(dead: weakref.ref[Any]) -> None:
    if _casts.get(key, (None,))[0] is dead:
      del _casts[key]

  # A jaxpr keeps the cast alive, and the cast its operand. A weak reference avoids a cycle.
  held = weakref.ref(cast) if _compat.keeps_its_operands(cast) else lambda: cast
  _casts[key] = (weakref.ref(value, forget), held)
  return cast


_cast_under: contextvars.ContextVar[frozenset[str] | None]
_cast_under = contextvars.ContextVar("cast_under", default=None)


@contextlib.contextmanager
def cast_here() -> Generator[None]:
  """Records the unchecked shard_maps that enclose a cast, for ``entered_since_cast``."""
  token = _cast_under.set(frozenset(varying.unchecked_manual_axes()))
  try:
    yield
  finally:
    _cast_under.reset(token)


def entered_since_cast() -> frozenset[str]:
  """Returns the axes of unchecked shard_maps entered since the cast to fp32_max_grad.

  JAX sums cotangents at the boundary of such a shard_map, but can't sum this dtype. Its own error
  appears only when it compiles, and does not name the cause.
  """
  under = _cast_under.get()
  return frozenset() if under is None else frozenset(varying.unchecked_manual_axes()) - under
