"""Checks the arguments of a contraction at trace time. Errors use the public name."""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from flax_fp8 import _compat, fields, varying
from flax_fp8.capability import capability
from flax_fp8.contraction import DimensionNumbers
from flax_fp8.meta_dtype import is_max_grad, require_float32
from flax_fp8.ops.metrics import METRICS, init_metrics
from flax_fp8.recipes.base import Recipe, Role
from flax_fp8.sharding import explicit_sharding
from flax_fp8.state_cast import entered_since_cast

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


def operand(name: str, side: str, x: Any) -> jax.Array:
  """Returns an operand as an array; raises TypeError if it can't be converted to one."""
  if isinstance(x, jax.Array):
    return x
  try:
    return jnp.asarray(x)
  except (TypeError, ValueError):
    raise TypeError(
      f"{name}: operands must be of dtype {', '.join(COMPUTE_DTYPES)}; got {side} of type "
      f"{type(x).__name__}. Pass arrays."
    ) from None


def result_dtype(name: str, lhs: jax.Array, rhs: jax.Array, preferred: Any) -> Any:
  """Returns the dtype of the product; raises TypeError for an unsupported operand dtype."""
  for side, x in (("lhs", lhs), ("rhs", rhs)):
    if x.dtype.name not in COMPUTE_DTYPES:
      raise TypeError(
        f"{name}: operands must be of dtype {', '.join(COMPUTE_DTYPES)}; got {side} of dtype "
        f"{x.dtype} and shape {x.shape}. Cast it, or use lax.dot_general for this contraction."
      )
  dtype = jnp.promote_types(lhs.dtype, rhs.dtype)
  if preferred is None:
    return dtype
  advice = f"Omit it to use {dtype}."
  return fields.dtype(name, "preferred_element_type", preferred, COMPUTE_DTYPES, advice)


def dimension_numbers(name: str, numbers: Any, lhs: jax.Array, rhs: jax.Array) -> DimensionNumbers:
  """Returns canonical dimension numbers; raises ValueError if ``lax.dot_general`` rejects them."""
  try:
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = numbers
    contract = _axes(lhs_contract), _axes(rhs_contract)
    dims = contract, (_axes(lhs_batch), _axes(rhs_batch))
    like = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (lhs, rhs)]
    jax.eval_shape(lambda x, y: lax.dot_general(x, y, dims), *like)
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"{name}: dimension_numbers must be ((lhs_contracting, rhs_contracting), (lhs_batch, "
      "rhs_batch)) with equal sizes of paired axes; got "
      f"dimension_numbers={fields.show(numbers)}, lhs of shape {lhs.shape}, rhs of shape "
      f"{rhs.shape}: {fields.cut(error)} Fix the axes or the shapes."
    ) from error
  return dims


def canonical_sharding(name: str, value: Any, ndim: int) -> NamedSharding | None:
  """Returns ``out_sharding`` on the current mesh; None if omitted or without explicit axes."""
  if value is None:
    return None
  sharding = value
  if isinstance(value, PartitionSpec):
    with contextlib.suppress(ValueError):  # the mesh lacks an axis
      sharding = NamedSharding(jax.sharding.get_abstract_mesh(), value)
  if not isinstance(sharding, NamedSharding) or len(sharding.spec) > ndim:
    raise ValueError(
      f"{name}: out_sharding must be a PartitionSpec or NamedSharding of at most {ndim} axes, the "
      "rank of the product, and use axes of the current mesh; got "
      f"out_sharding={fields.show(value)}. Give the mesh axes of each axis, or None."
    )
  return sharding if sharding.mesh.abstract_mesh.explicit_axes else None


def sharding_of_product(
  name: str, dims: DimensionNumbers, lhs: jax.Array, rhs: jax.Array, out_sharding: Any
) -> NamedSharding | None:
  """Returns the sharding of the product on a mesh with explicit axes, by JAX's own rule.

  Args:
    name: name of the operation in error messages.
    dims: canonical dimension numbers.
    lhs: left operand.
    rhs: right operand.
    out_sharding: the caller's argument.

  Returns:
    The sharding; None on any other mesh.

  Raises:
    ValueError: the sharding is ambiguous for ``lax.dot_general``.
  """
  ndim = lhs.ndim + rhs.ndim - 2 * len(dims[0][0]) - len(dims[1][0])
  wanted = canonical_sharding(name, out_sharding, ndim)
  if explicit_sharding(lhs) is None and explicit_sharding(rhs) is None:
    return None
  try:
    out = jax.eval_shape(lambda x, y: lax.dot_general(x, y, dims, out_sharding=wanted), lhs, rhs)
  except Exception as error:
    if not _compat.is_ambiguous_sharding(error):
      raise
    raise ValueError(
      f"{name}: on a mesh with explicit axes the sharding of a product must be unambiguous; got "
      f"lhs of type {jax.typeof(lhs)} and rhs of type {jax.typeof(rhs)}: {error} Pass "
      "out_sharding. For a layer, pass dot_general_cls=functools.partial(Fp8DotGeneral, "
      "out_sharding=PartitionSpec(...))."
    ) from error
  return out.sharding


def precision(name: str, value: Any) -> None:
  """Raises ValueError unless the precision is the default, since the recipe chooses it."""
  if value not in (None, lax.Precision.DEFAULT):
    raise ValueError(
      f"{name}: precision must be None; got precision={fields.show(value)}. The recipe chooses how "
      "FP8 GEMMs accumulate: omit precision in this layer, or exclude the layer from FP8."
    )


def recipe(name: str, value: Any) -> None:
  """Raises TypeError unless the value is a recipe."""
  if not isinstance(value, Recipe):
    raise TypeError(
      f"{name}: recipe must be a recipe, such as DelayedScaling(); got "
      f"recipe={fields.show(value)}. Pass an instance, not its class or name."
    )


def key(name: str, recipe: Recipe, value: jax.Array | None) -> None:
  """Raises ValueError if stochastic rounding has no key."""
  if recipe.rounds_by_key and value is None:
    raise ValueError(
      f"{name}: stochastic rounding of gradients needs a PRNG key; got none for {recipe}. Pass "
      "rngs={'sr_rng': key} to apply with a new key at each step and add 'sr_rng' to the "
      "split_rngs of nn.scan and nn.vmap, or pass key= to the function of flax_fp8.ops."
    )


def one_key(name: str, value: Any) -> None:
  """Raises TypeError unless the value is one PRNG key."""
  is_array = isinstance(value, jax.Array | np.ndarray)
  typed = is_array and jnp.issubdtype(value.dtype, jax.dtypes.prng_key) and value.ndim == 0
  raw = is_array and value.dtype == jnp.uint32 and value.ndim == 1
  if not typed and not raw:
    raise TypeError(
      f"{name}: key must be one PRNG key, such as jax.random.key(seed); got "
      f"key={fields.show(value)}. Split a key with jax.random.split, and pass one of the results."
    )


def device(name: str, value: Any, emulate: bool) -> None:
  """Raises ValueError if the default device does not support the recipe."""
  recipe(name, value)
  if fields.flag(name, "emulate", emulate):
    return
  supported, reason = capability(recipe=value)
  if not supported:
    raise ValueError(
      f"{name}: the default device must support the recipe's formats and scales; got {reason}. "
      "Use another device or recipe, or pass emulate=True to compute in a wider type, which is "
      "correct but slow."
    )


def warn_of_device(name: str, recipe: Recipe) -> None:
  """Warns where ``device`` would raise, for modules that follow Flax's behavior.

  The warning is attributed to one line in Flax, so Python shows it once for all layers.
  """
  supported, reason = capability(recipe=recipe)
  if not supported:
    message = f"{name}: {reason}. Products are computed in a wider type, which is correct but slow."
    warnings.warn(message, stacklevel=3)


def state(name: str, recipe: Recipe, value: Mapping[str, Any]) -> None:
  """Raises TypeError or ValueError if the state does not match the recipe."""
  if not isinstance(value, Mapping) or not all(isinstance(x, Mapping) for x in value.values()):
    raise TypeError(
      f"{name}: state must be a mapping of mappings, as ops.init_state returns; got "
      f"state={fields.show(value)}. Pass ops.init_state(recipe), or its gradient."
    )
  for role in Role:
    fresh = recipe.init_state(role)
    leaves = value.get(role.value, {})
    if leaves.keys() & set(METRICS):
      fresh |= init_metrics()
    if leaves.keys() != fresh.keys():
      raise ValueError(
        f"{name}: the state of {role.value} must hold {sorted(fresh)}; got {sorted(leaves)}. Make "
        "it with ops.init_state(recipe), with all metrics or none."
      )
    for key, leaf in leaves.items():
      require_float32(name, f"{role.value}_{key}", leaf)
      _leaf(f"{name}: {role.value}_{key}", leaf, fresh[key].shape, recipe)


def _leaf(name: str, leaf: Any, shape: tuple[int, ...], recipe: Recipe) -> None:
  if is_max_grad(leaf) and (axes := entered_since_cast() & varying.manual_axes(leaf)):
    raise TypeError(
      f"{name} must not pass into shard_map(check_vma=False) as fp32_max_grad, because JAX sums "
      f"cotangents at its boundary; got mesh axes {sorted(axes)}. Use check_vma=True, call "
      "flax_fp8.value_and_grad inside the mapped function, or cast inside it with "
      "as_max_grad(variables) and differentiate with jax.value_and_grad."
    )
  if leaf.shape != shape and (leaf.shape, shape) != ((), (1,)):
    raise ValueError(
      f"{name} must have shape {shape} for {recipe}; got shape {leaf.shape}. Use the recipe that "
      "made the state, map leading axes with nn.vmap or nn.scan, or get new state from "
      "upgrade_variables."
    )


def _axes(axes: Any) -> tuple[int, ...]:
  return tuple(operator.index(a) for a in axes)
