"""What the FP8 state says about a model's tensors: one row for each layer and role.

Nothing is run. Whatever holds state will do: variables, their gradients, ``TrainState.params``.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flax_fp8 import fields, tables
from flax_fp8.formats import Format
from flax_fp8.linen.state import require_float32_state
from flax_fp8.recipes.base import Role
from flax_fp8.tables import Table
from flax_fp8.training import histories
from flax_fp8.training.layers import Layer, layers

_Cell = Callable[["TensorStats"], str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorStats:
  """What the state of one tensor says; NaN where it says nothing.

  Attributes:
    layer: path of the module, with an index where layers are stacked: ``layers[3]/query``.
    role: "input", "kernel" or "output_grad".
    amax: the newest, in the units of the tensor.
    scale: the newest.
    limit: the largest value that is representable at that scale.
    history: recorded amaxes, oldest first; empty for a recipe without.
    saturated: part of the values that were beyond the range.
    flushed: part of the nonzero values that became zero.
    noise: power of the error over that of the values.
    nonfinite: part of the values that were NaN or infinite.
  """

  layer: str
  role: str
  amax: float
  scale: float
  limit: float
  history: tuple[float, ...]
  saturated: float
  flushed: float
  noise: float
  nonfinite: float = math.nan

  @property
  def path(self) -> str:
    """The layer, and the role in it."""
    return "/".join(filter(None, (self.layer, self.role)))

  @property
  def largest(self) -> float:
    """The largest amax of the history."""
    return max(self.history, default=math.nan)

  @property
  def jump(self) -> float:
    """The newest amax over the largest before it."""
    before = max(self.history[:-1], default=0.0)
    return self.history[-1] / before if before else math.nan

  @property
  def headroom(self) -> float:
    """Powers of two from the newest amax to the end of the range; below 0 it saturated."""
    if not (self.limit > 0 and self.amax > 0):
      return math.nan
    return round(math.log2(self.limit / self.amax), 4) + 0.0  # scales are rounded: no -1e-8

  @property
  def sqnr(self) -> float:
    """Signal-to-quantisation-noise ratio in dB; infinite where the values were exact."""
    if not self.amax > 0 or math.isnan(self.noise):
      return math.nan
    return -10 * math.log10(self.noise) if self.noise > 0 else math.inf

  def figures(self) -> dict[str, float]:
    """The numbers by name; those that the state does not have are NaN."""
    names = ("amax", "scale", "largest", "jump", "headroom", "saturated", "flushed", "nonfinite")
    return {name: getattr(self, name) for name in (*names, "sqnr")}


@dataclasses.dataclass(frozen=True)
class Stats:
  """A table of the tensors of a model's FP8 contractions.

  ``print(stats)`` fits a terminal.

  Attributes:
    rows: a ``TensorStats`` for each layer and role; one each for layers that are stacked by
      ``nn.scan`` or ``nn.vmap``.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> layer = nn.Dense(2, dot_general_cls=fp8.Fp8DotGeneral)
    >>> x = jnp.array([[3.0, 1.0]])
    >>> variables = layer.init(jax.random.key(0), x)
    >>> stats = fp8.stats(fp8.grad(lambda v: jnp.sum(layer.apply(v, x)))(variables))
    >>> stats.scalars()["Fp8DotGeneral_0/input/amax"]
    3.0

  References:
    Transformer Engine, nvidia-dlfw-inspect, the features LogFp8TensorStats and LogTensorStats.
  """

  rows: tuple[TensorStats, ...]

  def select(self, pattern: str) -> Stats:
    """Keeps the tensors that a glob matches; ``*`` crosses slashes, brackets are themselves.

    Args:
      pattern: of ``layer/role``: ``"layers[3]/*"``, ``"*/output_grad"``.

    Raises:
      ValueError: none matches.
    """
    if not isinstance(pattern, str):
      raise TypeError(
        f"Stats.select: pattern must be a string; got pattern={fields.show(pattern)}. Pass a glob, "
        "such as '*/output_grad'."
      )
    glob = pattern.replace("[", "[[]")
    kept = tuple(row for row in self.rows if fnmatch.fnmatchcase(row.path, glob))
    if not kept:
      raise ValueError(
        f"Stats.select: the pattern must match a tensor; got {pattern!r}, which matches none of "
        f"{len(self.rows)}, such as {self.rows[0].path!r}. Mend the pattern."
      )
    return Stats(kept)

  def scalars(self) -> dict[str, float]:
    """Every finite number as ``{"layers[3]/query/input/amax": ...}``, for any logger."""
    return {
      f"{row.path}/{name}": value
      for row in self.rows
      for name, value in row.figures().items()
      if math.isfinite(value)
    }

  def __str__(self) -> str:
    """The table as text, as wide as the terminal, without the columns that are empty."""
    return tables.terminal((_table(self.rows),))

  def plot(self) -> Any:
    """Draws the amax history of each tensor, and the end of its range; a matplotlib figure.

    Raises:
      ValueError: no tensor has a history.
      ImportError: matplotlib, which only pictures need, is not installed.
    """
    return histories.draw(
      [(row.layer, row.role, row.history, row.limit) for row in self.rows if row.history]
    )


def stats(variables: Any, *, fp8_format: Format = Format.HYBRID) -> Stats:
  """Reads what the FP8 state tells of each tensor.

  From scales and histories of delayed scaling::

      amax, largest = history[0], max(history)
      jump = amax / max(history[1:])                       # how far it outgrew its past
      headroom = log2(max(float8) * scale / amax)          # below 0: beyond the range
      sqnr = -10 log10(noise)                              # with metrics; as the others

  Args:
    variables: variables dict, their gradients, or ``TrainState.params``, outside of ``jit``; of
      gradients, only state is read. Metrics are there after ``add_metrics`` and a step.
    fp8_format: the recipe's, which the state does not hold: ``headroom`` needs it.

  Returns:
    The table: see ``Stats``. State alone does not say which module was stacked: the index stands
    at the outermost one under which all state is, ``layers[3]/query``.

  Raises:
    TypeError: the state is traced, abstract or not float32, or ``fp8_format`` is no ``Format``.
    ValueError: there is no state.

  Numerics:
    All that was recorded at the last step: the scale is the one that it used. An amax that was not
    finite is recorded as 0.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> layer = nn.Dense(2, dot_general_cls=fp8.Fp8DotGeneral)
    >>> x = jnp.array([[896.0, 1.0]])
    >>> variables = layer.init(jax.random.key(0), x)
    >>> new = fp8.grad(lambda v: jnp.sum(layer.apply(v, x)))(variables)
    >>> fp8.stats(new).rows[0].headroom
    -1.0

  References:
    Micikevicius et al., FP8 Formats for Deep Learning, https://arxiv.org/abs/2209.05433.
  """
  if not isinstance(fp8_format, Format):
    raise TypeError(
      f"stats: fp8_format must be a Format; got fp8_format={fields.show(fp8_format)}. Pass that "
      "of the recipe, such as Format.HYBRID."
    )
  require_float32_state("stats", variables)
  rows = [row for layer in layers(variables) for row in _rows(layer, fp8_format)]
  if not rows:
    got = sorted(variables) if isinstance(variables, Mapping) else type(variables)
    raise ValueError(
      "stats: there must be FP8 state, under the key '_overwrite_with_gradient'; got none in "
      f"{got}. Pass the whole variables dict; for a recipe without state call add_metrics(module, "
      "variables, *inputs) first."
    )
  return Stats(tuple(rows))


def _rows(layer: Layer, fp8_format: Format) -> Iterator[TensorStats]:
  """Makes the rows of the roles that a layer has state of."""
  for role in Role:
    leaves = layer.leaves(role)
    if not leaves:
      continue
    float8 = fp8_format.backward if role is Role.OUTPUT_GRAD else fp8_format.forward
    history = _oldest_first(leaves.get("amax_history", np.zeros(0)))
    known = {name: _finite(leaves[name]) for name in leaves if name != "amax_history"}
    scale = known.get("scale", 0.0) or math.nan  # a scale of zero means that no path came
    yield TensorStats(
      layer=layer.name,
      role=role.value,
      amax=history[-1] if history else known.get("amax", math.nan),
      scale=scale,
      limit=scale * float8.max,
      history=history,
      saturated=known.get("saturated", math.nan),
      flushed=known.get("flushed", math.nan),
      noise=known.get("noise", math.nan),
      nonfinite=known.get("nonfinite", math.nan),
    )


def _oldest_first(history: np.ndarray) -> tuple[float, ...]:
  """Slot 0 is the newest, slot 1 the oldest."""
  return tuple(float(amax) for amax in np.roll(np.where(np.isfinite(history), history, 0), -1))


def _finite(leaf: np.ndarray) -> float:
  value = float(leaf.reshape(()))
  return value if math.isfinite(value) else math.nan


def _number(name: str) -> _Cell:
  return lambda row: "" if math.isnan(value := row.figures()[name]) else f"{value:.3g}"


def _percent(name: str) -> _Cell:
  return lambda row: "" if math.isnan(value := row.figures()[name]) else f"{100 * value:.3g} %"


_COLUMNS: dict[str, _Cell] = {
  **{name: _number(name) for name in ("amax", "scale", "largest", "jump", "headroom")},
  **{name: _percent(name) for name in ("saturated", "flushed")},
  # Seen only after a step in which there was one.
  "nonfinite": lambda row: _percent("nonfinite")(row) if row.nonfinite > 0 else "",
  "SQNR dB": lambda row: "" if math.isnan(row.sqnr) else f"{row.sqnr:.1f}",
}


def _table(rows: Sequence[TensorStats]) -> Table:
  """A group for each layer, a line for each of its tensors."""
  cells = {name: [cell(row) for row in rows] for name, cell in _COLUMNS.items()}
  cells = {name: column for name, column in cells.items() if any(column)}
  heads = [(row.layer or "(model)", row.role) for row in rows]
  lines = tuple((*head, *line) for head, *line in zip(heads, *cells.values(), strict=True))
  return Table(("<layer", "<tensor", *cells), lines, grouped=True)
