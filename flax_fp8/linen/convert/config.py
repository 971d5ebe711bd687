"""What of a model becomes FP8: recipes, patterns, and the rules that decide about each layer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn

from flax_fp8 import fields
from flax_fp8.linen.arguments import require_module
from flax_fp8.linen.convert.patterns import (
  Layer,
  Pattern,
  check_patterns,
  first_match,
  matches,
  near_misses,
  show,
)
from flax_fp8.linen.convert.report import ConversionReport, Row
from flax_fp8.linen.convert.survey import survey
from flax_fp8.linen.converted import original
from flax_fp8.ops import check
from flax_fp8.recipes.base import Recipe
from flax_fp8.recipes.delayed import DelayedScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exclusion:
  """Layers that stay in high precision by default.

  Attributes:
    reason: what they are, for the report.
    names: globs of the last name of the path.
    narrowing: of these layers only those whose features are at most the contracted size divided by
      this; 0 for all.
    but: globs of last names that are none of these all the same.
  """

  reason: str
  names: tuple[str, ...]
  narrowing: int = 0
  but: tuple[str, ...] = ()

  def applies(self, layer: Layer) -> bool:
    """Tells whether a layer is one of these."""
    name = layer.module.path.rpartition("/")[2].lower()
    last = dataclasses.replace(layer, path=name, owner=None)
    if self.narrowing and layer.features * self.narrowing > layer.contracted:
      return False
    return first_match(self.names, last) is not None and first_match(self.but, last) is None


_DEFAULT_RECIPE = DelayedScaling()

DEFAULT_EXCLUSIONS = (
  Exclusion(
    reason="output head",
    names=("head", "*_head", "head_dense", "*logit*", "classifier", "unembed*"),
    but=("pre_*",),  # a hidden layer before the head
  ),
  Exclusion(reason="embedding", names=("*embed*",)),
  Exclusion(reason="norm", names=("*norm*",)),
  Exclusion(reason="router", names=("*router*",)),
  # SwiGLU has a gate too, but that one is wide.
  Exclusion(reason="router", names=("gate", "*_gate", "gating*"), narrowing=8),
)


@dataclasses.dataclass(frozen=True)
class Decision:
  """What becomes of a layer.

  Attributes:
    recipe: the recipe in which it runs; None for high precision.
    rule: what decided.
  """

  recipe: Recipe | None
  rule: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8Config:
  """Which layers of a model run in FP8, and how.

  A pattern is a glob over the whole module path (``"*/mlp/*"``; ``*`` crosses slashes), a compiled
  regular expression that is searched in it, or a function of a ``Layer``. A path may have the
  model's class before it, as ``assert_fp8`` shows it: ``"Net/mlp/up"`` is ``"mlp/up"``.

  A layer is an ``nn.Dense``, ``nn.DenseGeneral`` or ``nn.Einsum``, also of a subclass, or a module
  that contracts with its own parameter ``kernel``. Rules are tried in this order, and the first
  that applies decides: what a layer itself rules out, ``targets``, ``exclude``,
  ``default_exclude``, ``skip_first`` and ``skip_last``, sizes.

  Attributes:
    recipe: how the layers are scaled.
    recipes: other recipes for some of them: pairs of a pattern and a recipe, or a mapping; the
      first that matches counts. A recipe's ``high_precision`` chooses the precision of each GEMM.
    targets: layers to convert.
    exclude: layers not to convert.
    default_exclude: what is left out unasked: embeddings, norms, routers, output heads. ``()`` for
      none.
    functions: modules of which all contractions of their own methods are converted, however they
      are written: ``jnp.einsum``, ``x @ w``, ``lax.dot_general``. The operand on the right is the
      kernel. Their state is numbered in the order of the calls, as Linen numbers submodules without
      a name: make the same calls in each run.
    skip_first: of all linear layers, in the order of their calls, so many stay as they are.
    skip_last: the same from the end.
    multiple_of: contracted size and features must be multiples of this, as FP8 kernels want.
    min_kernel_size: elements that a kernel must have.
    emulate: lets a device without the recipe's FP8 multiply in a wider type.

  Raises:
    TypeError: a field is of another type; a pattern is no glob, regular expression or function.
    ValueError: a count is negative.

  Example:
    >>> import flax_fp8 as fp8
    >>> config = fp8.Fp8Config(
    ...   recipe=fp8.Float8CurrentScaling(),
    ...   recipes={"*/down": fp8.Float8CurrentScaling(high_precision=("wgrad",))},
    ...   exclude="*/out",
    ... )
    >>> config.exclude
    ('*/out',)

  References:
    torchao.float8.convert_to_float8_training; Transformer Engine, fp8_autocast.
  """

  recipe: Recipe = _DEFAULT_RECIPE
  recipes: Any = ()
  targets: Any = ("*",)
  exclude: Any = ()
  default_exclude: tuple[Exclusion, ...] = DEFAULT_EXCLUSIONS
  functions: Any = ()
  skip_first: int = 0
  skip_last: int = 0
  multiple_of: int = 16
  min_kernel_size: int = 0
  emulate: bool = False

  def __post_init__(self) -> None:
    check.recipe("Fp8Config", self.recipe)
    object.__setattr__(self, "recipes", _check_pairs(self.recipes))
    for name in ("targets", "exclude", "functions"):
      object.__setattr__(self, name, check_patterns(name, getattr(self, name)))
    if not self.targets:
      raise ValueError(
        "Fp8Config: targets must hold at least one pattern; got targets=(). Leave it out for all "
        "layers, or leave the model unconverted."
      )
    object.__setattr__(self, "default_exclude", _check_exclusions(self.default_exclude))
    default = "Leave it out for the default."
    for name in ("skip_first", "skip_last", "multiple_of", "min_kernel_size"):
      value, least = getattr(self, name), 1 if name == "multiple_of" else 0
      value = fields.integer("Fp8Config", name, value, default, least=least)
      object.__setattr__(self, name, value)
    object.__setattr__(self, "emulate", fields.flag("Fp8Config", "emulate", self.emulate))

  def __repr__(self) -> str:
    """Shows the fields that are not the defaults."""
    shown = (
      f"{field.name}={value!r}"
      for field in dataclasses.fields(self)
      if (value := getattr(self, field.name)) != field.default
    )
    return f"Fp8Config({', '.join(shown)})"

  def report(self, module: nn.Module, *init_args: Any, **init_kwargs: Any) -> ConversionReport:
    """Says what ``fp8_linear_layers`` would make of a model; nothing is computed.

    Args:
      module: the model, unmodified.
      *init_args: what its ``init`` takes after the PRNG key; arrays or ShapeDtypeStructs.
      **init_kwargs: the same by keyword.

    Returns:
      A row a layer. ``print`` it.

    Raises:
      ValueError: a pattern matches no layer; ``skip_first`` or ``skip_last`` would part the layers
        of an ``nn.scan``.
      TypeError: ``module`` is no Linen module.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import flax_fp8 as fp8
      >>> model = nn.Sequential([nn.Dense(32), nn.gelu, nn.Dense(10)])
      >>> report = fp8.Fp8Config().report(model, jax.ShapeDtypeStruct((8, 16), jnp.float32))
      >>> [(row.layer.path, row.rule) for row in report.rows]
      [('layers_0', "target '*'"), ('layers_2', 'features 10 not a multiple of 16')]
    """
    require_module("Fp8Config.report", module)
    seen = survey(original(module), self.functions, init_args, init_kwargs)
    contractions = [row for row in seen if row.contracts]
    self.check_matches([row.layer for row in contractions], complete=True)
    order = tuple(row.layer.path for row in contractions)
    self._check_skips(contractions, order)
    rows = [
      dataclasses.replace(row, rule=decision.rule, recipe=decision.recipe)
      for row in seen
      for decision in (self.decide(row.layer, order),)
    ]
    return ConversionReport(tuple(rows))

  def decide(self, layer: Layer, order: tuple[str, ...] | None) -> Decision:
    """Decides about a layer.

    Args:
      layer: the layer.
      order: paths of all layers in the order of their first calls; needed for skips alone.

    Returns:
      The recipe, or None, and the rule that decided.
    """
    if rule := self._refuse(layer, order):
      return Decision(None, rule)
    for pattern, recipe in self.recipes:
      if matches(pattern, layer):
        return Decision(recipe, f"recipe of {show(pattern)}")
    target = next(pattern for pattern in self.targets if matches(pattern, layer))
    return Decision(self.recipe, f"target {show(target)}")

  def _refuse(self, layer: Layer, order: tuple[str, ...] | None) -> str:
    """Returns the rule that keeps a layer out of FP8, or ``""``."""
    if layer.refusal:
      return layer.refusal
    if first_match(self.targets, layer) is None:
      return "no target"
    if (pattern := first_match(self.exclude, layer)) is not None:
      return f"exclude {show(pattern)}"
    for exclusion in self.default_exclude:
      if exclusion.applies(layer):
        return f"{exclusion.reason}, by default"
    if order and layer.path in order[: self.skip_first]:
      return f"among the first {self.skip_first}"
    if order and layer.path in order[max(0, len(order) - self.skip_last) :]:
      return f"among the last {self.skip_last}"
    return self._refuse_size(layer)

  def _refuse_size(self, layer: Layer) -> str:
    for name, size in (("contracted", layer.contracted), ("features", layer.features)):
      if size % self.multiple_of:
        return f"{name} {size} not a multiple of {self.multiple_of}"
    if layer.kernel_size < self.min_kernel_size:
      return f"kernel of {layer.kernel_size} below {self.min_kernel_size}"
    return ""

  @property
  def needs_order(self) -> bool:
    """Tells whether the order of the layers decides about some."""
    return bool(self.skip_first or self.skip_last)

  def check_matches(
    self, layers: Iterable[Layer], *, complete: bool, modules: Iterable[Layer] = ()
  ) -> None:
    """Raises ValueError where a pattern matches no layer.

    Args:
      layers: those of the model.
      complete: whether these are all layers with all that is known of them; if not, functions as
        patterns are not judged.
      modules: others, which may have contractions of their own; ``functions`` may name them.
    """
    layers = list(layers)
    paths = [layer.path for layer in layers]
    named = {"targets": self.targets, "exclude": self.exclude}
    named["recipes"] = tuple(pattern for pattern, _ in self.recipes)
    for field, patterns in named.items():
      for pattern in patterns:
        known = pattern != "*" and (complete or isinstance(pattern, (str, re.Pattern)))
        if known and not any(matches(pattern, layer) for layer in layers):
          raise ValueError(
            f"Fp8Config: every pattern must match a layer; got {show(pattern)} in {field}, which "
            f"matches none of {len(set(paths))}. Near misses: {near_misses(pattern, paths)}. Mend "
            "the pattern, or leave it out."
          )
    plain = ("Dense", "DenseGeneral", "Einsum")
    own = [layer.module for layer in layers if layer.is_function or layer.kind not in plain]
    own += modules
    for pattern in self.functions:
      known = complete or isinstance(pattern, (str, re.Pattern))
      if known and not any(matches(pattern, layer) for layer in own):
        raise ValueError(
          "Fp8Config: every pattern in functions must match a module that itself calls a "
          f"contraction, such as jnp.einsum or x @ w; got {show(pattern)}, which matches none. "
          f"Paths with contractions: {near_misses(pattern, paths)}. Name the module whose method "
          "makes the call, not its parent. Linear layers need no name."
        )

  def _check_skips(self, rows: Iterable[Row], order: tuple[str, ...]) -> None:
    skipped = {*order[: self.skip_first], *order[max(0, len(order) - self.skip_last) :]}
    for row in rows:
      if self.needs_order and row.stacked > 1 and row.layer.path in skipped:
        raise ValueError(
          "Fp8Config: skip_first and skip_last count layers of which each has a program of its "
          f"own; got skip_first={self.skip_first}, skip_last={self.skip_last}, which would take "
          f"{row.layer.path!r}, one program for {row.stacked} layers under nn.scan or nn.vmap. "
          "Unroll the stack, or name what to leave out in exclude."
        )


def _check_exclusions(given: Any) -> tuple[Exclusion, ...]:
  known = isinstance(given, tuple | list) and all(isinstance(x, Exclusion) for x in given)
  if not known:
    raise TypeError(
      "Fp8Config: default_exclude must be a tuple of Exclusion; got "
      f"default_exclude={fields.show(given)}. Pass () for none, and patterns as exclude."
    )
  return tuple(given)


def _check_pairs(given: Any) -> tuple[tuple[Pattern, Recipe], ...]:
  pairs = tuple(given.items()) if isinstance(given, Mapping) else given
  is_pair = lambda pair: isinstance(pair, tuple) and len(pair) == 2
  if not isinstance(pairs, tuple | list) or not all(map(is_pair, pairs)):
    raise TypeError(
      f"Fp8Config: recipes must pair patterns with recipes; got recipes={fields.show(given)}. "
      "Write recipes={'*/down': Float8CurrentScaling()}."
    )
  for _, recipe in pairs:
    check.recipe("Fp8Config", recipe)
  patterns = check_patterns("recipes", [pattern for pattern, _ in pairs])
  return tuple((pattern, recipe) for pattern, (_, recipe) in zip(patterns, pairs, strict=True))
