"""The only file that touches ``jax._src``.

An extended dtype needs six things that JAX does not export, two of them to be mended for ours, and
what is computed once for several passes needs JAX's splitting of a program. Each is looked up here,
once, by what it is rather than by version, so that a JAX that lacks one says so at import instead
of failing inside somebody's training step.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def require(module: str, attribute: str) -> Any:
  """Returns ``module.attribute`` of JAX's private tree, or raises an error that says what to do."""
  try:
    return getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError) as error:
    raise ImportError(
      f"flax_fp8: this JAX has no {module}.{attribute}, on which flax_fp8 is built; "
      f"got jax=={jax.__version__}. Install a JAX release that flax_fp8's changelog names as "
      "tested, or a newer flax_fp8."
    ) from error


# JAX 0.12 can't serialize a product whose FP8 algorithm is named, for any compiler plugin:
# "failed to legalize operation 'vhlo.dot_general_v2'".
NAMES_FP8_ALGORITHM = jax.__version_info__ < (0, 12)

ExtendedDType: Any = require("jax._src.dtypes", "ExtendedDType")
_EArray: Any = require("jax._src.earray", "EArray")
_global_result_handlers: Any = require("jax._src.interpreters.pxla", "global_result_handlers")
_physical_aval: Any = require("jax._src.core", "physical_aval")
_eager_adders: Any = require("jax._src.ad_util", "raw_jaxval_adders")
ShardingTypeError: Any = require("jax._src.core", "ShardingTypeError")


def wrapped_result_handler(aval: Any, sharding: Any, committed: bool) -> Callable[[Any], Any]:
  """Makes the handler by which a compiled function's result becomes an array of an extended dtype.

  The physical array has the logical array's shape, so the sharding is the same for both.
  """
  make = _global_result_handlers[jax.core.ShapedArray]
  physical = make(_physical_aval(aval), sharding, committed)
  return lambda buffers: _EArray(aval, physical(buffers))


def wrapped_from_shards(aval: Any, sharding: Any, arrays: Any, committed: bool) -> Any:
  """Assembles an array of an extended dtype from one array a device."""
  return wrapped_result_handler(aval, sharding, committed)([array._data for array in arrays])


def _add_eagerly(x: Any, y: Any) -> Any:
  return x.dtype._rules.add(x.dtype, x, y)


# Eager autodiff adds cotangents through this table, which has no entry for arrays of extended
# dtypes: without one, state used twice outside jit raises KeyError.
_eager_adders.setdefault(_EArray, _add_eagerly)


def _logical_sharding(shape: Any, dtype: Any, physical: Any) -> Any:
  """JAX's function, but right for dtypes whose elements are scalars in memory.

  JAX cuts the element's own dimensions off a sharding with ``[:-ndim]``, which for no dimensions
  cuts all: a sharded array would raise, or come out as replicated. Here there is nothing to cut.
  """
  if getattr(dtype._rules, "scalar_elements", False):
    return physical
  return _jax_logical_sharding(shape, dtype, physical)


_jax_logical_sharding: Any = require("jax._src.sharding_impls", "logical_sharding")
_sharding_impls: Any = importlib.import_module("jax._src.sharding_impls")
_sharding_impls.logical_sharding = _logical_sharding


def varying_axes(x: Any) -> frozenset[str]:
  """Returns the mesh axes along which ``x`` differs, as far as a checked shard_map tracks them."""
  aval = jax.typeof(x)
  if hasattr(aval, "manual_axis_type"):
    return frozenset(aval.manual_axis_type.varying)
  return frozenset(aval.vma)


def vary_as(x: jax.Array, *others: jax.Array) -> jax.Array:
  """Lets a checked shard_map know that ``x``, made of ``others``, varies along the axes they do.

  Needed after a primitive of JAX that does not track this itself.
  """
  axes = frozenset[str]().union(*map(varying_axes, others)) - varying_axes(x)
  if not axes:
    return x
  lax: Any = jax.lax  # which has one of the two, by version
  names = tuple(sorted(axes))
  return lax.pcast(x, names, to="varying") if hasattr(lax, "pcast") else lax.pvary(x, names)


def psum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """``lax.psum`` that may be mapped: in a checked shard_map, older JAX fails to map its own."""

  @custom_vmap
  def add(x: jax.Array) -> jax.Array:
    return jax.lax.psum(x, axes)

  @add.def_vmap
  def rule(axis_size: int, in_batched: Any, x: jax.Array) -> tuple[jax.Array, bool]:
    del axis_size  # each element is added up by itself, whichever axis is mapped
    return psum(x, axes), in_batched[0]

  return add(x)


def unchecked_manual_axes() -> tuple[str, ...]:
  """Returns the manual mesh axes of an enclosing ``shard_map(check_vma=False)``, else ``()``.

  There JAX does not track along which axes a value varies, and sums the cotangent of every
  replicated input over them. ``axis_index`` varies by its nature, so it tells whether JAX tracks.
  """
  axes = tuple(jax.sharding.get_abstract_mesh().manual_axes)
  return tuple(a for a in axes if a not in varying_axes(jax.lax.axis_index(a)))


def scalar_aval() -> Any:
  """Returns the abstract value of the float32 that stands behind one fp32_max_grad element."""
  return jax.core.ShapedArray((), jnp.dtype("float32"))


_partial_eval: Any = require("jax._src.interpreters.partial_eval", "partial_eval_jaxpr_custom")
_dce: Any = require("jax._src.interpreters.partial_eval", "dce_jaxpr")


def split_jaxpr(jaxpr: Any, known: int, unknown: int, saveable: Any) -> tuple[Any, Any]:
  """Splits a jaxpr into what hangs on its first ``known`` inputs alone, and the rest.

  Args:
    jaxpr: without references.
    known: how many inputs are known.
    unknown: how many follow them.
    saveable: policy of ``jax.checkpoint``: which results of the first part the second takes; the
      others it computes again.

  Returns:
    The first part, from the known inputs to such results; the second, from these and all inputs to
    the results of ``jaxpr``.
  """
  are_unknown = [False] * known + [True] * unknown
  once, rest, _, _, count = _partial_eval(jaxpr, are_unknown, True, True, True, saveable)
  rest, used = _dce(rest, [True] * len(rest.outvars), [False] * count + [True] * len(are_unknown))
  once, _ = _dce(once, used[:count], [True] * known)
  return once, rest
