"""The report of a dry run: one row for each layer, without running the model."""

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
  """One row of a report: a contraction, or a module with matrices that no contraction uses.

  Attributes:
    layer: path, kind and sizes.
    calls: number of calls in one forward pass.
    stacked: number of layers that ``nn.scan`` or ``nn.vmap`` stacks in this row.
    rule: the rule that decided.
    recipe: the recipe; None for high precision.
    contracts: whether the row is a contraction.
    is_last: whether this is the last contraction and is as wide as the model's output.
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
    """Whether the layer will run in FP8."""
    return self.recipe is not None

  @property
  def bytes_saved(self) -> int:
    """Bytes of residuals that FP8 saves between the forward and the backward pass.

    ``((itemsize - 1) * (inputs * calls + kernel) - state) * stacked``

    FP8 residuals take one byte per element, and the FP8 state is subtracted. A kernel that is a
    parameter of the GEMM's dtype needs no residual in high precision, so its FP8 copy counts as a
    cost of one byte per element.
    """
    if self.recipe is None:
      return 0
    inputs, kernel = self.layer.inputs * self.calls, self.layer.kernel_size
    before = self.layer.itemsize * (inputs + (0 if self.layer.stored else kernel))
    return (before - inputs - kernel - state_bytes(self.recipe)) * self.stacked


def state_bytes(recipe: Recipe) -> int:
  """Returns the bytes of FP8 state in one layer."""
  return sum(leaf.nbytes for role in Role for leaf in recipe.init_state(role).values())


@dataclasses.dataclass(frozen=True)
class ConversionReport:
  """The layers that ``fp8_linear_layers`` converts. Returned by ``Fp8Config.report``.

  Pass it to ``print`` for a table with these columns:

  - layer, kind: the module path, and the class or the called function;
  - K x N: the contracted size and the features of the kernel, after the number of experts;
  - times: the number of calls in one forward pass, times the number of stacked layers;
  - FP8: the recipe, or "no" for high precision;
  - MiB saved: the memory saved between the forward and the backward pass;
  - rule: the rule that decided.

  Attributes:
    rows: first the contractions, in the order of their first calls. Then the modules with a
      parameter of two or more axes that none of these contractions uses. Their rule says how to
      include them.

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
    """The layers that run in FP8."""
    return tuple(row for row in self.rows if row.taken)

  @property
  def bytes_saved(self) -> int:
    """Bytes that all layers save between the forward and the backward pass."""
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
      f"{last.layer.path or '(root)'} computes the model's output in FP8. If it is the output "
      f"head, pass exclude={last.layer.path!r} to keep it in high precision.",
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
      f"{of_taken} of {of_all} layers become FP8{stacked}, with {share:.1f} % of the "
      f"{kernels[1]:,} matrix elements. The forward pass stores about "
      f"{abs(self.bytes_saved) / _MIB:.1f} MiB {less} for the backward pass."
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
