"""``fp32_max_grad``: a dtype stored as float32 whose cotangents autodiff combines by maximum.

The gradient of a scale or an amax history is its new value. If several paths use one state, the sum
of their new values has no meaning. The maximum is correct: all paths start from the same old state
and differ only in the amax that they observe.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives

from flax_fp8 import _compat


class MaxGradRules(_compat.ElementRules):
  """The rules that JAX requires of an extended dtype: lowering, conversion, fill and addition."""

  @staticmethod
  def physical_element_aval(dtype: Any) -> Any:
    """Each element is one float32."""
    del dtype
    return jax.core.ShapedArray((), jnp.dtype("float32"))

  @staticmethod
  def convert_from(dtype: MaxGradDType, other: Any) -> bool:
    """Allows conversion to float32 only."""
    return other == dtype.float_dtype

  @staticmethod
  def convert_to(other: Any, dtype: MaxGradDType) -> bool:
    """Allows conversion from float32 only."""
    return other == dtype.float_dtype

  @staticmethod
  def add(dtype: MaxGradDType, x: Any, y: Any) -> jax.Array:
    """Combines two cotangents by their maximum, where autodiff would add them."""
    del dtype
    return _maximum(x, y)

  @staticmethod
  def zero(dtype: MaxGradDType) -> jax.Array:
    """The neutral element of ``add``, -inf. It means that no path contributed a value."""
    return _wrap(np.float32(-np.inf), dtype)

  @staticmethod
  def full(shape: Any, fill_value: Any, dtype: MaxGradDType) -> jax.Array:
    """Like ``lax.full``. The integer 0, which JAX uses to transpose a select, gives ``zero``."""
    if type(fill_value) is int and fill_value == 0:
      fill_value = -np.inf
    elif jnp.issubdtype(jax.typeof(fill_value).dtype, jax.dtypes.extended):
      fill_value = to_float32(fill_value)
    # Constants avoid a JAX operation, whose result JAX's debug modes would check.
    is_constant = isinstance(fill_value, (int, float, np.generic))
    full = np.full if is_constant else lax.full
    return _wrap(full(shape, fill_value, dtype.float_dtype), dtype)

  @staticmethod
  def tangent_dtype(dtype: MaxGradDType) -> MaxGradDType:
    """Tangents have the same dtype, since a new state is a state."""
    return dtype


class max_grad(jax.dtypes.extended):  # noqa: N801 - a scalar type, named as NumPy names them
  """Scalar type of ``fp32_max_grad``, for ``jnp.issubdtype(x.dtype, max_grad)``."""


@dataclasses.dataclass(frozen=True)
class MaxGradDType(_compat.ExtendedDType):
  """The class of the dtype ``fp32_max_grad``.

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
    """The name of the dtype, as arrays print it."""
    return "fp32_max_grad"

  @property
  def itemsize(self) -> int:
    """Bytes per element."""
    return self.float_dtype.itemsize

  def __repr__(self) -> str:
    return self.name


fp32_max_grad = MaxGradDType()


# Each of these functions compiles to one program outside of a trace. JAX's debug modes check the
# float32 results of single operations, and would stop at -inf.
@functools.partial(jax.jit, inline=True)
def _maximum(x: Any, y: Any) -> jax.Array:
  return to_max_grad(lax.max(to_float32(x), to_float32(y)))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4), inline=True)
def _put_back(new: jax.Array, whole: Any, start: Any, limit: Any, strides: Any) -> jax.Array:
  """Transposes a slice. Elements outside of the slice become -inf, the neutral element."""
  cut = lambda x: lax.slice(x, start, limit, strides)
  put = jax.linear_transpose(cut, jax.ShapeDtypeStruct(whole, jnp.float32))
  (values,), (came,) = put(to_float32(new)), put(jnp.ones(new.shape, jnp.float32))
  return to_max_grad(jnp.where(came == 0, -jnp.inf, values))


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def _largest(new: jax.Array, of: tuple[int, ...], places: tuple[int, ...]) -> jax.Array:
  """Transposes ``broadcast_in_dim``: takes the maximum over the copies of each element."""
  kept = [to for to, size in zip(places, of, strict=True) if size == new.shape[to]]
  copied = tuple(axis for axis in range(new.ndim) if axis not in kept)
  return to_max_grad(jnp.max(to_float32(new), copied).reshape(of))


def _transpose_slice(new: jax.Array, whole: tuple[int, ...], /, **params: Any) -> jax.Array:
  where = (params["start_indices"], params["limit_indices"], params["strides"])
  return _put_back(new, whole, *where)


def _transpose_broadcast(new: jax.Array, of: tuple[int, ...], /, **params: Any) -> jax.Array:
  return _largest(new, of, tuple(params["broadcast_dimensions"]))


_compat.transpose_in(fp32_max_grad, primitives.slice_p, _transpose_slice)
_compat.transpose_in(fp32_max_grad, primitives.broadcast_in_dim_p, _transpose_broadcast)


def _wrap(x: Any, dtype: MaxGradDType) -> jax.Array:
  return lax.convert_element_type(x, dtype)


def is_max_grad(x: Any) -> bool:
  """Tells whether an array, tracer or ShapeDtypeStruct has the dtype fp32_max_grad."""
  return getattr(x, "dtype", None) == fp32_max_grad


def to_max_grad(x: Any) -> jax.Array:
  """Casts float32 to fp32_max_grad. Returns fp32_max_grad unchanged."""
  return x if is_max_grad(x) else _wrap(x, fp32_max_grad)


def to_float32(x: Any) -> jax.Array:
  """Casts fp32_max_grad to float32. Returns any other dtype unchanged."""
  return lax.convert_element_type(x, jnp.float32) if is_max_grad(x) else x


def require_float32(name: str, where: str, leaf: Any) -> None:
  """Raises TypeError if a leaf of FP8 state is neither float32 nor fp32_max_grad."""
  dtype = getattr(leaf, "dtype", type(leaf).__name__)
  if not is_max_grad(leaf) and dtype != jnp.float32:
    raise TypeError(
      f"{name}: FP8 state must be float32; got {where} of dtype {dtype}. Keep the collection "
      "'_overwrite_with_gradient' out of casts of variables; upgrade_variables(model, variables, "
      "*inputs) casts it back."
    )


def like(x: Any, old: Any) -> jax.Array:
  """Casts new float32 state to the dtype of the old state, float32 or fp32_max_grad."""
  return to_max_grad(x) if is_max_grad(old) else x
