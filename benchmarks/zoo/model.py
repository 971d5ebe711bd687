"""What the benchmark knows of a public model: where it comes from, its inputs and its loss."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Model(NamedTuple):
  """A model and what to run it on.

  Attributes:
    module: the Linen module, as its package makes it.
    args: what ``init`` and ``apply`` take after the key or the variables.
    kwargs: the same by keyword; arrays, or static values.
    read: returns, of the model's output, the array that the loss is of.
    labels: whether the loss is the cross-entropy of the last axis; if not, the mean square of the
      difference to normal values.
    rngs: names of PRNG keys that ``init`` and ``apply`` take besides ``params``.
    mutable: collections that every run of the model changes; the changes are dropped.
  """

  module: nn.Module
  args: tuple[Any, ...] = ()
  kwargs: Mapping[str, Any] = {}
  read: Callable[[Any], jax.Array] = lambda out: out
  labels: bool = False
  rngs: tuple[str, ...] = ()
  mutable: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Case:
  """A model of the corpus.

  Attributes:
    package: its distribution on PyPI.
    name: the model's own name.
    make: imports the package and makes the model.
  """

  package: str
  name: str
  make: Callable[[], Model]


def first_array(out: Any) -> jax.Array:
  """Returns the first floating-point array of an output."""
  return next(_floating(out))


def _floating(out: Any) -> Iterator[jax.Array]:
  for leaf in jax.tree.leaves(out):
    if jnp.issubdtype(leaf.dtype, jnp.floating):
      yield leaf


def tokens(rows: int, length: int, vocabulary: int, seed: int = 0) -> jax.Array:
  """Draws token numbers, ``[rows, length]``."""
  return jax.random.randint(jax.random.key(seed), (rows, length), 3, vocabulary)


def normal(*shape: int, seed: int = 0) -> jax.Array:
  """Draws normal values in float32."""
  return jax.random.normal(jax.random.key(seed), shape)
