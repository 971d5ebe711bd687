"""Parameters of separate layers to those of a fused one and back: nothing but moved, so exact.

Leading axes that ``nn.scan`` or ``nn.vmap`` stacked stay where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flax_fp8.linen.parts import Parts

KERNEL, BIAS = "kernel", "bias"


def fuse(
  name: str, parts: Parts, separate: Mapping[str, Mapping[str, Any]], leaves: Sequence[str]
) -> dict[str, jax.Array]:
  """Joins the parameters of separate layers.

  Args:
    name: what error messages call the operation.
    parts: where each layer's columns go.
    separate: for each part its leaves: kernels ``[..., D, features]`` of ``nn.Dense`` or
      ``[..., D, heads, width]`` of ``nn.DenseGeneral``, biases likewise without D.
    leaves: those that there are, ``"kernel"`` and maybe ``"bias"``.

  Returns:
    For each leaf the joined array, ``[..., D, *groups, slots, width]``, for a bias without D.

  Raises:
    ValueError: a part or leaf is missing or unknown, a shape does not fit, or the parts differ in
      leading axes or dtype.
  """
  require_keys(name, separate, list(parts.heads))
  for part, params in separate.items():
    require_keys(f"{name}: {part}", params, leaves)
  return {leaf: _join(name, parts, separate, leaf) for leaf in leaves}


def unfuse(
  name: str, parts: Parts, params: Mapping[str, Any], leaves: Sequence[str], *, flat: bool
) -> dict[str, dict[str, jax.Array]]:
  """Takes the parameters of a fused layer apart; the inverse of ``fuse``.

  Args:
    name: what error messages call the operation.
    parts: where each layer's columns are.
    params: the fused layer's leaves.
    leaves: those that there are.
    flat: gives ``[..., features]``, as ``nn.Dense`` has it, instead of ``[..., heads, width]``.

  Returns:
    For each part its leaves.

  Raises:
    ValueError: a leaf is missing or unknown, or has another shape.
  """
  require_keys(name, params, leaves)
  separate: dict[str, dict[str, jax.Array]] = {part: {} for part in parts.heads}
  for leaf in leaves:
    joined = params[leaf]
    least = len(parts.shape) + (leaf == KERNEL)
    if joined.ndim < least or joined.shape[joined.ndim - len(parts.shape) :] != parts.shape:
      columns = ", ".join(map(str, parts.shape))
      raise ValueError(
        f"{name}: the {leaf} must have the shape [..., {'D, ' * (leaf == KERNEL)}{columns}]; got "
        f"{leaf} of shape {joined.shape}. Pass the parameters of a module with these fields."
      )
    for part, value in parts.split(joined).items():
      separate[part][leaf] = value.reshape(*value.shape[:-2], -1) if flat else value
  return separate


def require_keys(name: str, found: Any, wanted: Sequence[str]) -> None:
  """Raises ValueError unless a mapping has these keys and no others."""
  if not isinstance(found, Mapping) or set(found) != set(wanted):
    got = sorted(found) if isinstance(found, Mapping) else type(found).__name__
    raise ValueError(
      f"{name}: must hold {', '.join(wanted)}, and nothing else; got {got}. Pass the parameters "
      "themselves, without a collection or a module around them, of layers that have a bias where "
      "the fused module has one."
    )


def _join(
  name: str, parts: Parts, separate: Mapping[str, Mapping[str, Any]], leaf: str
) -> jax.Array:
  by_head = {part: _by_head(name, parts, separate, part, leaf) for part in parts.heads}
  kinds = {part: (x.shape[:-2], x.dtype.name) for part, x in by_head.items()}
  if len(set(kinds.values())) > 1:
    found = ", ".join(f"{part} {lead} {dtype}" for part, (lead, dtype) in kinds.items())
    raise ValueError(
      f"{name}: the parts must be of one dtype and have equal axes before their features; got "
      f"{leaf}s {found}. Take the parts of one layer."
    )
  return parts.join(by_head)


def _by_head(
  name: str, parts: Parts, separate: Mapping[str, Mapping[str, Any]], part: str, leaf: str
) -> jax.Array:
  """A part's leaf as ``[..., heads, width]``."""
  heads, value = parts.heads[part], jnp.asarray(separate[part][leaf])
  features, inputs = heads * parts.width, int(leaf == KERNEL)
  if value.shape[inputs:][-2:] == (heads, parts.width):
    return value
  if value.ndim > inputs and value.shape[-1] == features:
    return value.reshape(*value.shape[:-1], heads, parts.width)
  before = "[..., D, " if inputs else "[..., "
  raise ValueError(
    f"{name}: the {leaf} of {part} must have the shape {before}{features}] or "
    f"{before}{heads}, {parts.width}]; got shape {value.shape}. Change the module's fields, or "
    "take another layer's parameters."
  )
