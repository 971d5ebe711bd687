"""A dtype for FP8 data with straight-through derivatives.

JAX gives an FP8 array tangents in FP8 without a scale: small tangents become zero, large ones NaN.
Quantized data that may be differentiated again therefore has an extended dtype with the same bits.
Its tangents have the dtype and the units of the original tensor, and quantization passes them
through unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.extend.core
import numpy as np
from jax import lax
from jax.interpreters import ad, batching, mlir

from flax_fp8 import _compat


class QuantizedRules(_compat.ElementRules):
  """The rules that JAX requires of an extended dtype."""

  @staticmethod
  def physical_element_aval(dtype: Any) -> Any:
    """Each element is one FP8 value."""
    return jax.core.ShapedArray((), dtype.fp8)

  @staticmethod
  def convert_from(dtype: QuantizedDType, other: Any) -> bool:
    """Allows conversion to its FP8 dtype only."""
    return other == dtype.fp8

  @staticmethod
  def convert_to(other: Any, dtype: QuantizedDType) -> bool:
    """Allows conversion from its FP8 dtype only."""
    return other == dtype.fp8

  @staticmethod
  def tangent_dtype(dtype: QuantizedDType) -> Any:
    """Tangents have the dtype of the original tensor."""
    return dtype.tangent

  @staticmethod
  def zero(dtype: QuantizedDType) -> jax.Array:
    """The fill value for residuals of a branch that was not taken."""
    return lax.convert_element_type(np.zeros((), dtype.fp8), dtype)

  @staticmethod
  def full(shape: Any, fill_value: Any, dtype: QuantizedDType) -> jax.Array:
    """Like ``lax.full``."""
    return lax.convert_element_type(lax.full(shape, fill_value, dtype.fp8), dtype)


class quantized(jax.dtypes.extended):  # noqa: N801 - a scalar type, named as NumPy names them
  """Scalar type of every ``QuantizedDType``."""


@dataclasses.dataclass(frozen=True)
class QuantizedDType(_compat.ExtendedDType):
  """The dtype of FP8 data that is differentiated as the original tensor.

  Attributes:
    fp8: the dtype in memory.
    tangent: the dtype of tangents and cotangents.
    type: the scalar type that ``jnp.issubdtype`` takes.
  """

  fp8: np.dtype[Any]
  tangent: np.dtype[Any]
  _rules: type = QuantizedRules
  type: type = quantized

  @property
  def name(self) -> str:
    """The name of the dtype, as arrays print it."""
    return f"{self.fp8.name}_of_{self.tangent.name}"

  @property
  def itemsize(self) -> int:
    """Bytes per element."""
    return self.fp8.itemsize

  def __repr__(self) -> str:
    return self.name


def with_tangent(value: Callable[..., Any], tangent: Callable[..., Any], *args: Any) -> jax.Array:
  """Calls a function with a custom derivative, which holds for derivatives of any order.

  Computes ``value(*args)``, like ``jax.custom_jvp``. JAX before 0.12 drops ``custom_jvp`` rules in
  the body of a scan when it takes a second derivative. It keeps the rules of a primitive, so this
  function binds one.

  Args:
    value: function of ``args`` that returns one array.
    tangent: function of two tuples, the arguments and their tangents, that returns the tangent of
      the array. The tangent of a leaf is None if it is zero.
    *args: pytrees of arrays.

  Returns:
    The array.
  """
  leaves, tree = jax.tree.flatten(args)

  def flat(primals: Any, tangents: Any) -> Any:
    return tangent(jax.tree.unflatten(tree, primals), jax.tree.unflatten(tree, tangents))

  jaxpr = jax.make_jaxpr(lambda *leaves: value(*jax.tree.unflatten(tree, leaves)))(*leaves)
  return _bind(leaves, value=jaxpr, tangent=_Rule(flat))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Rule:
  """A derivative as an equation parameter. Two traces of one program print the same text."""

  function: Callable[..., Any]

  def __call__(self, primals: Any, tangents: Any) -> Any:
    return self.function(primals, tangents)

  def __repr__(self) -> str:
    return "rule"


def _bind(leaves: Any, **params: Any) -> jax.Array:
  (out,) = _with_tangent.bind(*leaves, **params)
  return out


def _function(jaxpr: Any) -> Callable[..., Any]:
  return jax.extend.core.jaxpr_as_fun(jaxpr)


_with_tangent: Any = jax.extend.core.Primitive("with_tangent")
_with_tangent.multiple_results = True
_with_tangent.def_impl(lambda *args, value, tangent: _function(value)(*args))
_with_tangent.def_abstract_eval(lambda *avals, value, tangent: value.out_avals)


def _jvp(primals: Any, tangents: Any, *, value: Any, tangent: Any) -> Any:
  out = _bind(primals, value=value, tangent=tangent)
  known = [None if isinstance(dot, ad.Zero) else dot for dot in tangents]
  if all(dot is None for dot in known):
    zero: Any = ad.Zero
    return [out], [zero.from_primal_value(out)]
  return [out], [tangent(list(primals), known)]


def _batch(args: Any, axes: Any, *, value: Any, tangent: Any) -> tuple[list[jax.Array], list[int]]:
  def mapped(primals: Any, tangents: Any) -> Any:
    dot_axes = [None if dot is None else axis for axis, dot in zip(axes, tangents, strict=True)]
    return jax.vmap(tangent, (list(axes), dot_axes))(primals, tangents)

  one = lambda *args: _function(value)(*args)[0]
  jaxpr = jax.make_jaxpr(jax.vmap(one, tuple(axes)))(*args)
  return [_bind(args, value=jaxpr, tangent=_Rule(mapped))], [0]


ad.primitive_jvps[_with_tangent] = _jvp
batching.primitive_batchers[_with_tangent] = _batch
mlir.register_lowering(
  _with_tangent,
  lambda context, *args, value, tangent: mlir.lower_fun(_function(value), multiple_results=True)(
    context, *args
  ),
)
