"""``fp32_max_grad``: float32 in memory, but autodiff accumulates its cotangents by maximum.

The gradient of a scale or of an amax history is its new value. Where one state is used on several
paths, the sum of the new values means nothing; the maximum is right, since every path computes the
same scale from the same old history and differs only in the amax that it saw.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import operator
import weakref
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_fp8 import _compat


class MaxGradRules:
  """What JAX asks of an extended dtype: how to lower, convert, fill and add it."""

  allow_conversion: bool = True
  scalar_elements: bool = True

  @staticmethod
  def physical_element_aval(dtype: Any) -> Any:
    """Each element is one float32."""
    del dtype
    return _compat.scalar_aval()

  @staticmethod
  def convert_from(dtype: MaxGradDType, other: Any) -> bool:
    """Conversion to float32 alone is allowed."""
    return other == dtype.float_dtype

  @staticmethod
  def convert_to(other: Any, dtype: MaxGradDType) -> bool:
    """Conversion from float32 alone is allowed."""
    return other == dtype.float_dtype

  @staticmethod
  def add(dtype: MaxGradDType, x: Any, y: Any) -> jax.Array:
    """Autodiff's sum of two cotangents: their maximum."""
    return _wrap(lax.max(to_float32(x), to_float32(y)), dtype)

  @staticmethod
  def zero(dtype: MaxGradDType) -> jax.Array:
    """The neutral element of ``add``: ``max(-inf, x) == x``, and -inf means that no path came."""
    return _wrap(np.float32(-np.inf), dtype)

  @staticmethod
  def full(shape: Any, fill_value: Any, dtype: MaxGradDType) -> jax.Array:
    """As ``lax.full``; the integer 0, with which JAX transposes a select, is ``zero``."""
    if type(fill_value) is int and fill_value == 0:
      fill_value = -np.inf
    elif jnp.issubdtype(jax.typeof(fill_value).dtype, jax.dtypes.extended):
      fill_value = to_float32(fill_value)
    return _wrap(lax.full(shape, fill_value, dtype.float_dtype), dtype)

  @staticmethod
  def tangent_dtype(dtype: MaxGradDType) -> MaxGradDType:
    """Tangents are of the same dtype: a new state is a state."""
    return dtype

  global_sharded_result_handler = staticmethod(_compat.wrapped_result_handler)
  make_sharded_array = staticmethod(_compat.wrapped_from_shards)


class max_grad(jax.dtypes.extended):  # noqa: N801 - a scalar type, named as NumPy names them
  """Scalar type of ``fp32_max_grad``, for ``jnp.issubdtype(x.dtype, max_grad)``."""


@dataclasses.dataclass(frozen=True)
class MaxGradDType(_compat.ExtendedDType):
  """Class of the dtype ``fp32_max_grad``.

  Attributes:
    float_dtype: the dtype in memory.
    type: the scalar type that ``jnp.issubdtype`` takes.
  """

  float_dtype: Any = np.dtype("float32")
  _rules: type = MaxGradRules
  type: type = max_grad

  def __post_init__(self) -> None:
    if np.dtype(self.float_dtype) != np.float32:
      raise ValueError(
        f"MaxGradDType: the dtype in memory must be float32; got {self.float_dtype}. Use "
        "fp32_max_grad."
      )
    object.__setattr__(self, "float_dtype", np.dtype("float32"))

  @property
  def name(self) -> str:
    """Name of the dtype, as arrays print it."""
    return "fp32_max_grad"

  @property
  def itemsize(self) -> int:
    """Bytes an element."""
    return self.float_dtype.itemsize

  def __repr__(self) -> str:
    return self.name


fp32_max_grad = MaxGradDType()


def _wrap(x: Any, dtype: MaxGradDType) -> jax.Array:
  return lax.convert_element_type(x, dtype)


def is_max_grad(x: Any) -> bool:
  """Tells whether an array, tracer or ShapeDtypeStruct is of dtype fp32_max_grad."""
  return getattr(x, "dtype", None) == fp32_max_grad


def to_max_grad(x: Any) -> jax.Array:
  """Casts float32 to fp32_max_grad; leaves fp32_max_grad as it is."""
  return x if is_max_grad(x) else _wrap(x, fp32_max_grad)


def to_float32(x: Any) -> jax.Array:
  """Casts fp32_max_grad to float32; leaves any other dtype as it is."""
  return lax.convert_element_type(x, jnp.float32) if is_max_grad(x) else x


def like(x: Any, old: Any) -> jax.Array:
  """Casts new float32 state to the dtype, float32 or fp32_max_grad, that the old state has."""
  return to_max_grad(x) if is_max_grad(old) else x


# The cast of each float32 tracer that is alive: a reference to the tracer, and a way to its cast.
_casts: dict[int, tuple[weakref.ref[Any], Callable[[], Any]]] = {}


def emit_once(new_state: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """Prepares a new state for being summed over devices, as cotangents of a shard_map's inputs are.

  Args:
    new_state: one leaf; float32; equal on all devices.
    axes: mesh axes that JAX will sum over; may be empty.

  Returns:
    The cotangent: ``new_state`` on the first device, and zero on the others.
  """
  if not axes:
    return new_state
  is_first = functools.reduce(operator.and_, [lax.axis_index(axis) == 0 for axis in axes])
  return jnp.where(is_first, new_state, jnp.zeros_like(new_state))


def cast_once(value: Any) -> Any:
  """Casts a traced float32 value to fp32_max_grad, the same tracer always to the same cast.

  State may be read in several places: in a loop and behind it, in two applies of one loss. If each
  place made its own cast, their cotangents would meet behind the casts, in float32, and be summed.
  So the cast is made once, under the trace that the tracer belongs to, outside of every loop that
  closes over it. An entry lives as long as its tracer does.

  Args:
    value: any value.

  Returns:
    The cast of a float32 tracer; fp32_max_grad, or what is not traced, as it is. Where the body of
    a ``shard_map(check_vma=False)`` closes over the tracer, a cast that is made inside.
  """
  if not isinstance(value, jax.core.Tracer):
    return value
  cast = value if is_max_grad(value) else _cast_under_own_trace(value)
  axes = frozenset(_compat.unchecked_manual_axes()) - _compat.manual_axes(value)
  if not axes or _compat.is_of_running_body(value):
    return cast
  # JAX sums cotangents at that boundary, as it can do in float32 alone.
  with _compat.under_trace_of(cast):
    plain = _in_float32(cast)
  with _compat.in_running_body():
    return _enter(tuple(sorted(axes)), plain)


@jax.custom_vjp
def _in_float32(value: jax.Array) -> jax.Array:
  """``to_float32`` with a derivative, which JAX's conversion from an extended dtype lacks."""
  return to_float32(value)


_in_float32.defvjp(lambda value: (to_float32(value), None), lambda _, new: (to_max_grad(new),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _enter(axes: tuple[str, ...], value: jax.Array) -> jax.Array:
  """Casts a value that comes from outside of a shard_map; only one device gives its cotangent."""
  del axes
  return to_max_grad(value)


def _enter_forward(axes: tuple[str, ...], value: jax.Array) -> tuple[jax.Array, None]:
  return _enter(axes, value), None


def _enter_backward(axes: tuple[str, ...], _: None, new: jax.Array) -> tuple[jax.Array]:
  return (emit_once(to_float32(new), axes),)


_enter.defvjp(_enter_forward, _enter_backward)


def _cast_under_own_trace(value: Any) -> jax.Array:
  """Casts a float32 tracer, or returns the cast that was made of it before."""
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

  # A cast in a jaxpr holds its operand, and its program holds the cast: here it is held weakly.
  held = weakref.ref(cast) if _compat.keeps_its_operands(cast) else lambda: cast
  _casts[key] = (weakref.ref(value, forget), held)
  return cast


_cast_under: contextvars.ContextVar[frozenset[str] | None]
_cast_under = contextvars.ContextVar("cast_under", default=None)


@contextlib.contextmanager
def cast_here() -> Generator[None]:
  """Notes inside which unchecked shard_maps state is cast, for ``entered_since_cast``."""
  token = _cast_under.set(frozenset(_compat.unchecked_manual_axes()))
  try:
    yield
  finally:
    _cast_under.reset(token)


def entered_since_cast() -> frozenset[str]:
  """Returns the axes of unchecked shard_maps between the cast to fp32_max_grad and here.

  At their boundary JAX sums cotangents, which it can't do in this dtype, and says so only when it
  compiles, in words that don't help.
  """
  under = _cast_under.get()
  return frozenset() if under is None else frozenset(_compat.unchecked_manual_axes()) - under
