"""Wrong calls, as data: models, training loops, diagnostics and tools. See ``wrong_calls``."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import flax_fp8 as fp8
from flax_fp8 import fp8_ops
from flax_fp8.fields import show
from tests.wrong_calls import DIMS, W, Wrong, X, fields, init

OWG = fp8.OVERWRITE_WITH_GRADIENT
DELAYED = fp8.DelayedScaling()
LIKE = jax.ShapeDtypeStruct((4, 16), jnp.float32)
DENSE = nn.Dense(16, dot_general_cls=fp8.Fp8DotGeneral)
TAKES_NO_FLOAT32 = "variables must be a variables dict with the collection 'params'; got"


class Own(nn.Module):
  """Contracts by itself, with a parameter of an unusual name."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return x @ self.param("w", nn.initializers.ones, (16, 16))


class Model(nn.Module):
  """A linear layer, and a module that contracts by itself."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return Own(name="own")(nn.Dense(16, name="up")(x))


class Plain(nn.Module):
  """Contracts nothing."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return nn.LayerNorm(name="norm")(x)


class Branches(nn.Module):
  """Two branches by ``fp8.cond``, whose arguments are under test."""

  arguments: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> Any:
    return fp8.cond(*self.arguments(nn.Dense(16), x))


@functools.cache
def zeros_of(module: nn.Module, x: Any = LIKE) -> Any:
  """Makes variables of a module without running it."""
  made = jax.eval_shape(module.init, jax.eval_shape(lambda: jax.random.key(0)), x)
  return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), made)


def loss(v: Any, *_: Any) -> jax.Array:
  return jnp.sum(v["params"]["kernel"])


@functools.cache
def train_state(params: str = "all", **options: Any) -> Any:
  given = zeros_of(DENSE)
  params = given if params == "all" else given["params"]
  return fp8.TrainState.create(apply_fn=loss, params=params, tx=optax.sgd(0.1), **options)


def pair() -> Any:
  """Returns the result of ``value_and_grad`` without unpacking it."""
  return jnp.float32(1), zeros_of(DENSE)


def _configs() -> Iterator[Wrong]:
  name, config = "Fp8Config", fp8.Fp8Config
  recipes = (fp8.DelayedScaling, "delayed", None, [DELAYED], DELAYED.dot_general_cls)
  yield from fields(name, config, TypeError, "must be a recipe, such as", recipe=recipes)
  kinds = (b"up", 5, None, {"up": 1}, nn.Dense, DELAYED, re.compile(b"up"), [None], [b"up"], {5})
  patterns = dict.fromkeys(("targets", "exclude", "functions"), kinds)
  for field, values in patterns.items():
    for value in values:
      words = f"{field} must be patterns|a pattern must be a glob.* in {field}. Replace"
      call = functools.partial(config, **{field: value})
      yield Wrong(name, f"{field}={show(value):.20}", call, TypeError, words)
  empty = {"targets": ([], (), set())}
  yield from fields(name, config, ValueError, "must hold at least one pattern; got", **empty)
  pairs = ("up", 5, None, [("up",)], {"up": fp8.DelayedScaling}, {5: DELAYED}, DELAYED, [DELAYED])
  for value in pairs:
    words = "recipes must pair|recipe must be a recipe|a pattern must be"
    call = functools.partial(config, recipes=value)
    yield Wrong(name, f"recipes={show(value):.20}", call, TypeError, words)
  counts = ("skip_first", "skip_last", "multiple_of", "min_kernel_size")
  integer = "must be an integer of at least"
  yield from fields(name, config, TypeError, integer, **dict.fromkeys(counts, ("1", None, True)))
  yield from fields(name, config, ValueError, integer, **dict.fromkeys(counts, (-1, 1.0)))
  yield from fields(name, config, TypeError, "must be True or False", emulate=("no", 1, None))
  exclusions = (None, "head", ["head"], True)
  yield from fields(name, config, TypeError, "must be a tuple of Ex", default_exclude=exclusions)
  report = lambda **field: config(**field).report(Model(), LIKE)
  unmatched = ("upp", "*/upp", re.compile("Up"), ("up", "down"))
  for field in ("targets", "exclude"):
    words = f"every pattern must match a layer; got .* in {field}, which matches none of 1"
    for value in unmatched:
      call = functools.partial(report, **{field: value})
      yield Wrong(name, f"{field} unmatched {show(value)}", call, ValueError, words)
  never = lambda: report(targets=lambda layer: False)
  yield Wrong(name, "function unmatched", never, ValueError, "every pattern must match a layer")
  words = "every pattern must match a layer; got 'upp' in recipes"
  typo = lambda: report(recipes={"upp": DELAYED})
  yield Wrong(name, "recipes unmatched", typo, ValueError, words)
  words = "every pattern in functions must match a module that itself calls .*; got 'owm'"
  for what in ("init", "apply"):
    current = fp8.Float8CurrentScaling()
    model = fp8.fp8_linear_layers(Model(), config(functions="owm", recipe=current))
    apply = lambda m=model: jax.eval_shape(m.apply, zeros_of(Model()), X)
    run = apply if what == "apply" else functools.partial(init, model)
    yield Wrong(name, f"functions typo, {what}", run, ValueError, words)
  right = fp8.fp8_linear_layers(Model(), config(functions="own"))
  typo = fp8.fp8_linear_layers(Model(), config(functions="owm"))
  again = lambda: jax.eval_shape(typo.apply, zeros_of(right), X)
  yield Wrong(name, "functions typo, apply with state", again, ValueError, words)
  for what, module in {"class": Model, "function": Model().apply, "None": None}.items():
    call = lambda m=module: config().report(m, LIKE)
    words = "module must be an instance of a Linen module; got"
    yield Wrong("Fp8Config.report", what, call, TypeError, words)


def _models() -> Iterator[Wrong]:
  name, convert = "fp8_linear_layers", fp8.fp8_linear_layers
  words = "module must be an instance of a Linen module; got"
  yield from fields(name, convert, TypeError, words[7:], module=(Model, loss, None, "Dense", X))
  for value in (DELAYED, "up", {"targets": "up"}, fp8.Fp8Config, LIKE):
    call = functools.partial(convert, Model(), value)
    words = r"config must be an Fp8Config; got config="
    yield Wrong(name, f"config={show(value):.20}", call, TypeError, words)
  bound = lambda: convert(Model().bind({"params": {}}))
  yield Wrong(name, "bound", bound, ValueError, "module must be unbound; got Model bound")
  for what, call in {
    "report": lambda: convert(Plain(), None, LIKE),
    "init": lambda: init(convert(Plain())),
  }.items():
    words = "at least one layer must become FP8; got a model without linear layers"
    yield Wrong(name, f"no linear layer, {what}", call, ValueError, words)
  none = lambda: convert(Model(), fp8.Fp8Config(exclude="up"), LIKE)
  yield Wrong(name, "all excluded", none, ValueError, "got none of 2, by the rules")
  name, freeze = "freeze_for_inference", fp8.freeze_for_inference
  for module in (nn.Dense, DENSE.apply, None):
    call = lambda m=module: freeze(m, zeros_of(DENSE), LIKE)
    words = "module must be an instance of a Linen module; got"
    yield Wrong(name, f"module={show(module):.12}", call, TypeError, words)
  nothing = lambda: freeze(Model(), zeros_of(Model()), LIKE)
  words = "the model must have at least one FP8 contraction"
  yield Wrong(name, "no FP8", nothing, ValueError, words)
  bare = lambda: freeze(DENSE, {"params": zeros_of(DENSE)["params"]}, LIKE)
  words = "needs the collection '_overwrite_with_gradient'"
  yield Wrong("Fp8DotGeneral", "freeze without state", bare, ValueError, words)
  of = {
    name: lambda v: freeze(DENSE, v, LIKE),
    "upgrade_variables": lambda v: fp8.upgrade_variables(DENSE, v, LIKE),
    "downgrade_variables": fp8.downgrade_variables,
    "from_flax_fp8_ops": fp8.from_flax_fp8_ops,
    "add_metrics": lambda v: fp8.add_metrics(DENSE, v, LIKE),
    "drop_metrics": fp8.drop_metrics,
    "calibrate": lambda v: fp8.calibrate(DENSE, v, [X], progress=False),
  }
  for name, call in of.items():
    for value in (None, {"kernel": W}, [W], "variables", train_state(), pair(), {}):
      wrong = functools.partial(call, value)
      yield Wrong(name, f"variables={show(value):.20}", wrong, ValueError, TAKES_NO_FLOAT32)
  for name in ("upgrade_variables", "add_metrics", "calibrate"):
    for module in (nn.Dense, None, DENSE.apply):
      args = ([X],) if name == "calibrate" else (LIKE,)
      call = lambda n=name, m=module, a=args: getattr(fp8, n)(m, zeros_of(DENSE), *a)
      words = "module must be an instance of a Linen module; got"
      yield Wrong(name, f"module={show(module):.12}", call, TypeError, words)
  name = "upgrade_variables"
  other = lambda: fp8.upgrade_variables(DENSE, zeros_of(Model()), LIKE)
  words = "variables must have the parameters of the module; got missing"
  yield Wrong(name, "another model's", other, ValueError, words)
  none = lambda: fp8.add_metrics(Plain(), zeros_of(Plain()), LIKE)
  yield Wrong("add_metrics", "no FP8", none, ValueError, "the model must have FP8 contractions")
  name, of_flax = "from_flax_fp8_ops", fp8.from_flax_fp8_ops
  none = lambda: of_flax(zeros_of(Model()))
  yield Wrong(name, "no state", none, ValueError, "must hold the collection")
  for leaves in ({"input_scale": jnp.ones(1)}, {"scale": jnp.ones((2, 2))}):
    call = lambda s=leaves: of_flax({"params": {}, OWG: {"Fp8DirectDotGeneralOp_0": s}})
    words = "state must be scale and amax_history of input, kernel and output_grad"
    yield Wrong(name, f"state {[*leaves]}", call, ValueError, words)


def _gradients() -> Iterator[Wrong]:
  for name in ("value_and_grad", "grad"):
    take = getattr(fp8, name)
    for value in (None, zeros_of(DENSE), 3.0, "loss"):
      call = functools.partial(take, value)
      yield Wrong(
        name, f"fun={show(value):.20}", call, TypeError, "fun must be a function; got fun="
      )
    for value in ("0", 1.0, None, True, (0, "1"), [0.0], jnp.ones(2)):
      call = functools.partial(take, loss, value)
      words = "argnums must be an integer or a sequence of integers; got argnums="
      yield Wrong(name, f"argnums={show(value)}", call, TypeError, words)
    for value in ((), (0, 0), [1, 1]):
      call = functools.partial(take, loss, value)
      words = "argnums must name each argument once, and at least one; got argnums="
      yield Wrong(name, f"argnums={show(value)}", call, ValueError, words)
    for value in (3, -4, (0, 5)):
      call = lambda t=take, v=value: t(loss, v)(zeros_of(DENSE), X, X)
      words = "argnums must be positions of the 3 positional arguments; got argnums="
      yield Wrong(name, f"argnums out of range {value}", call, ValueError, words)
    keyword = lambda t=take: t(loss)(v=zeros_of(DENSE))
    words = r"positions of the 0 positional arguments; got argnums=0 and the keywords \['v'\]. Pass"
    yield Wrong(name, "keyword", keyword, ValueError, words)
    yield from fields(
      name, functools.partial(take, loss), TypeError, "must be True or False", has_aux=("yes", 1)
    )
    of_strings = lambda t=take: t(loss)({"params": "kernel"})
    words = "arguments to differentiate must be real or complex arrays; got"
    yield Wrong(name, "strings", of_strings, TypeError, words)
    integers = lambda t=take: t(lambda x: x)(np.ones((4, 16), np.int32))
    yield Wrong(name, "integers", integers, TypeError, "must be real or complex.*int32")
    for what, wrong in {
      "vector": lambda v: v["params"]["kernel"],
      "pair": lambda v: (loss(v), v["params"]),
      "none": lambda v: None,
      "integer": lambda v: jnp.int32(1),
      "dict": lambda v: {"loss": loss(v)},
      "complex": lambda v: 1j * loss(v),
    }.items():
      call = lambda t=take, w=wrong: t(w)(zeros_of(DENSE))
      words = r"fun must return a real scalar, or \(scalar, aux\) with has_aux=True; got"
      yield Wrong(name, f"returns {what}", call, TypeError, words)
    for what, wrong in {"scalar": loss, "three": lambda v: (loss(v), 1, 2)}.items():
      call = lambda t=take, w=wrong: t(w, has_aux=True)(zeros_of(DENSE))
      words = r"fun must return a real scalar, or \(scalar, aux\) with has_aux=True; got"
      yield Wrong(name, f"has_aux returns {what}", call, TypeError, words)
  norm = lambda: fp8.value_and_grad(optax.tree.norm)(zeros_of(DENSE))
  words = "FP8 state is fp32_max_grad here and takes no arithmetic; got"
  yield Wrong("value_and_grad", "norm of all", norm, TypeError, words)
  for dtype in (jnp.bfloat16, jnp.float16, jnp.int32):
    cast = lambda d=dtype: fp8.as_max_grad({OWG: {"scale": jnp.ones(1, d)}})
    yield Wrong(
      "as_max_grad", f"{dtype.__name__}", cast, TypeError, "FP8 state must be float32; got"
    )
  for value in ("scale", object()):
    cast = lambda v=value: fp8.as_max_grad({OWG: {"scale": v}})
    yield Wrong("as_max_grad", show(value)[:7], cast, TypeError, "FP8 state must be float32; got")


def _states() -> Iterator[Wrong]:
  unpack = "got the pair that value_and_grad returns. Unpack it: loss, grads = "
  for what, params in {"variables": "all", "bare parameters": "params"}.items():
    name = "TrainState.apply_gradients"
    apply = lambda g, p=params: train_state(p).apply_gradients(grads=g)
    yield Wrong(name, f"pair, {what}", lambda a=apply: a(pair()), ValueError, unpack)
    for value in (None, [W], "grads", X, {}):
      call = functools.partial(apply, value)
      words = "grads must (hold|have the structure of)"
      yield Wrong(name, f"{what}, grads={show(value):.16}", call, ValueError, words)
  given = zeros_of(DENSE)
  for what, value in {
    "params alone": {"params": given["params"]},
    "state alone": {OWG: given[OWG]},
    "a kernel alone": {**given, "params": {"kernel": W}},
    "another shape": {**given, "params": {**given["params"], "kernel": W[:8]}},
    "state of another": {**given, OWG: {}},
    "the inner tree": given["params"],
  }.items():
    call = lambda v=value: train_state().apply_gradients(grads=v)
    words = "grads must (hold|have)|updates must have"
    name = "apply_updates" if what == "another shape" else "TrainState.apply_gradients"
    yield Wrong(name, f"grads: {what}", call, ValueError, words)
  aux = lambda: train_state().apply_gradients(grads=((jnp.float32(1), {"x": X}), given))
  yield Wrong("TrainState.apply_gradients", "pair with aux", aux, ValueError, unpack)
  name, create = "TrainState.create", fp8.TrainState.create
  make = lambda **f: create(**{"apply_fn": loss, "params": given, "tx": optax.sgd(0.1), **f})
  tx = (None, "adam", optax.sgd, 0.1)
  yield from fields(name, make, TypeError, "must be an optax.GradientTransformation; got", tx=tx)
  yield from fields(name, make, TypeError, "must be a function; got", apply_fn=("f", 3))
  yield from fields(name, make, TypeError, "must be True or False; got", skip_nonfinite=("no", 1))
  params = (None, pair(), "params")
  words = "must be parameters or a variables dict|gradients must have the structure"
  for value in params:
    call = functools.partial(make, params=value)
    yield Wrong(name, f"params={show(value):.20}", call, ValueError, words)
  split = fp8.partition_for_grad_overwrite
  yield Wrong("partition_for_grad_overwrite", "pair", lambda: split(pair()), ValueError, unpack)
  name, update = "apply_updates", fp8.apply_updates
  state, rest = split(given)
  yield Wrong(name, "pair", lambda: update(given, rest, pair()), ValueError, unpack)
  pairs = lambda: update(given, pair(), state)
  yield Wrong(name, "pair as updates", pairs, ValueError, unpack)
  for what, overwrite in {
    "None": None, "whole": given, "empty": {}, "leaf": {OWG: {}}, "string": "state",
    "shape": jax.tree.map(lambda x: x[:, None], state),
  }.items():  # fmt: skip
    call = lambda o=overwrite: update(given, rest, o)
    words = "overwrite must have the FP8 state of the variables; got"
    yield Wrong(name, f"overwrite {what}", call, ValueError, words)
  for what, updates in {
    "None": None, "inner": given["params"], "list": [W], "array": X, "unknown": {"parms": {}},
    "half": {"params": {"kernel": None}}, "shape": {"params": {"kernel": W[:8], "bias": W[0]}},
    "exchanged": {"params": W},
  }.items():  # fmt: skip
    call = lambda u=updates: update(given, u, state)
    words = "updates must (name|have the structure and shapes of)"
    yield Wrong(name, f"updates {what}", call, ValueError, words)
  scale = fp8.DynamicScale
  name = "DynamicScale"
  number = "must be a number above 0; got"
  numbers = ("growth_factor", "backoff_factor")
  yield from fields(name, scale, TypeError, number, **dict.fromkeys(numbers, ("2", True, [2.0])))
  low = (0.0, -1, float("nan"), float("inf"))
  yield from fields(name, scale, ValueError, number, **dict.fromkeys(numbers, low))
  least = "must be a number of at least 0, or None; got"
  yield from fields(name, scale, TypeError, least, minimum_scale=("2", True, [2.0]))
  yield from fields(name, scale, ValueError, least, minimum_scale=low[1:])
  yield from fields(name, scale, TypeError, "must be an int", growth_interval=("1", None, True))
  yield from fields(name, scale, ValueError, "must be an int", growth_interval=(-1, 1.5))
  name, take = "DynamicScale.value_and_grad", fp8.DynamicScale().value_and_grad
  yield from fields(name, take, TypeError, "must be a function; got", fun=(None, 3.0))
  argnums = {"argnums": ("0", None, 1.0)}
  yield from fields(
    name, lambda **f: take(loss, **f), TypeError, "must be an integer or", **argnums
  )
  vector = lambda: take(lambda v: v["params"]["kernel"])(given)
  yield Wrong("DynamicScale", "vector", vector, TypeError, "fun must return a real scalar")
  unscale = lambda: fp8.DynamicScale().unscale(pair())
  yield Wrong("DynamicScale.unscale", "pair", unscale, ValueError, unpack)


def _microbatches() -> Iterator[Wrong]:
  name, given = "accumulate_gradients", zeros_of(DENSE)
  batches = np.ones((2, 4, 16), np.float32)
  run = lambda f=loss, v=given, m=batches, **o: fp8.accumulate_gradients(f, v, m, **o)
  for value in (None, given, batches, "loss"):
    call = functools.partial(run, value)
    words = "loss_fn must be a function; got loss_fn="
    yield Wrong(name, f"loss_fn={show(value):.20}", call, TypeError, words)
  exchanged = lambda: run(v=batches, m=given)
  words = "(microbatches must be|the leaves of microbatches must have one leading axis)"
  yield Wrong(name, "exchanged", exchanged, ValueError, words)
  listed = [X, X]
  words = (
    "microbatches must be arrays stacked along a leading axis, not a list of microbatches; got"
  )
  for what, value in {"list": listed, "tuples": [(X, X), (X, X)], "dicts": [{"x": X}] * 2}.items():
    yield Wrong(name, f"{what}", functools.partial(run, m=value), ValueError, words)
  words = "the leaves of microbatches must have one leading axis in common"
  for what, value in {
    "none": None, "empty": {}, "no list": [], "zero": batches[:0], "scalar": jnp.float32(1),
    "uneven": {"x": batches, "y": X}, "string": "batch", "with a count": {"x": batches, "n": 2},
  }.items():  # fmt: skip
    yield Wrong(name, f"microbatches {what}", functools.partial(run, m=value), ValueError, words)
  choices = ("Mean", "max", None, True)
  words = r"must be one of \('mean', 'sum'\); got"
  yield from fields(name, run, ValueError, words, reduction=choices)
  yield from fields(name, run, TypeError, "must be True or False", has_aux=("yes", 1))
  two = lambda: fp8.accumulate_gradients(loss, given, batches, batches)
  yield Wrong(name, "two arrays", two, TypeError, "has_aux=.*Put all arrays into microbatches")
  for what, wrong in {
    "vector": lambda v, m: m, "pair": lambda v, m: (loss(v), m), "none": lambda v, m: None,
    "integer": lambda v, m: 1, "string": lambda v, m: "loss", "complex": lambda v, m: 1j * loss(v),
  }.items():  # fmt: skip
    words = r"loss_fn must return a real scalar, or \(scalar, aux\) with has_aux=True; got"
    yield Wrong(name, f"returns {what}", functools.partial(run, wrong), TypeError, words)
  aux = functools.partial(run, has_aux=True)
  words = r"loss_fn must return a real scalar, or \(scalar, aux\) with has_aux=True"
  yield Wrong(name, "has_aux without", aux, TypeError, words)
  integers = functools.partial(run, lambda v, m: jnp.sum(v), jnp.ones(4, jnp.int32))
  yield Wrong(name, "integers", integers, TypeError, "must be real or complex")


def _calibration() -> Iterator[Wrong]:
  name, given = "calibrate", zeros_of(DENSE)
  run = lambda b=(X,), **o: fp8.calibrate(DENSE, given, b, progress=False, **o)
  words = "batches must be an iterable of batches; got"
  for value in (X, jnp.ones((4, 16)), "batch", {"x": X}, None, 5, LIKE, b"x"):
    call = functools.partial(run, value)
    yield Wrong(name, f"batches={type(value).__name__}", call, TypeError, words)
  for what, value in {"list": [], "generator": (x for x in ()), "range": range(0)}.items():
    call = functools.partial(run, value)
    yield Wrong(
      name, f"no batches, {what}", call, ValueError, "must have at least one batch; got none"
    )
  rule = r"must be within \(0, 100\]; got"
  yield from fields(name, run, TypeError, rule, percentile=("99", True, [99.0], jnp.ones(1)))
  yield from fields(name, run, ValueError, rule, percentile=(0, 100.5, -1, float("nan")))
  yield from fields(name, run, TypeError, "must be a function; got", loss_fn=(3.0, "loss", X))
  both = functools.partial(run, loss_fn=loss, rngs={"dropout": jax.random.key(0)})
  yield Wrong(name, "rngs beside loss_fn", both, ValueError, "rngs must not be given with loss_fn")
  for what, wrong in {"vector": lambda v, b: b, "none": lambda v, b: None}.items():
    call = functools.partial(run, loss_fn=wrong)
    yield Wrong(name, f"loss_fn returns {what}", call, ValueError, "must return a real scalar; got")
  current = nn.Dense(16, dot_general_cls=fp8.Float8CurrentScaling().dot_general_cls)
  bare = lambda **o: fp8.calibrate(current, zeros_of(current), [X], progress=False, **o)
  call = lambda: bare(percentile=99.0)
  yield Wrong(
    name, "percentile without state", call, ValueError, "percentile needs a model with state"
  )
  call = lambda: bare(loss_fn=loss)
  yield Wrong(
    name, "loss_fn without metrics", call, ValueError, "must have metrics if loss_fn is given"
  )


def _diagnostics() -> Iterator[Wrong]:
  name, stats, given = "stats", fp8.stats, zeros_of(DENSE)
  for value in (None, {}, zeros_of(Model()), "state", X, {OWG: {}}):
    call = functools.partial(stats, value)
    yield Wrong(name, f"variables={show(value):.20}", call, ValueError, "must have FP8 state")
  formats = {"fp8_format": ("hybrid", None, jnp.float8_e5m2, DELAYED)}
  of = functools.partial(stats, given)
  yield from fields(name, of, TypeError, "must be a Format; got", **formats)
  traced = lambda: jax.eval_shape(lambda v: stats(v) and v, given)
  yield Wrong(name, "traced", traced, TypeError, "traced|outside jit")
  abstract = lambda: stats(jax.eval_shape(lambda: given))
  yield Wrong(name, "abstract", abstract, TypeError, "abstract|ShapeDtypeStruct")
  select = lambda: stats(given).select("*/outputs")
  yield Wrong(
    "Stats.select", "unmatched", select, ValueError, "pattern must match at least one tensor"
  )
  for value in (None, 5, ["*"]):
    call = lambda v=value: stats(given).select(v)
    yield Wrong("Stats.select", show(value), call, TypeError, "pattern must be a string; got")
  name, check = "check_train_step", fp8.check_train_step
  step = lambda s, b: s
  for what, value in {"none": None, "no state": zeros_of(Model()), "string": "state"}.items():
    call = lambda v=value: check(step, v, X)
    yield Wrong(name, f"state {what}", call, ValueError, "state must hold amax histories")
  for value in (None, "step", given):
    call = lambda v=value: check(v, given, X)
    yield Wrong(name, f"step_fn={show(value):.16}", call, TypeError, "step_fn must be a function")
  returns = lambda: check(lambda s, b: None, given, X)
  yield Wrong(name, "returns nothing", returns, ValueError, "step_fn must return|step_fn")
  raises = lambda: check(lambda s: s, given, X)
  yield Wrong(name, "takes no batch", raises, ValueError, "step_fn")


def _tools() -> Iterator[Wrong]:
  for value in ("h300", "H100 PCIe", "", "rtx"):
    call = lambda v=value: fp8.explain(loss, {}, target=v)
    yield Wrong("GpuTarget", f"target={value}", call, ValueError, "the name must be one of")
    call = lambda v=value: fp8.GpuTarget.named(v)
    yield Wrong("GpuTarget", f"named {value}", call, ValueError, "the name must be one of")
  for value in (None, 3, "loss"):
    call = lambda v=value: fp8.explain(v, X)
    yield Wrong("explain", f"fn={show(value):.12}", call, TypeError, "fn must be a function; got")
  for value, error in {"1": TypeError, 0: ValueError, -1.0: ValueError, None: TypeError}.items():
    call = lambda v=value: fp8.explain(loss, {}, target="h100", timeout=v)
    words = "timeout must be a positive number; got"
    yield Wrong("explain", f"timeout={value!r}", call, error, words)
  for value in (3, "*/head", None):
    call = lambda v=value: fp8.assert_fp8(loss, {}, target="h100", exclude=v)
    yield Wrong("assert_fp8", f"exclude={value!r}", call, TypeError, "exclude must be a sequence")
  for value in (None, 3, X, {"a": X}):
    call = lambda v=value: fp8.save_checkpoint(v, {"a": X})
    words, what = "directory must be a path; got", f"directory={show(value):.20}"
    yield Wrong("save_checkpoint", what, call, TypeError, words)
    call = lambda v=value: fp8.restore_checkpoint(v, {"a": X})
    yield Wrong("restore_checkpoint", what, call, TypeError, words)
  call = lambda: fp8.save_checkpoint("folder", {"a": X}, overwrite="yes")
  yield Wrong("save_checkpoint", "overwrite", call, TypeError, "overwrite must be True or False")
  name = "GpuTarget"
  rates = {"memory_bandwidth": 1.0, "link_bandwidth": 1.0, "memory_bytes": 1}
  make = lambda **f: fp8.GpuTarget(
    **{"name": "x", "description": "", "peak_flops": {"bf16": 1.0, "tf32": 1.0}, **rates, **f}
  )
  peaks = ({}, {"bf16": 1.0})
  for value in peaks:
    call = functools.partial(make, peak_flops=value)
    yield Wrong(name, f"peak_flops={value}", call, ValueError, "peak_flops must name the operand")
  for field in rates:
    call = functools.partial(make, **{field: 0})
    yield Wrong(name, f"{field}=0", call, ValueError, "must be positive")
  name = "capability"
  for value in ("cuda", 0, jax.devices):
    call = functools.partial(fp8.capability, value)
    yield Wrong(name, f"device={show(value):.12}", call, TypeError, "device must be a JAX device")
  formats = {"fp8_format": ("HYBRID", jnp.float8_e4m3fn, DELAYED)}
  yield from fields(name, fp8.capability, TypeError, "must be a Format; got", **formats)
  recipes = {"recipe": ("delayed", fp8.DelayedScaling, fp8.Format.HYBRID)}
  yield from fields(name, fp8.capability, TypeError, "must be a recipe, such as", **recipes)
  both = lambda: fp8.capability(fp8_format=fp8.Format.HYBRID, recipe=DELAYED)
  yield Wrong(name, "both", both, TypeError, "a recipe has its own formats; got both")
  which = {"which": ("on", "Auto", None, True, jnp.ones((2, 2)), ["off"])}
  yield from fields("use_kernels", fp8.use_kernels, ValueError, "must be one of", **which)
  name = "save_checkpoint"
  a_file = lambda: fp8.save_checkpoint(__file__, {"x": X})
  yield Wrong(name, "file", a_file, ValueError, "directory must be a directory or nothing; got")
  extended = lambda: fp8.save_checkpoint("/nowhere", fp8.as_max_grad(zeros_of(DENSE)))
  yield Wrong(name, "fp32_max_grad", extended, TypeError, "dtypes that can be stored; got")
  for field in ("allow_missing", "allow_extra"):
    call = lambda f=field: fp8.restore_checkpoint("/nowhere", {"x": X}, **{f: "*"})
    yield Wrong("restore_checkpoint", field, call, TypeError, "must be sequences of patterns; got")


def _transforms() -> Iterator[Wrong]:
  for name, lift in (("scan", fp8.scan), ("vmap", fp8.vmap)):
    for value in ("params", ["params"], 0, {"params"}):
      call = functools.partial(lift, nn.Dense, value)
      words = "variable_axes must be a mapping from collections to axes; got variable_axes="
      yield Wrong(name, f"variable_axes={value}", call, TypeError, words)
    for value in ("params", True, ["params"]):
      call = functools.partial(lift, nn.Dense, {"params": 0}, split_rngs=value)
      words = "split_rngs must be a mapping from PRNG collections to bools; got split_rngs="
      yield Wrong(name, f"split_rngs={value}", call, TypeError, words)
    for value in (None, "Dense", {"params": 0}, X):
      call = functools.partial(lift, value)
      words = "target must be a module class, a module or a function; got target="
      yield Wrong(name, f"target={show(value):.20}", call, TypeError, words)
  branch = lambda dense, x: dense(x)
  words = "mdl must be a bound module; got mdl="
  for what, arguments in {
    "forgotten": lambda dense, x: (True, branch, branch, x),
    "class": lambda dense, x: (True, branch, branch, nn.Dense, x),
    "unbound": lambda dense, x: (True, branch, branch, nn.Dense(16, parent=None), x),
  }.items():
    call = lambda a=arguments: init(Branches(a))
    yield Wrong("cond", f"mdl {what}", call, TypeError, words)
  for what, arguments in {
    "None": lambda dense, x: (True, branch, None, dense, x),
    "value": lambda dense, x: (True, dense(x), branch, dense, x),
  }.items():
    call = lambda a=arguments: init(Branches(a))
    yield Wrong("cond", f"branch {what}", call, TypeError, "must be a function; got")
  words = "pred must be a bool scalar; got pred="
  for what, pred in {"vector": np.ones(4, bool), "float": X, "None": None, "string": "yes"}.items():
    call = lambda p=pred: init(Branches(lambda dense, x: (p, branch, branch, dense, x)))
    yield Wrong("cond", f"pred {what}", call, TypeError, words)


def _fp8_ops() -> Iterator[Wrong]:
  one, empty = jnp.ones(1), jnp.zeros(4)
  for cls in (fp8_ops.Fp8DotGeneral, fp8_ops.Fp8Einsum):
    name = cls.__name__
    args = ("mk,kn->mn", X, W) if cls is fp8_ops.Fp8Einsum else (X, W, DIMS)
    run = lambda cls=cls, args=args, **field: init(cls(**field), *args)
    integer = "must be an integer of at least 1; got"
    yield from fields(name, run, TypeError, integer, amax_history_length=("16", None, True))
    yield from fields(name, run, ValueError, integer, amax_history_length=(0, -1, 1.5))
    for field in ("e4m3_dtype", "e5m2_dtype"):
      for value in (jnp.float32, "float8", None, "E4M3"):
        call = functools.partial(run, **{field: value})
        words = f"{field} must be one of .*float8_e4m3fn.*; got dtype="
        yield Wrong(name, f"{field}={show(value)}", call, ValueError, words)
    arrays = lambda cls=cls, args=args: cls(*args)
    yield Wrong(
      name,
      "arrays to the class of fp8_ops",
      arrays,
      TypeError,
      "arrays must be passed to the call, not",
    )
  calls = {
    "quantize": lambda d: fp8_ops.quantize(X, d, one, jnp.float32),
    "qdq": lambda d: fp8_ops.qdq(X, d, one, jnp.float32),
    "update_fp8_meta": lambda d: fp8_ops.update_fp8_meta(X, d, one, empty),
    "get_fp8_max": lambda d: fp8_ops.get_fp8_max(d, jnp.float32),
    "in_q": lambda d: fp8_ops.in_q(jnp.float32, d, X, one, empty),
    "in_qdq": lambda d: fp8_ops.in_qdq(jnp.float32, d, X, one, empty),
    "quantize_dequantize_update": lambda d: fp8_ops.quantize_dequantize_update(
      X, d, one, empty, jnp.float32
    ),
  }
  for what, call in calls.items():
    for value in (jnp.float32, "float8"):
      run = functools.partial(call, value)
      yield Wrong("float8", f"{what} {show(value)}", run, ValueError, "the dtype must be one of")
  leaves = {f"{t}_scale": one for t in ("lhs", "rhs", "grad")}
  leaves |= {f"{t}_amax_history": empty for t in ("lhs", "rhs", "grad")}
  run = lambda **f: fp8_ops.fp8_scaled_dot_general(X, W, DIMS, **{**leaves, **f})
  name = "fp8_scaled_dot_general"
  for value in (None, 16, "x"):
    call = functools.partial(run, lhs_amax_history=value)
    yield Wrong(
      name, f"lhs_amax_history={value}", call, TypeError, "lhs_amax_history must be an arr"
    )
  formats = {"fp8_format": ("hybrid", None)}
  call = functools.partial(run, grad_scale=jnp.ones(2))
  yield Wrong(name, "grad_scale of two", call, ValueError, "output_grad_scale must have shape")
  for wrong in fields("DelayedScaling", run, TypeError, "must be a Format", **formats):
    yield wrong._replace(what=f"fp8_scaled_dot_general {wrong.what}")


TRAINING_TABLE: tuple[Wrong, ...] = tuple(
  wrong
  for table in (
    _configs, _models, _gradients, _states, _microbatches, _calibration, _diagnostics, _tools,
    _transforms, _fp8_ops,
  )
  for wrong in table()
)  # fmt: skip
