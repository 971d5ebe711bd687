"""Is the newest amax the largest of the whole batch? Batches of two elements tell.

Every place of a batch is filled with its element of small amax, or with that of large amax, or a
part of it with each. A maximum is then the large one wherever a part holds it. A mean adds up; the
amax of a part does not change with the rest. Dropout does neither, and so raises no alarm.
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

# Runs the step on a batch; and reads the newest amaxes from what came out, by tensor.
Run = Callable[[Any], Outcome]
Read = Callable[[Outcome], Mapping[str, float]]


def check_batch(
  batch: Any, run: Run, read: Read, trained_by: Callable[[str], frozenset[str]]
) -> list[Finding]:
  """Looks for amaxes of a part of the batch, and for means.

  Args:
    batch: pytree of arrays with one leading axis.
    run: takes the step from one fixed state.
    read: the newest amax of each input, by path.
    trained_by: paths of what is trained with a tensor, parameters of its layer say.

  Returns:
    What was found: nothing, where tensors see different parts, or elements have equal amaxes.
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
  """Tells whether what is trained with a tensor changed; anything, if that is not known."""
  return bool(changed & trained if trained else changed)


def _size(batch: Any) -> int:
  """The leading axis that most arrays have."""
  sizes = Counter(leaf.shape[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf) > 0)
  return sizes.most_common(1)[0][0] if sizes else 0


def _take(batch: Any, indices: np.ndarray) -> Any:
  """Fills the batch with some of its elements."""

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
  """Splits at the borders of microbatches, in a row and in strides."""
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
  """Paths of what two outcomes differ in, FP8 state aside."""
  return {path for path in one.prints if one.prints[path] != other.prints.get(path)}


def beside(tensor: str, group: str, others: Iterable[str]) -> frozenset[str]:
  """Finds what is trained with a tensor: what lies below the same module, nearest to the state.

  Args:
    tensor: path within the collection: ``block/dense/Fp8DotGeneral_0/input``.
    group: path of the collection.
    others: paths of all else.
  """
  inside = "/" + "".join(f"{part}/" for part in tensor.split("/")[:-2])
  found = [path for path in others if inside in f"/{path}" and inside != "/"]
  near = {path: _shared(path.split("/"), group.split("/")) for path in found}
  return frozenset(path for path in found if near[path] == max(near.values()))


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
  """Counts the parts that two paths begin with."""
  pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
  return len(list(pairs))
