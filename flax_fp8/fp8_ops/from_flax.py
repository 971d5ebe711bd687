"""State that ``flax.linen.fp8_ops`` left, as ``Fp8DotGeneral`` and ``Fp8Einsum`` read it.

What a scale means and how a history is ordered are the same there and here; what differs is what
modules are called, and that there a history may hold NaN, and a scale be zero.
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
# Names that Linen gives; Fp8Einsum's is the same on both sides.
AUTOMATIC = re.compile(r"(?:Fp8DirectDotGeneralOp|Fp8DotGeneralOp|NANOOFp8DotGeneralOp)_(\d+)")


def from_flax_fp8_ops(variables: Any) -> Any:
  """Makes variables of a model that used ``flax.linen.fp8_ops`` those of the same model with ours.

  ``.../Fp8DirectDotGeneralOp_0/input_scale`` becomes ``.../Fp8DotGeneral_0/input_scale``.

  Args:
    variables: variables dict of the model with ``Fp8DirectDotGeneralOp`` (Flax's
      ``Fp8DotGeneral``), ``Fp8DotGeneralOp``, ``NANOOFp8DotGeneralOp`` or ``Fp8Einsum``. State is
      float32 or of either library's extended dtype; leaves may have axes of scanned or mapped
      modules.

  Returns:
    Variables for ``Fp8DotGeneral`` and ``Fp8Einsum``; state in float32. Modules that were named by
    hand keep their names. All other leaves are the ones passed in; mappings keep their types. The
    recipe that goes on with them is ``DelayedScaling(amax_history_len=...)`` of Flax's
    ``amax_history_length``; after ``NANOOFp8DotGeneralOp`` with ``Format.HYBRID_FNUZ``.

  Raises:
    ValueError: ``variables`` is no variables dict, holds no FP8 state, or state that is not Flax's;
      or two modules would have one name. Names the paths.

  Numerics:
    Bits are kept. The exceptions: an amax that is not finite becomes zero, that is, not seen; a
    scale that is not positive and finite becomes 1. In float32 the model then goes on bit for bit
    as Flax's ``Fp8DirectDotGeneralOp`` would, and as its ``Fp8Einsum``. Where ``jnp.einsum`` handed
    that the operands in reverse (``"mk,kn->nm"``, say), its ``input_*`` describes the kernel, which
    the variables don't tell: exchange the two by hand, or ours learns within a history's length.

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
      "trained without FP8 take upgrade_variables(model, variables, *inputs)."
    )
  return _convert(variables)


def _convert(tree: Any) -> Any:
  """Converts what lies under each key of state, and leaves the rest."""
  if not isinstance(tree, Mapping):
    return tree
  new = {
    key: _convert_state(value, "") if key == OVERWRITE_WITH_GRADIENT else _convert(value)
    for key, value in tree.items()
  }
  return with_items(tree, new)


def _convert_state(state: Any, path: str) -> Any:
  """Renames modules down to those that hold leaves, and converts these."""
  children = state.values() if isinstance(state, Mapping) else ()
  if not children or not all(isinstance(child, Mapping) for child in children):
    return _convert_module(state, path)
  renamed = {key: AUTOMATIC.sub(r"Fp8DotGeneral_\1", key) for key in state}
  if len({*renamed.values()}) < len(renamed):
    raise ValueError(
      "from_flax_fp8_ops: modules side by side must have one name each in flax_fp8; got "
      f"{sorted(renamed)} at {path or 'the top'!r}. Rename them to what your model calls them now."
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
  """Casts an extended dtype to the float32 that it is in memory, whichever library's it is."""
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
  """All roles alike; a scale is as a history whose axis of slots, wherever it is, has one."""
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
    "from_flax_fp8_ops: state must be scale and amax history of input, kernel and output_grad, "
    f"float32; got, at {path.lstrip('/') or 'the top'!r}, {got}. Pass the variables as "
    "flax.linen.fp8_ops left them."
  )
