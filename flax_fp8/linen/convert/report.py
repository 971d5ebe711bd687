"""What a conversion makes of a model: one row a layer, before anything is computed."""

from __future__ import annotations

import dataclasses

from flax_fp8 import tables
from flax_fp8.linen.convert.patterns import Layer
from flax_fp8.recipes.base import Recipe, Role
from flax_fp8.recipes.registry import RECIPES
from flax_fp8.tables import Table

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Row:
  """One layer.

  Attributes:
    layer: path, kind and sizes.
    calls: how often one pass through the model calls it.
    stacked: layers that the one program stands for, under ``nn.scan`` or ``nn.vmap``.
    rule: what decided.
    recipe: in which it will run; None for high precision.
    contracts: whether it is a contraction; else it is a module whose matrices none of these uses.
    is_last: whether it is the last contraction, and as wide as the model's output.
  """

  layer: Layer
  calls: int = 1
  stacked: int = 1
  rule: str = ""
  recipe: Recipe | None = None
  contracts: bool = True
  is_last: bool = False

  @property
  def taken(self) -> bool:
    """Tells whether it will be FP8."""
    return self.recipe is not None

  @property
  def bytes_saved(self) -> int:
    """Bytes that FP8 saves between forward and backward pass, its state deducted.

    ``((itemsize - 1) * (inputs * calls + kernel) - state) * stacked``: what a GEMM keeps for the
    backward pass takes one byte an element. Of a kernel that is a parameter of the GEMM's dtype the
    GEMM keeps nothing in high precision, and a byte an element in FP8.
    """
    if self.recipe is None:
      return 0
    inputs, kernel = self.layer.inputs * self.calls, self.layer.kernel_size
    before = self.layer.itemsize * (inputs + (0 if self.layer.stored else kernel))
    return (before - inputs - kernel - state_bytes(self.recipe)) * self.stacked


def state_bytes(recipe: Recipe) -> int:
  """Bytes of the state of one layer."""
  return sum(leaf.nbytes for role in Role for leaf in recipe.init_state(role).values())


@dataclasses.dataclass(frozen=True)
class ConversionReport:
  """What ``fp8_linear_layers`` makes of a model; ``print`` it.

  Attributes:
    rows: the contractions, in the order of their first calls; then the modules with parameters of
      two or more axes that no contraction among these uses, each with what it would take.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    >>> report = fp8.Fp8Config().report(nn.Dense(32, name="up"), x)
    >>> report.taken[0].layer.features
    32

  References:
    flax.linen.Module.tabulate.
  """

  rows: tuple[Row, ...]

  @property
  def taken(self) -> tuple[Row, ...]:
    """The layers that become FP8."""
    return tuple(row for row in self.rows if row.taken)

  @property
  def bytes_saved(self) -> int:
    """Bytes saved between forward and backward pass by all layers."""
    return sum(row.bytes_saved for row in self.rows)

  def __str__(self) -> str:
    """Renders the table for a terminal."""
    return tables.terminal(self._parts())

  def to_markdown(self) -> str:
    """Renders the table as Markdown."""
    return tables.markdown(self._parts())

  def _parts(self) -> tuple[Table | str, ...]:
    columns = ("<layer", "<kind", "K x N", "times", "<FP8", "MiB saved", "<rule")
    parts = Table(columns, tuple(map(_cells, self.rows))), self._totals()
    last = next((row for row in self.taken if row.is_last), None)
    if last is None or any(row.rule.startswith("output head") for row in self.rows):
      return parts
    return (
      *parts,
      f"{last.layer.path or '(root)'} gives the model's output and becomes FP8. If it is the "
      f"output head, exclude={last.layer.path!r} keeps it in high precision.",
    )

  def _totals(self) -> str:
    of_all = sum(row.stacked for row in self.rows if row.contracts)
    of_taken = sum(row.stacked for row in self.taken)
    kernels = [sum(row.layer.kernel_size * row.stacked for row in rows) for rows in self._both]
    share = 100 * kernels[0] / kernels[1] if kernels[1] else 0.0
    less = "less" if self.bytes_saved >= 0 else "more"
    paths = sum(row.contracts for row in self.rows)
    stacked = f" ({paths} paths; nn.scan and nn.vmap stack layers)" if of_all > paths else ""
    return (
      f"{of_taken} of {of_all} layers become FP8{stacked}: {share:.1f} % of the {kernels[1]:,} "
      f"elements of all matrices. About {abs(self.bytes_saved) / _MIB:.1f} MiB {less} is kept "
      "between forward and backward pass."
    )

  @property
  def _both(self) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    return self.taken, self.rows


def _cells(row: Row) -> tuple[str, ...]:
  layer = row.layer
  batch = f"{layer.batch} x " if layer.batch > 1 else ""
  size = f"{batch}{layer.contracted} x {layer.features}"
  return (
    layer.path or "(root)",
    layer.kind,
    size if row.contracts or layer.features > 1 else str(layer.contracted),
    str(row.stacked * row.calls) if row.contracts else str(row.stacked),
    _name(row.recipe),
    f"{round(row.bytes_saved / _MIB, 2) + 0.0:.2f}" if row.taken else "",
    row.rule,
  )


def _name(recipe: Recipe | None) -> str:
  if recipe is None:
    return "no"
  names = {cls: name for name, cls in RECIPES.items()}
  return names.get(type(recipe), type(recipe).__name__)
