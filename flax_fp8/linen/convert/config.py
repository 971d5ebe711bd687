"""Configuration of a conversion: recipes, patterns, and the rules that decide for each layer."""

from __future__ import annotations

import ast
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
  close_matches,
  first_match,
  matches,
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
  """A group of layers that stay in high precision by default.

  Attributes:
    reason: the kind of layer, shown in the report.
    names: globs that match the last name of the path, in lower case.
    narrowing: if not 0, excludes only layers with ``features * narrowing <= contracted``.
    but: globs that match last names to keep out of this group.
  """

  reason: str
  names: tuple[str, ...]
  narrowing: int = 0
  but: tuple[str, ...] = ()

  def applies(self, layer: Layer) -> bool:
    """Returns whether a layer is in this group."""
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
  # A router's gate is narrow. The gate of SwiGLU is wide and is converted.
  Exclusion(reason="router", names=("gate", "*_gate", "gating*"), narrowing=8),
)


@dataclasses.dataclass(frozen=True)
class Decision:
  """The decision about one layer.

  Attributes:
    recipe: the layer's recipe; None for high precision.
    rule: the rule that decided.
  """

  recipe: Recipe | None
  rule: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8Config:
  """Selects the layers that ``fp8_linear_layers`` converts, and their recipes.

  A layer is an ``nn.Dense``, ``nn.DenseGeneral`` or ``nn.Einsum``, or an instance of a subclass.
  A module that contracts with its own parameter ``kernel`` is a layer too.

  A pattern is one of these:

  - a glob over the whole module path, such as ``"*/mlp/*"``; ``*`` also matches slashes;
  - a compiled regular expression, searched in the path;
  - a function that takes a ``Layer`` and returns a bool.

  A path may start with the model's class, as in the report of ``assert_fp8``: ``"Net/mlp/up"``
  means ``"mlp/up"``.

  The first rule that applies to a layer decides, in this order:

  1. properties of the layer, such as its own ``dot_general`` or a ``precision``;
  2. ``targets``;
  3. ``exclude``, then ``default_exclude``;
  4. ``skip_first`` and ``skip_last``;
  5. ``multiple_of`` and ``min_kernel_size``.

  Unmatched patterns raise an error that lists close matches. A configuration that selects no layer
  raises an error that lists the rules.

  Attributes:
    recipe: the default recipe.
    recipes: recipes for some of the layers, as a mapping from patterns to recipes or as pairs. The
      first pattern that matches is used. A recipe's ``high_precision`` sets the precision of each
      GEMM.
    targets: patterns of the layers to convert.
    exclude: patterns of the layers to keep in high precision.
    default_exclude: layers that stay in high precision by default: embeddings, norms, routers and
      output heads. Pass ``()`` to convert them.
    functions: patterns of modules with contractions in their own methods. All of these contractions
      are converted: ``jnp.einsum``, ``x @ w``, ``lax.dot_general``. The right operand is the
      kernel. The state is numbered in the order of the calls, like unnamed submodules in Linen.
      Every run must make the same calls.
    skip_first: number of linear layers to keep in high precision, from the first call on.
    skip_last: number of linear layers to keep in high precision at the end.
    multiple_of: the contracted size and the features must be multiples of this, as FP8 kernels
      require.
    min_kernel_size: minimum number of elements in a kernel.
    emulate: lets a device without the recipe's FP8 formats multiply in a wider type.

  Raises:
    TypeError: a field has the wrong type, or a pattern is not a glob, regular expression or
      function.
    ValueError: a count is negative, ``multiple_of`` is below 1, or ``targets`` is empty.

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
        "Fp8Config: targets must hold at least one pattern; got targets=(). Omit targets to "
        "convert all layers, or do not convert the model."
      )
    object.__setattr__(self, "default_exclude", _check_exclusions(self.default_exclude))
    default = "Omit it to use the default."
    for name in ("skip_first", "skip_last", "multiple_of", "min_kernel_size"):
      value, least = getattr(self, name), 1 if name == "multiple_of" else 0
      value = fields.integer("Fp8Config", name, value, default, least=least)
      object.__setattr__(self, name, value)
    object.__setattr__(self, "emulate", fields.flag("Fp8Config", "emulate", self.emulate))

  def __repr__(self) -> str:
    """Shows the fields that differ from the defaults."""
    shown = (
      f"{field.name}={value!r}"
      for field in dataclasses.fields(self)
      if (value := getattr(self, field.name)) != field.default
    )
    return f"Fp8Config({', '.join(shown)})"

  def report(self, module: nn.Module, *init_args: Any, **init_kwargs: Any) -> ConversionReport:
    """Reports which layers ``fp8_linear_layers`` would convert, without running the model.

    The model is traced on shapes, so the report needs no memory or time on the device.

    Args:
      module: the unmodified model.
      *init_args: the arguments of ``module.init`` after the PRNG key; arrays or ShapeDtypeStructs.
      **init_kwargs: the keyword arguments of ``module.init``.

    Returns:
      A ``ConversionReport`` with one row for each layer. Pass it to ``print``.

    Raises:
      ValueError: a pattern matches no layer, or ``skip_first`` or ``skip_last`` would select a
        layer that ``nn.scan`` or ``nn.vmap`` stacks.
      TypeError: ``module`` is not a Linen module.

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
    callers = [path for row in seen for path in _callers(row.layer.refusal)]
    self.check_matches([row.layer for row in contractions], complete=True, callers=callers)
    order = tuple(row.layer.path for row in contractions)
    self._check_skips(contractions, order)
    rows = [
      dataclasses.replace(row, rule=decision.rule, recipe=decision.recipe)
      for row in seen
      for decision in (self.decide(row.layer, order),)
    ]
    return ConversionReport(tuple(rows))

  def decide(self, layer: Layer, order: tuple[str, ...] | None) -> Decision:
    """Decides whether a layer is converted.

    Args:
      layer: the layer.
      order: paths of all layers in the order of their first calls. Only ``skip_first`` and
        ``skip_last`` need it.

    Returns:
      The recipe, or None for high precision, with the rule that decided.
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
      return "matches no target"
    if (pattern := first_match(self.exclude, layer)) is not None:
      return f"exclude {show(pattern)}"
    for exclusion in self.default_exclude:
      if exclusion.applies(layer):
        return f"{exclusion.reason}, by default"
    if order and layer.path in order[: self.skip_first]:
      return f"skip_first={self.skip_first}"
    if order and layer.path in order[max(0, len(order) - self.skip_last) :]:
      return f"skip_last={self.skip_last}"
    return self._refuse_size(layer)

  def _refuse_size(self, layer: Layer) -> str:
    for name, size in (("contracted", layer.contracted), ("features", layer.features)):
      if size % self.multiple_of:
        return f"{name} {size} not a multiple of {self.multiple_of}"
    if layer.kernel_size < self.min_kernel_size:
      return f"kernel size {layer.kernel_size} below {self.min_kernel_size}"
    return ""

  @property
  def needs_order(self) -> bool:
    """Whether any rule depends on the order of the layers."""
    return bool(self.skip_first or self.skip_last)

  def check_matches(
    self,
    layers: Iterable[Layer],
    *,
    complete: bool,
    modules: Iterable[Layer] = (),
    callers: Iterable[str] = (),
  ) -> None:
    """Raises ValueError if a pattern matches no layer.

    Args:
      layers: the model's layers.
      complete: whether ``layers`` has all layers with all their attributes. If False, patterns that
        are functions are not checked.
      modules: other modules that ``functions`` may name.
      callers: paths of modules that call contractions and that ``functions`` does not name. The
        error for ``functions`` lists them.
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
            f"matches none of {len(set(paths))}. Close matches: {close_matches(pattern, paths)}. "
            "Correct or remove the pattern."
          )
    plain = ("Dense", "DenseGeneral", "Einsum")
    own = [layer.module for layer in layers if layer.is_function or layer.kind not in plain]
    # A layer that this run did not execute has no kind. It may be a linear layer.
    callers = [*callers, *(layer.path for layer in own if layer.kind)]
    advice = "Fp8Config.report(module, *init_args) lists modules with such calls."
    own += modules
    for pattern in self.functions:
      known = complete or isinstance(pattern, (str, re.Pattern))
      if known and not any(matches(pattern, layer) for layer in own):
        if callers:
          advice = f"Modules with such calls: {close_matches(pattern, callers)}."
        raise ValueError(
          "Fp8Config: every pattern in functions must match a module that itself calls a "
          f"contraction, such as jnp.einsum or x @ w; got {show(pattern)}, which matches none. "
          f"{advice} Name the module that makes the call, not its parent; do not name linear "
          "layers."
        )

  def _check_skips(self, rows: Iterable[Row], order: tuple[str, ...]) -> None:
    skipped = {*order[: self.skip_first], *order[max(0, len(order) - self.skip_last) :]}
    for row in rows:
      if self.needs_order and row.stacked > 1 and row.layer.path in skipped:
        raise ValueError(
          "Fp8Config: skip_first and skip_last cannot select layers stacked by nn.scan or nn.vmap; "
          f"got skip_first={self.skip_first}, skip_last={self.skip_last}, which would skip "
          f"{row.layer.path!r}, one program for {row.stacked} layers. Unroll the stack, or use "
          "exclude instead."
        )


def _callers(refusal: str) -> tuple[str, ...]:
  """Returns the paths in the advice ``functions=...`` of a refusal of the dry run."""
  _, _, advice = refusal.partition("functions=")
  found = ast.literal_eval(advice) if advice else ()
  return (found,) if isinstance(found, str) else found


def _check_exclusions(given: Any) -> tuple[Exclusion, ...]:
  known = isinstance(given, tuple | list) and all(isinstance(x, Exclusion) for x in given)
  if not known:
    raise TypeError(
      "Fp8Config: default_exclude must be a tuple of Exclusion; got "
      f"default_exclude={fields.show(given)}. Pass () for no exclusions, and patterns as exclude."
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
