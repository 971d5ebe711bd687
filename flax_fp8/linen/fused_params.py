"""Converts the parameters of separate layers to those of a fused layer and back.

The conversion only moves values, so it is exact. Leading axes that ``nn.scan`` or ``nn.vmap``
stacked are kept.
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
    name: name of the operation in error messages.
    parts: the layout of the fused kernel.
    separate: the parameters of each part: kernels ``[..., D, features]`` of ``nn.Dense`` or
      ``[..., D, heads, width]`` of ``nn.DenseGeneral``, and biases of the same shape without D.
    leaves: names of the parameters, ``"kernel"`` and optionally ``"bias"``.

  Returns:
    For each parameter the joined array ``[..., D, *groups, slots, width]``, without D for a bias.

  Raises:
    ValueError: a part or parameter is missing or unknown, a shape does not match, or the parts
      differ in leading axes or dtype.
  """
  require_keys(name, separate, list(parts.heads))
  for part, params in separate.items():
    require_keys(f"{name}: {part}", params, leaves)
  return {leaf: _join(name, parts, separate, leaf) for leaf in leaves}


def unfuse(
  name: str, parts: Parts, params: Mapping[str, Any], leaves: Sequence[str], *, flat: bool
) -> dict[str, dict[str, jax.Array]]:
  """Splits the parameters of a fused layer; the inverse of ``fuse``.

  Args:
    name: name of the operation in error messages.
    parts: the layout of the fused kernel.
    params: the parameters of the fused layer.
    leaves: names of the parameters.
    flat: returns ``[..., features]``, as in ``nn.Dense``, instead of ``[..., heads, width]``.

  Returns:
    The parameters of each part.

  Raises:
    ValueError: a parameter is missing or unknown, or has another shape.
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
        f"{leaf} of shape {joined.shape}. Pass the parameters of a module with the same fields."
      )
    for part, value in parts.split(joined).items():
      separate[part][leaf] = value.reshape(*value.shape[:-2], -1) if flat else value
  return separate


def require_keys(name: str, found: Any, wanted: Sequence[str]) -> None:
  """Raises ValueError unless a mapping has exactly these keys."""
  if not isinstance(found, Mapping) or set(found) != set(wanted):
    got = sorted(found) if isinstance(found, Mapping) else type(found).__name__
    raise ValueError(
      f"{name}: the keys must be {', '.join(wanted)}, and nothing else; got {got}. Pass the "
      "parameters themselves, without a collection or a module around them, and with a bias only "
      "if the fused module has one."
    )


def _join(
  name: str, parts: Parts, separate: Mapping[str, Mapping[str, Any]], leaf: str
) -> jax.Array:
  by_head = {part: _by_head(name, parts, separate, part, leaf) for part in parts.heads}
  kinds = {part: (x.shape[:-2], x.dtype.name) for part, x in by_head.items()}
  if len(set(kinds.values())) > 1:
    found = ", ".join(f"{part} {lead} {dtype}" for part, (lead, dtype) in kinds.items())
    raise ValueError(
      f"{name}: the parts must have one dtype and the same axes before the features; got "
      f"{leaf}s {found}. Pass parts of the same layer."
    )
  return parts.join(by_head)


def _by_head(
  name: str, parts: Parts, separate: Mapping[str, Mapping[str, Any]], part: str, leaf: str
) -> jax.Array:
  """Returns a part's parameter as ``[..., heads, width]``."""
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
    "pass the parameters of a matching layer."
  )
