"""Checks that the newest amax is the maximum over the whole batch.

The check fills batches with two elements: one with a small amax and one with a large amax. A
maximum is the large amax if any part of the batch contains it. A mean is additive over parts. The
amax of one part does not depend on the other parts. Dropout causes neither, so it gives no false
finding.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_fp8.training.check.report import Finding
from flax_fp8.training.check.step import Outcome

_TRIED = 4
_CONTRAST = 1.05
_SAME = 1e-5

# Run calls the step on a batch. Read returns the newest amax of each tensor from an outcome.
Run = Callable[[Any], Outcome]
Read = Callable[[Outcome], Mapping[str, float]]


def check_batch(
  batch: Any, run: Run, read: Read, trained_by: Callable[[str], frozenset[str]]
) -> list[Finding]:
  """Finds amaxes that cover only a part of the batch, and amaxes that are means.

  Args:
    batch: pytree of arrays with a common leading axis.
    run: calls the step on a batch, always from the same state.
    read: returns the newest amax of each input, by path.
    trained_by: returns the paths of leaves that are trained with a tensor, such as the parameters
      of its layer.

  Returns:
    At most one finding. None if tensors see different parts of the batch, or if all tried elements
    have equal amaxes.
  """
  size = _size(batch)
  if size < 2:
    return []
  places = np.unique(np.linspace(0, size - 1, min(size, _TRIED)).round().astype(int))
  alone = {int(i): run(_take(batch, np.full(size, i))) for i in places}
  amaxes = {i: read(outcome) for i, outcome in alone.items()}
  small, large = max(itertools.permutations(alone, 2), key=lambda p: _contrast(amaxes, *p))
  tensors = [t for t in amaxes[small] if _differ(amaxes[small][t], amaxes[large][t])]
  if not tensors:
    return []
  for split in _splits(size):
    outcomes = [run(_take(batch, np.where(part, large, small))) for part in split]
    none, both, *parts = [amaxes[small], amaxes[large], *map(read, outcomes)]
    changed = [_changed(alone[small], outcome) for outcome in outcomes]
    for half, other in ((0, 1), (1, 0)):
      judged = [t for t in tensors if _depends(changed[half], trained_by(t))]
      blind = (_equal(parts[half][t], none[t]) and _equal(parts[other][t], both[t]) for t in judged)
      if judged and all(blind):
        where = f"elements {_describe(split[other])} of {size}"
        return [Finding("partial", tuple(judged), f"the newest amax is that of {where} alone")]
    adds_up = (
      none[t] < min(parts[0][t], parts[1][t])
      and max(parts[0][t], parts[1][t]) < both[t]
      and _equal(parts[0][t] + parts[1][t], none[t] + both[t])
      for t in tensors
    )
    if all(adds_up):
      seen = "the newest amax is the mean or sum over parts of the batch, not the largest"
      return [Finding("mean", tuple(tensors), seen)]
  return []


def _depends(changed: set[str], trained: frozenset[str]) -> bool:
  """Returns whether a leaf trained with a tensor changed; if none is known, whether any did."""
  return bool(changed & trained if trained else changed)


def _size(batch: Any) -> int:
  """Returns the most common size of the leading axis."""
  sizes = Counter(leaf.shape[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf) > 0)
  return sizes.most_common(1)[0][0] if sizes else 0


def _take(batch: Any, indices: np.ndarray) -> Any:
  """Fills the batch with the elements at ``indices``."""

  def one(leaf: Any) -> Any:
    if np.ndim(leaf) == 0 or leaf.shape[0] != len(indices):
      return leaf
    if not isinstance(leaf, jax.Array):
      return leaf[indices]
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    taken = leaf[indices] if is_key else np.asarray(leaf)[indices]
    return jax.device_put(taken, leaf.sharding if getattr(leaf, "committed", True) else None)

  return jax.tree.map(one, batch)


def _splits(size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields splits at possible boundaries of microbatches, contiguous and strided."""
  places = np.arange(size)
  parts = [n for n in (2, 3, 5) if size % n == 0] or [2]
  firsts = [places < size // n for n in parts] + [places % n == 0 for n in parts if size > n]
  yield from ((first, ~first) for first in firsts)


def _describe(part: np.ndarray) -> str:
  places = np.flatnonzero(part)
  if places[-1] - places[0] >= len(places):
    return ", ".join(map(str, places[:3])) + ", ..."
  return f"{places[0]} to {places[-1]}" if len(places) > 1 else f"{places[0]}"


def _contrast(amaxes: Mapping[int, Mapping[str, float]], small: int, large: int) -> int:
  return sum(_differ(amaxes[small][t], amaxes[large][t]) for t in amaxes[small])


def _differ(small: float, large: float) -> bool:
  return _CONTRAST * small < large < math.inf


def _equal(a: float, b: float) -> bool:
  return math.isclose(a, b, rel_tol=_SAME)


def _changed(one: Outcome, other: Outcome) -> set[str]:
  """Returns the paths of leaves that differ between two outcomes, except FP8 state."""
  return {path for path in one.prints if one.prints[path] != other.prints.get(path)}


def beside(tensor: str, group: str, others: Iterable[str]) -> frozenset[str]:
  """Returns the paths of leaves that belong to the layer of a tensor.

  These are below the same module path. If several trees have it, the one nearest to the state.

  Args:
    tensor: path within the collection, such as ``block/dense/Fp8DotGeneral_0/input``.
    group: path of the collection.
    others: paths of all leaves that are not FP8 state.
  """
  inside = "/" + "".join(f"{part}/" for part in tensor.split("/")[:-2])
  found = [path for path in others if inside in f"/{path}" and inside != "/"]
  near = {path: _shared(path.split("/"), group.split("/")) for path in found}
  return frozenset(path for path in found if near[path] == max(near.values()))


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
  """Returns the length of the common prefix of two paths."""
  pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
  return len(list(pairs))
