"""``fp8_linear_layers``: runs the linear layers of an unmodified Linen model in FP8.

A layer's FP8 state must follow its kernel through every lifted transformation in the model:
stacked by ``nn.scan``, shared by ``nn.vmap``, or broadcast. So the state is stored among the
parameters while the model runs. ``init``, ``apply`` and ``bind`` move it from and to the collection
``_overwrite_with_gradient``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax

from flax_fp8 import fields
from flax_fp8.linen import state
from flax_fp8.linen.arguments import require_module
from flax_fp8.linen.convert.config import Decision, Fp8Config
from flax_fp8.linen.convert.patterns import Layer, at
from flax_fp8.linen.convert.walk import Walk
from flax_fp8.linen.converted import Run, make_converted, original, take_in
from flax_fp8.linen.intercept import intercept_methods
from flax_fp8.linen.state import GUARD, OVERWRITE_WITH_GRADIENT, state_guard
from flax_fp8.recipes.base import Recipe


def fp8_linear_layers(
  module: nn.Module, config: Fp8Config | None = None, *init_args: Any, **init_kwargs: Any
) -> nn.Module:
  """Converts the linear layers of an unmodified Linen model to FP8.

  The converted module is an instance of a subclass of the model's class. It has the same fields,
  methods and ``params``. These contractions run in FP8 if ``config`` selects them:

  - linear layers, including those inside attention and recurrent cells;
  - contractions of the modules named in ``Fp8Config.functions``.

  The FP8 state has the same paths as in a model edited by hand: ``Dense_0/Fp8DotGeneral_0``. A
  module that the model runs by a nested ``apply`` or ``bind`` stays in high precision unless
  ``Fp8Config.functions`` names it. Hugging Face models run tied output heads in this way.

  Args:
    module: the outermost Linen module, unbound.
    config: selects the layers and recipes. ``Fp8Config()`` if None.
    *init_args: the arguments of ``module.init`` after the PRNG key; arrays or ShapeDtypeStructs. If
      they are given, every pattern is checked immediately, and ``skip_first`` and ``skip_last``
      work in every method. Otherwise patterns are checked by ``init`` and ``apply``, and the skips
      work in ``__call__`` only.
    **init_kwargs: the keyword arguments of ``module.init``.

  Returns:
    The converted module. Its ``init`` returns the same ``params`` as the model, bit for bit, and
    the FP8 state in ``_overwrite_with_gradient``. For existing parameters, add the state with
    ``upgrade_variables``. A wrapper that passes only parameters may store the state among them:
    ``{"params": {**params, "_overwrite_with_gradient": state}}``.

  Raises:
    TypeError: ``module`` is not a Linen module, or ``config`` is not an ``Fp8Config``.
    ValueError: ``module`` is bound, a pattern matches no layer, or no layer is selected. The
      converted module raises it if it runs inside another module, or if ``Fp8DotGeneral`` does not
      support the arguments of a converted call.

  Numerics:
    As ``Fp8DotGeneral`` and ``Fp8Einsum``.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> model = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=32)
    >>> converted = fp8.fp8_linear_layers(model)
    >>> variables = converted.init(jax.random.key(0), jnp.ones((1, 4, 16)))
    >>> sorted(variables["_overwrite_with_gradient"])
    ['key', 'out', 'query', 'value']

  References:
    torchao.float8.convert_to_float8_training; flax.linen.intercept_methods.
  """
  _check_arguments(module, config)
  conversion = Fp8Conversion(config or Fp8Config())
  plain = original(module)
  if init_args or init_kwargs:
    report = conversion.config.report(plain, *init_args, **init_kwargs)
    conversion.require_some(Decision(row.recipe, row.rule) for row in report.rows)
    order = tuple(row.layer.path for row in report.rows)
    conversion = dataclasses.replace(conversion, order=order)
  return make_converted(plain, conversion)


def _check_arguments(module: Any, config: Any) -> None:
  require_module("fp8_linear_layers", module)
  if module.scope is not None:
    raise ValueError(
      f"fp8_linear_layers: module must be unbound; got {type(module).__name__} bound at "
      f"{'/'.join(module.path)!r}. Convert the outermost module before init and apply."
    )
  if config is not None and not isinstance(config, Fp8Config):
    raise TypeError(
      f"fp8_linear_layers: config must be an Fp8Config; got config={fields.show(config)}. To set "
      "only a recipe, pass Fp8Config(recipe=...)."
    )


@dataclasses.dataclass(frozen=True)
class Fp8Conversion:
  """Runs a model with its linear layers in FP8.

  Attributes:
    config: selects the layers and recipes.
    order: paths of all layers in the order of their calls, if known in advance.
  """

  config: Fp8Config
  order: tuple[str, ...] | None = None

  def enter(self, variables: Any) -> dict[str, Any]:
    """Moves the state into the parameters."""
    if not isinstance(variables, Mapping):
      raise ValueError(
        f"fp8_linear_layers: variables must be a variables dict; got {type(variables)}. Pass "
        "{'params': params, ...}."
      )
    given = take_in(variables, OVERWRITE_WITH_GRADIENT)
    if OVERWRITE_WITH_GRADIENT in given:
      given["params"] = _merge(given.get("params", {}), given[OVERWRITE_WITH_GRADIENT], ())
    return given

  def leave(self, variables: Any) -> dict[str, Any]:
    """Moves the state out of the parameters."""
    given = dict(variables)
    params, own = _split(given.get("params", {}))
    if "params" in given:
      given["params"] = params
    if own:
      given[OVERWRITE_WITH_GRADIENT] = own
    return given

  def initialized(self, variables: Any) -> dict[str, Any]:
    """Moves the state out of the parameters, as ``leave`` does."""
    return self.leave(variables)

  @contextlib.contextmanager
  def during(self, run: Run) -> Generator[None]:
    """Runs the selected layers in FP8."""
    visitor = _Decisions(self.config, self._order(run))
    model, emulate = type(run.module).__name__, self.config.emulate
    walk = Walk(visitor, self.config.functions, model=model, emulate=emulate)
    with intercept_methods(walk.intercept), state.among_params():
      yield
    seen = visitor.seen
    if self.order is None and run.method is None:
      self._check(run, [layer for layer, _ in seen.values()])
      if not has_state(run.variables):
        decisions = [decision for _, decision in seen.values()]
        if all(decision.recipe is None for decision in decisions):
          rows = self.config.report(run.module, *run.args, **run.kwargs).rows
          decisions = [Decision(row.recipe, row.rule) for row in rows]
        self.require_some(decisions)

  def _check(self, run: Run, layers: list[Layer]) -> None:
    """Raises ValueError if a pattern cannot match. A run may execute only part of the model."""
    variables, model = run.variables, type(run.module).__name__
    if variables is None:
      self.config.check_matches(layers, complete=True)
      return
    leaves = flax.traverse_util.flatten_dict(variables.get("params", {}))
    named = lambda paths: [
      at("/".join(path), model) for path in paths if OVERWRITE_WITH_GRADIENT not in path
    ]
    known, above = {path[:-1] for path in leaves}, {p[:n] for p in leaves for n in range(len(p))}
    self.config.check_matches([*layers, *named(known)], complete=False, modules=named(above))

  def require_some(self, decisions: Iterable[Decision]) -> None:
    """Raises ValueError if no layer is converted."""
    decisions = tuple(decisions)
    if not decisions:
      raise ValueError(
        "fp8_linear_layers: at least one layer must become FP8; got a model without linear layers. "
        "Convert the model that contains them, or name modules that call contractions in "
        "Fp8Config.functions."
      )
    if all(decision.recipe is None for decision in decisions):
      counts = Counter(decision.rule for decision in decisions)
      raise ValueError(
        f"fp8_linear_layers: at least one layer must become FP8; got none of {len(decisions)}, by "
        f"the rules {dict(counts)}. Print Fp8Config.report(module, *init_args) to see how to "
        "include each module, and change targets, exclude, default_exclude, functions, "
        "multiple_of or min_kernel_size."
      )

  def _order(self, run: Run) -> tuple[str, ...] | None:
    """Returns the order of the layers, or None if no rule needs it."""
    if self.order is not None or not self.config.needs_order:
      return self.order
    if run.method is not None:
      raise ValueError(
        "fp8_linear_layers: skip_first and skip_last need the layers of the whole model; got the "
        f"method {run.method!r}, which may call only some of them. Pass the arguments of init to "
        "fp8_linear_layers(module, config, *init_args)."
      )
    report = self.config.report(run.module, *run.args, **run.kwargs)
    return tuple(row.layer.path for row in report.rows)


class _Decisions:
  """The visitor of a converted run: decides by the configuration and records the decisions."""

  def __init__(self, config: Fp8Config, order: tuple[str, ...] | None) -> None:
    self.config, self.order = config, order
    self.seen: dict[str, tuple[Layer, Decision]] = {}

  def decide(self, layer: Layer, root: Any) -> Recipe | None:
    del root
    decision = self.config.decide(layer, self.order)
    self.seen[layer.path] = layer, decision
    return decision.recipe

  def asked(self, layer: Layer, kernel: jax.Array) -> None:
    del layer, kernel

  def unasked(self, module: str, kernel: jax.Array) -> None:
    del module, kernel

  def leave(self, module: nn.Module) -> None:
    del module


def has_state(variables: Any) -> bool:
  """Returns whether the parameters of a running model hold FP8 state."""
  params = (variables or {}).get("params", {})
  return any(OVERWRITE_WITH_GRADIENT in path for path in flax.traverse_util.flatten_dict(params))


def _merge(params: Any, state: Any, path: tuple[str, ...]) -> Any:
  """Stores each module's state beside its parameters, under ``_overwrite_with_gradient``."""
  if not isinstance(params, Mapping):
    raise ValueError(
      f"fp8_linear_layers: FP8 state and params must belong to the same model; got state for "
      f"{'/'.join(path)!r}, which is an array in params. Create state for these parameters with "
      "upgrade_variables(converted, {'params': params}, *init_args)."
    )
  below = {key: value for key, value in state.items() if isinstance(value, Mapping)}
  leaves = {key: value for key, value in state.items() if key not in below}
  merged = {key: _merge(params.get(key, {}), value, (*path, key)) for key, value in below.items()}
  own = {OVERWRITE_WITH_GRADIENT: leaves | state_guard(leaves)} if leaves else {}
  return {**params, **merged, **own}


def _split(params: Any) -> tuple[Any, Any]:
  """Splits parameters and state; the inverse of ``_merge``. Removes modules with state only."""
  if not isinstance(params, Mapping):
    return params, {}
  rest: dict[str, Any] = {}
  found = dict(params.get(OVERWRITE_WITH_GRADIENT, {}))
  found.pop(GUARD, None)
  for key in params.keys() - {OVERWRITE_WITH_GRADIENT}:
    below, found_below = _split(params[key])
    if found_below:
      found[key] = found_below
    if not (found_below and isinstance(below, Mapping) and len(below) == 0):
      rest[key] = below
  return rest, found
