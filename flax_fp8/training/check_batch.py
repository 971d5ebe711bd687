"""Is the newest amax the largest of the whole batch? Batches of two elements tell.

Every place of a batch is filled with its element of small amax, or with that of large amax, or one
half with each. A maximum is then the large one wherever a half holds it. A mean adds up; the amax
of a part does not change with the rest. Dropout does neither, and so raises no alarm.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from flax_fp8.training.check_report import Finding
from flax_fp8.training.check_step import Outcome

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
  for halves in _halves(size):
    outcomes = [run(_take(batch, np.where(half, large, small))) for half in halves]
    none, both, *parts = [amaxes[small], amaxes[large], *map(read, outcomes)]
    for blind in (0, 1):
      changed = _changed(alone[small], outcomes[blind])
      judged = [t for t in tensors if not (own := trained_by(t)) or own & changed]
      if not judged or not changed:
        continue
      where = f"elements {_describe(halves[1 - blind])} of {size}"
      if all(_equal(parts[blind][t], none[t]) and _equal(parts[1 - blind][t], both[t])
             for t in judged):  # fmt: skip
        return [Finding("partial", tuple(judged), f"the newest amax is that of {where} alone")]
      if all(_equal(parts[0][t] + parts[1][t], none[t] + both[t]) for t in judged):
        seen = "the newest amax is the mean or sum over parts of the batch, not the largest"
        return [Finding("mean", tuple(judged), seen)]
  return []


def _size(batch: Any) -> int:
  """The leading axis that most arrays have."""
  sizes = Counter(leaf.shape[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf) > 0)
  return sizes.most_common(1)[0][0] if sizes else 0


def _take(batch: Any, indices: np.ndarray) -> Any:
  """Fills the batch with some of its elements."""

  def one(leaf: Any) -> Any:
    if np.ndim(leaf) == 0 or leaf.shape[0] != len(indices):
      return leaf
    if isinstance(leaf, jax.Array) and getattr(leaf, "committed", False):
      return jax.device_put(leaf[indices], leaf.sharding)
    return leaf[indices]

  return jax.tree.map(one, batch)


def _halves(size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Splits into first and second half, then into even and odd places."""
  places = np.arange(size)
  first = places < size // 2
  yield first, ~first
  if size > 2:
    yield places % 2 == 0, places % 2 == 1


def _describe(half: np.ndarray) -> str:
  places = np.flatnonzero(half)
  if len(places) > 1 and places[1] - places[0] == 2:
    return f"{places[0]}, {places[1]}, ..."
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


def beside(tensor: str, others: Mapping[str, Any]) -> frozenset[str]:
  """Finds what is trained with a tensor: what lies below the same module, anywhere in the state.

  Args:
    tensor: path within the collection: ``block/dense/Fp8DotGeneral_0/input``.
    others: paths of all else.
  """
  *module, _contraction, _role = tensor.split("/")
  inside = "/" + "/".join(module) + "/"
  found = {path for path in others if inside in f"/{path}"} if module else set()
  return frozenset(found)
