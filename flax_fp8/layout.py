"""A layout that XLA keeps to, where a program is one device's own."""

from __future__ import annotations

from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.interpreters import ad, batching, mlir


def in_rows(x: jax.Array) -> jax.Array:
  """Has XLA's GPU compiler keep the last axis of an array the last in memory.

  On one device, and inside a ``shard_map`` over all mesh axes. Elsewhere, and on other platforms,
  this is the identity: XLA's partitioner would gather what has a fixed layout. On how many devices
  a program runs is known no sooner than it is lowered.

  Args:
    x: any shape and dtype.

  Returns:
    The same array.
  """
  return _in_rows.bind(x)


_in_rows: Any = jax.extend.core.Primitive("in_rows")
_in_rows.def_impl(lambda x: x)
_in_rows.def_abstract_eval(lambda aval: aval)
ad.deflinear2(_in_rows, lambda cotangent, _: [cotangent])


def _constrain(x: jax.Array) -> jax.Array:
  return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def _lower(context: Any, x: Any) -> Any:
  if not _is_alone(context.module_context.axis_context):
    return [x]
  return mlir.lower_fun(_constrain, multiple_results=False)(context, x)


def _is_alone(context: Any) -> bool:
  if hasattr(context, "num_devices"):
    return context.num_devices == 1
  return set(context.manual_axes) == set(context.mesh.axis_names)


def _batch(args: Any, axes: Any) -> tuple[jax.Array, int]:
  """The mapped axis becomes the first, as that of a batch of GEMMs."""
  return in_rows(jnp.moveaxis(args[0], axes[0], 0)), 0


batching.primitive_batchers[_in_rows] = _batch
mlir.register_lowering(_in_rows, lambda _, x: [x])
mlir.register_lowering(_in_rows, _lower, platform="cuda")
