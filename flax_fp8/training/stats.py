"""Statistics of a model's tensors, read from FP8 state: one row for each layer and role.

The model does not run. The input is any tree with state: variables, gradients, or
``TrainState.params``.
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
  """Statistics of one tensor; NaN for each number that the state does not contain.

  Attributes:
    layer: path of the module, with an index for stacked layers: ``layers[3]/query``.
    role: "input", "kernel" or "output_grad".
    amax: newest amax, in the units of the tensor.
    scale: newest dequantization scale.
    limit: largest representable value at that scale.
    history: recorded amaxes, oldest first; empty for a recipe without history. ``repr`` omits it.
    saturated: fraction of the values beyond the representable range.
    flushed: fraction of the nonzero values that became zero.
    noise: power of the quantization error divided by the power of the values.
    nonfinite: fraction of the values that were NaN or infinite.
  """

  layer: str
  role: str
  amax: float
  scale: float
  limit: float
  history: tuple[float, ...] = dataclasses.field(repr=False)
  saturated: float
  flushed: float
  noise: float
  nonfinite: float = math.nan

  @property
  def path(self) -> str:
    """The layer and the role, joined by a slash."""
    return "/".join(filter(None, (self.layer, self.role)))

  @property
  def largest(self) -> float:
    """The largest amax of the history."""
    return max(self.history, default=math.nan)

  @property
  def jump(self) -> float:
    """The newest amax divided by the largest earlier one."""
    before = max(self.history[:-1], default=0.0)
    return self.history[-1] / before if before else math.nan

  @property
  def headroom(self) -> float:
    """``log2(limit / amax)``; negative if the newest amax saturated."""
    if not (self.limit > 0 and self.amax > 0):
      return math.nan
    return round(math.log2(self.limit / self.amax), 4) + 0.0  # scales are rounded: no -1e-8

  @property
  def sqnr(self) -> float:
    """Signal-to-quantization-noise ratio in dB; infinite if the values were exact."""
    if not self.amax > 0 or math.isnan(self.noise):
      return math.nan
    return -10 * math.log10(self.noise) if self.noise > 0 else math.inf

  def figures(self) -> dict[str, float]:
    """Returns the numbers by name; NaN for those that the state does not contain."""
    names = ("amax", "scale", "largest", "jump", "headroom", "saturated", "flushed", "nonfinite")
    return {name: getattr(self, name) for name in (*names, "sqnr")}


@dataclasses.dataclass(frozen=True)
class Stats:
  """A table of the tensors of a model's FP8 contractions.

  ``print(stats)`` shows the table at the width of the terminal.

  Attributes:
    rows: a ``TensorStats`` for each layer and role. Layers stacked by ``nn.scan`` or ``nn.vmap``
      have a row each.

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
    Transformer Engine, nvidia-dlfw-inspect, features LogFp8TensorStats and LogTensorStats.
  """

  rows: tuple[TensorStats, ...]

  def select(self, pattern: str) -> Stats:
    """Selects the tensors that match a glob.

    ``*`` also matches slashes. Brackets match themselves.

    Args:
      pattern: glob of ``layer/role``, such as ``"layers[3]/*"`` or ``"*/output_grad"``.

    Returns:
      A ``Stats`` of the matching rows.

    Raises:
      TypeError: ``pattern`` is not a string.
      ValueError: no tensor matches.
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
        f"Stats.select: pattern must match at least one tensor; got {pattern=}, which matches none "
        f"of {len(self.rows)} tensors. Pass a glob of paths such as {self.rows[0].path!r}."
      )
    return Stats(kept)

  def scalars(self) -> dict[str, float]:
    """Returns every finite number as ``{"layers[3]/query/input/amax": ...}``, for a logger."""
    return {
      f"{row.path}/{name}": value
      for row in self.rows
      for name, value in row.figures().items()
      if math.isfinite(value)
    }

  def __str__(self) -> str:
    """Returns the table as text, at the width of the terminal, without empty columns."""
    return tables.terminal((_table(self.rows),))

  def plot(self) -> Any:
    """Draws the amax history and the largest representable value of each tensor.

    Returns:
      A matplotlib figure.

    Raises:
      ValueError: no tensor has a history.
      ImportError: matplotlib is not installed.
    """
    return histories.draw(
      [(row.layer, row.role, row.history, row.limit) for row in self.rows if row.history]
    )


def stats(variables: Any, *, fp8_format: Format = Format.HYBRID) -> Stats:
  """Reads the statistics of each tensor from FP8 state.

  For delayed scaling, they are computed from the scale and the history ``h``, whose slot 0 is the
  newest amax::

      amax, largest = h[0], max(h)
      jump = amax / max(h[1:])                             # growth over all earlier steps
      headroom = log2(max(float8) * scale / amax)          # below 0: the amax saturated
      sqnr = -10 log10(noise)                              # with metrics

  Call ``add_metrics`` and run a step to also get ``saturated``, ``flushed``, ``noise`` and
  ``nonfinite``.

  Args:
    variables: variables dict, its gradients, or ``TrainState.params``, outside ``jit``. Only state
      is read from gradients.
    fp8_format: format of the recipe, which the state does not contain. ``headroom`` depends on it.

  Returns:
    The table; see ``Stats``. A module stacked by ``nn.scan`` or ``nn.vmap`` has an index in its
    path: ``layers[3]/query`` if all of ``layers`` is stacked, ``block/experts[3]`` if ``experts``
    is stacked and ``block/router`` beside it is not. State does not record which module was
    stacked. So the index follows the outermost module whose state all has the same stacking axes.

  Raises:
    TypeError: the state is traced, abstract or not float32, or ``fp8_format`` is not a ``Format``.
    ValueError: ``variables`` has no FP8 state.

  Numerics:
    All numbers are those of the last step, including the scale that it used. A nonfinite amax is
    recorded as 0.

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
      f"stats: fp8_format must be a Format; got fp8_format={fields.show(fp8_format)}. Pass the "
      "format of the recipe, such as Format.HYBRID."
    )
  require_float32_state("stats", variables)
  rows = [row for layer in layers(variables) for row in _rows(layer, fp8_format)]
  if not rows:
    got = sorted(variables) if isinstance(variables, Mapping) else type(variables)
    raise ValueError(
      "stats: variables must have FP8 state under the key '_overwrite_with_gradient'; got none in "
      f"{got}. Pass the whole variables dict, or call add_metrics(module, variables, *inputs) "
      "first if the recipe has no state."
    )
  return Stats(tuple(rows))


def _rows(layer: Layer, fp8_format: Format) -> Iterator[TensorStats]:
  """Yields a row for each role that has state in a layer."""
  for role in Role:
    leaves = layer.leaves(role)
    if not leaves:
      continue
    float8 = fp8_format.backward if role is Role.OUTPUT_GRAD else fp8_format.forward
    history = _oldest_first(leaves.get("amax_history", np.zeros(0)))
    known = {name: _finite(leaves[name]) for name in leaves if name != "amax_history"}
    scale = known.get("scale", 0.0) or math.nan  # in gradients, zero means that no path used it
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
  """Reorders a history: slot 0 is the newest, slot 1 the oldest."""
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
  # Shown only if a step had nonfinite values.
  "nonfinite": lambda row: _percent("nonfinite")(row) if row.nonfinite > 0 else "",
  "SQNR dB": lambda row: "" if math.isnan(row.sqnr) else f"{row.sqnr:.1f}",
}


def _table(rows: Sequence[TensorStats]) -> Table:
  """Builds a table with a group for each layer and a line for each tensor."""
  cells = {name: [cell(row) for row in rows] for name, cell in _COLUMNS.items()}
  cells = {name: column for name, column in cells.items() if any(column)}
  heads = [(row.layer or "(model)", row.role) for row in rows]
  lines = tuple((*head, *line) for head, *line in zip(heads, *cells.values(), strict=True))
  return Table(("<layer", "<tensor", *cells), lines, grouped=True)
