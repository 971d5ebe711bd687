"""Conversion of variables from ``flax.linen.fp8_ops`` to ``Fp8DotGeneral`` and ``Fp8Einsum``.

Scales have the same meaning in both packages, and histories the same order. The names of modules
differ. Flax's histories may contain NaN, and its scales may be zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_fp8.linen.arguments import require_variables
from flax_fp8.linen.containers import with_items
from flax_fp8.linen.state import OVERWRITE_WITH_GRADIENT
from flax_fp8.recipes.base import Role
from flax_fp8.training.paths import compare, leaves_by_path
from flax_fp8.training.state import partition_for_grad_overwrite

LEAVES = {f"{role.value}_{key}" for role in Role for key in ("scale", "amax_history")}
# Names that Linen assigns to unnamed modules. The name of Fp8Einsum is the same in both packages.
AUTOMATIC = re.compile(r"(?:Fp8DirectDotGeneralOp|Fp8DotGeneralOp|NANOOFp8DotGeneralOp)_(\d+)")


def from_flax_fp8_ops(variables: Any) -> Any:
  """Converts the variables of a model with ``flax.linen.fp8_ops`` to the same model with flax_fp8.

  ``.../Fp8DirectDotGeneralOp_0/input_scale`` becomes ``.../Fp8DotGeneral_0/input_scale``.

  Continue with the recipe ``DelayedScaling(amax_history_len=...)``, with Flax's
  ``amax_history_length``. After ``NANOOFp8DotGeneralOp``, also pass
  ``fp8_format=Format.HYBRID_FNUZ``.

  Args:
    variables: variables dict of a model with ``Fp8DirectDotGeneralOp`` (Flax's ``Fp8DotGeneral``),
      ``Fp8DotGeneralOp``, ``NANOOFp8DotGeneralOp`` or ``Fp8Einsum``. The state is float32, or has
      the extended dtype of Flax or flax_fp8. It may have axes of scanned or mapped modules.

  Returns:
    Variables for ``Fp8DotGeneral`` and ``Fp8Einsum``, with state in float32. Modules with names
    chosen by the user keep them. All other leaves are returned unchanged. Mappings keep their
    types.

  Raises:
    ValueError: ``variables`` is not a variables dict, has no FP8 state, or has state of another
      form than Flax's. Also raised if two modules would get the same name. The error lists the
      paths.

  Numerics:
    The values are kept bit for bit, except for invalid ones. A non-finite amax becomes zero, like a
    missing one. A scale that is not positive and finite becomes 1. In float32, the model then
    trains bit for bit as with Flax's ``Fp8DirectDotGeneralOp`` and ``Fp8Einsum``.

    For some equations, such as ``"mk,kn->nm"``, ``jnp.einsum`` swaps the operands. Flax's
    ``Fp8Einsum`` then stores the state of the kernel as ``input_*``. The variables do not show
    this. Swap the two states by hand. Otherwise delayed scaling corrects them within the length of
    the history.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> x, before = jnp.ones((2, 4)), nn.Dense(4, dot_general_cls=nn.fp8_ops.Fp8DotGeneral)
    >>> variables = fp8.from_flax_fp8_ops(before.init(jax.random.key(0), x))
    >>> nn.Dense(4, dot_general_cls=fp8.Fp8DotGeneral).apply(variables, x).shape
    (2, 4)

  References:
    flax.linen.fp8_ops.Fp8DirectDotGeneralOp, flax.linen.fp8_ops.Fp8Einsum.
  """
  require_variables("from_flax_fp8_ops", variables)
  if not jax.tree.leaves(partition_for_grad_overwrite(variables)[0]):
    raise ValueError(
      f"from_flax_fp8_ops: variables must hold the collection {OVERWRITE_WITH_GRADIENT!r} of "
      f"flax.linen.fp8_ops; got collections {sorted(variables)} without FP8 state. For a model "
      "trained without FP8, use upgrade_variables(model, variables, *inputs)."
    )
  return _convert(variables)


def _convert(tree: Any) -> Any:
  """Converts the state in a tree of variables, and keeps all other leaves."""
  if not isinstance(tree, Mapping):
    return tree
  new = {
    key: _convert_state(value, "") if key == OVERWRITE_WITH_GRADIENT else _convert(value)
    for key, value in tree.items()
  }
  return with_items(tree, new)


def _convert_state(state: Any, path: str) -> Any:
  """Renames modules and converts the leaves of the innermost modules."""
  children = state.values() if isinstance(state, Mapping) else ()
  if not children or not all(isinstance(child, Mapping) for child in children):
    return _convert_module(state, path)
  renamed = {key: AUTOMATIC.sub(r"Fp8DotGeneral_\1", key) for key in state}
  if len({*renamed.values()}) < len(renamed):
    raise ValueError(
      "from_flax_fp8_ops: modules in one scope must have different names in flax_fp8; got "
      f"{sorted(renamed)} at {path or 'the top'!r}. Rename them to the names in your current model."
    )
  new = {renamed[key]: _convert_state(value, f"{path}/{key}") for key, value in state.items()}
  return with_items(state, new)


def _convert_module(leaves: Any, path: str) -> Any:
  if not isinstance(leaves, Mapping) or set(leaves) != LEAVES:
    names = compare(leaves_by_path(leaves), dict.fromkeys(sorted(LEAVES)), describe=lambda _: 0)
    raise _malformed(path, str(names))
  state = {name: _float32(leaf, f"{path}/{name}") for name, leaf in leaves.items()}
  _check_shapes(state, path)
  return with_items(leaves, {name: _clean(name, leaf) for name, leaf in state.items()})


def _float32(leaf: Any, path: str) -> jax.Array:
  """Casts float32, or the extended dtype of Flax or flax_fp8, to float32."""
  dtype = getattr(leaf, "dtype", None)
  if getattr(dtype, "float_dtype", dtype) != jnp.float32:
    raise _malformed(path, f"dtype={dtype} for float32")
  return lax.convert_element_type(leaf, jnp.float32)


def _check_shapes(state: Mapping[str, jax.Array], path: str) -> None:
  scales, histories = (
    [state[f"{role.value}_{key}"].shape for role in Role] for key in ("scale", "amax_history")
  )
  if not _fit(scales, histories):
    shapes = ", ".join(f"{name} {leaf.shape}" for name, leaf in sorted(state.items()))
    raise _malformed(path, f"{shapes}, for scales (..., 1) and histories (..., length)")


def _fit(scales: list[tuple[int, ...]], histories: list[tuple[int, ...]]) -> bool:
  """Returns whether the shapes are valid.

  All roles must have the same shapes. A scale has the shape of its history, except that the axis of
  slots has size 1. This axis may be anywhere.
  """
  scale, history = scales[0], histories[0]
  if len({*scales}) > 1 or len({*histories}) > 1 or len(scale) != len(history) or 0 in history:
    return False
  sizes = list(zip(scale, history, strict=True))
  slots = [pair for pair in sizes if pair[0] != pair[1]] or [(1, 1)] * ((1, 1) in sizes)
  return len(slots) == 1 and slots[0][0] == 1


def _clean(name: str, leaf: jax.Array) -> jax.Array:
  if name.endswith("_scale"):
    return jnp.where(jnp.isfinite(leaf) & (leaf > 0), leaf, 1.0)
  return jnp.where(jnp.isfinite(leaf), leaf, 0.0)


def _malformed(path: str, got: str) -> ValueError:
  return ValueError(
    "from_flax_fp8_ops: state must be scale and amax_history of input, kernel and output_grad in "
    f"float32; got, at {path.lstrip('/') or 'the top'!r}, {got}. Pass the unmodified variables of "
    "flax.linen.fp8_ops."
  )
