"""Reshapes stacks of matrices: merges a mapped axis with the batch, and pads."""

from __future__ import annotations

import jax
from jax import lax


def fold(x: jax.Array) -> jax.Array:
  """``[mapped, batch, ...]`` to ``[mapped * batch, ...]``."""
  return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def unfold(x: jax.Array, size: int) -> jax.Array:
  """Inverts ``fold`` for a mapped axis of a given size."""
  return x.reshape(size, x.shape[0] // size, *x.shape[1:])


def pad(x: jax.Array, rows: int, columns: int) -> jax.Array:
  """Pads a stack of matrices with zeros at the end; returns it as it is if it needs none."""
  if not (rows or columns):
    return x
  return lax.pad(x, x.dtype.type(0), ((0, 0, 0), (0, rows, 0), (0, columns, 0)))
