"""Features as small programs, which ``tests/modes.py`` runs in every mode of JAX and of Python.

A new feature joins by one function with the decorator ``feature``. It returns arrays and strings.
What it compiles, it compiles with ``compiled``, so that a transfer guard covers each call.
"""

from __future__ import annotations

import contextvars
import functools
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.linen.fp8_ops as reference
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import checkify
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import flax_fp8 as fp8
from flax_fp8 import fp8_ops, ops

OWG = fp8.OVERWRITE_WITH_GRADIENT
KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16)), jnp.float32)
XS = jnp.stack([X, 2 * X, 0.5 * X])
W = jnp.asarray(np.random.default_rng(1).normal(size=(16, 8)), jnp.float32)
DIMS = (((1,), (0,)), ((), ()))

# Stands around each call of a compiled function.
GUARD = contextvars.ContextVar("GUARD", default="allow")
Feature = Callable[[], Any]
FEATURES: dict[str, Feature] = {}
# Features without FP8, of which a mode of JAX may be wrong too: it reports leaks of shard_map.
BASELINES: dict[str, Feature] = {}


def feature(run: Feature) -> Feature:
  """Adds a row."""
  FEATURES[run.__name__] = run
  return run


def compiled(fun: Callable[..., Any]) -> Callable[..., Any]:
  """``jax.jit``; a call transfers nothing but its arguments, if ``GUARD`` says so."""
  jitted = jax.jit(fun)

  def call(*args: Any) -> Any:
    args = jax.device_put(args)
    with jax.transfer_guard(GUARD.get()):
      return jitted(*args)

  return call


def squares(out: jax.Array) -> jax.Array:
  return jnp.mean(jnp.square(out))


class Mlp(nn.Module):
  """Two layers; in FP8 where it is given a class."""

  dot_general_cls: Any = None
  wrap: Any = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    dense = self.wrap(nn.Dense) if self.wrap else nn.Dense
    h = nn.relu(dense(16, dot_general_cls=self.dot_general_cls, name="up")(x))
    return dense(8, dot_general_cls=self.dot_general_cls, name="down")(h)


def delayed(**options: Any) -> fp8.DelayedScaling:
  return fp8.DelayedScaling(amax_history_len=4, **options)


def mlp(recipe: fp8.Recipe | None = None, **fields: Any) -> Mlp:
  return Mlp((recipe or delayed()).dot_general_cls, **fields)


def made(model: nn.Module, *args: Any) -> Any:
  return fixed(model.init(KEY, *args))


def fixed(variables: Any) -> Any:
  """Variables whose parameters do not hang on how JAX makes random numbers."""
  sines = lambda x: jnp.asarray(np.sin(np.arange(1, x.size + 1)).reshape(x.shape), x.dtype) / 2
  return {**variables, "params": jax.tree.map(sines, variables.get("params", {}))}


def loss_of(model: nn.Module) -> Callable[..., jax.Array]:
  return lambda variables, x: squares(model.apply(variables, x))


def trained(model: nn.Module, x: jax.Array = X, steps: int = 2, **options: Any) -> Any:
  """Variables after some steps of a compiled training loop."""
  state = fp8.TrainState.create(
    apply_fn=model.apply, params=made(model, x), tx=optax.sgd(1e-2, momentum=0.9), **options
  )

  @compiled
  def step(state: Any, x: jax.Array) -> Any:
    loss = lambda variables: squares(state.apply_fn(variables, x))
    return state.apply_gradients(grads=fp8.grad(loss)(state.params))

  for _ in range(steps):
    state = step(state, x)
  return state.params


def recipe_feature(name: str, recipe: fp8.Recipe) -> None:
  """Adds two rows for a recipe: a compiled loop, and one eager gradient."""
  FEATURES[f"{name}: train"] = lambda: trained(mlp(recipe))
  FEATURES[f"{name}: eager"] = lambda: jax.grad(loss_of(mlp(recipe)))(made(mlp(recipe), X), X)


for _name, _recipe in {
  "delayed": delayed(),
  "delayed, current first step": delayed(first_step="current", overflow="current", interval=2),
  "current": fp8.Float8CurrentScaling(),
  "rowwise": fp8.Float8RowwiseScaling(power_of_two=True),
  "block": fp8.Float8BlockScaling(),
  "mxfp8": fp8.MXFP8BlockScaling(),
}.items():
  recipe_feature(_name, _recipe)


@feature
def registry() -> Any:
  return trained(mlp(fp8.get_recipe("current", high_precision=("wgrad",))))


@feature
def stochastic_rounding() -> Any:
  model = mlp(fp8.Float8CurrentScaling(grad_rounding="stochastic"))
  loss = lambda v: squares(model.apply(v, X, rngs={"sr_rng": KEY}))
  return fp8.grad(loss)(made(model, X))


@feature
def einsum() -> Any:
  model = fp8.Fp8Einsum(recipe=delayed())
  args = "etk,kn->etn", XS, W
  loss = lambda v, x: squares(model.apply(v, args[0], x, W))
  return compiled(fp8.value_and_grad(loss, argnums=(0, 1)))(made(model, *args), XS)


@feature
def bare_ops() -> Any:
  state = ops.init_state(delayed())
  dot = lambda state, x: squares(ops.dot_general(x, W, DIMS, recipe=delayed(), state=state))
  ein = lambda state, x: squares(ops.einsum("bk,kn->bn", x, W, recipe=delayed(), state=state))
  return [jax.grad(f, argnums=(0, 1))(state, X) for f in (dot, ein)]


@feature
def fused_layers() -> Any:
  qkv, gated = fp8.Fp8FusedQKV(num_heads=2, head_dim=4), fp8.Fp8SwiGLU(hidden_features=8)
  loss = lambda v: sum(jnp.mean(jnp.square(out)) for out in qkv.apply(v, X))
  return fp8.grad(loss)(made(qkv, X)), fp8.grad(loss_of(gated))(made(gated, X), X)


def converted() -> Any:
  config = fp8.Fp8Config(targets=["*"], recipe=delayed())
  return fp8.fp8_linear_layers(Mlp(), config)


@feature
def converted_model() -> Any:
  model = converted()
  return trained(model), fp8.grad(loss_of(model))(made(model, X), X)


@feature
def unconverted_after_converted() -> Any:
  model = converted()
  variables = made(model, X)
  plain = Mlp()
  served, frozen = fp8.freeze_for_inference(model, variables, X)
  out = model.apply(variables, X), served.apply(frozen, X)
  assert OWG not in made(plain, X)
  return out, plain.apply({"params": variables["params"]}, X)


@feature
def conversion_report() -> Any:
  return str(fp8.Fp8Config().report(Mlp(), X))


@feature
def frozen_model() -> Any:
  model = mlp()
  served, frozen = fp8.freeze_for_inference(model, trained(model), X)
  return served.apply(frozen, X), compiled(served.apply)(frozen, X), frozen


@feature
def lifted_transforms() -> Any:
  class Step(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> Any:
      return nn.Dense(16, dot_general_cls=delayed().dot_general_cls)(x), None

  class Stack(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
      axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
      return fp8.scan(Step, **axes)()(x, None)[0]

  class Chosen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
      layer = nn.Dense(16, dot_general_cls=delayed().dot_general_cls)
      return fp8.cond(jnp.sum(x) > 0, lambda m, x: m(x), lambda m, x: 2 * m(x), layer, x)

  class Mapped(nn.Module):
    @nn.compact
    def __call__(self, xs: jax.Array) -> jax.Array:
      axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
      return fp8.vmap(nn.Dense, **axes)(8, dot_general_cls=delayed().dot_general_cls)(xs)

  return [
    fp8.grad(loss_of(model))(made(model, x), x)
    for model, x in ((Stack(), X), (Chosen(), X), (Mapped(), XS))
  ]


@feature
def lifted_by_linen() -> Any:
  wraps = nn.jit, nn.remat
  return [jax.grad(loss_of(mlp(wrap=wrap)))(made(mlp(wrap=wrap), X), X) for wrap in wraps]


@feature
def accumulated() -> Any:
  model = mlp()
  run = lambda v: fp8.accumulate_gradients(loss_of(model), v, XS)
  variables = made(model, X)
  return run(variables), compiled(run)(variables)


@feature
def max_grad_state() -> Any:
  model = mlp()

  def loss(variables: Any) -> jax.Array:
    cast = fp8.as_max_grad(variables)
    return squares(model.apply(cast, X)) + squares(model.apply(cast, 2 * X))

  return jax.grad(loss)(made(model, X)), compiled(jax.grad(loss))(made(model, X))


@feature
def unused_state() -> Any:
  model = mlp()
  variables = made(model, X)
  loss = lambda v, x: squares(
    nn.Dense(16, dot_general_cls=delayed().dot_general_cls).apply(
      {name: v[name]["up"] for name in v}, x
    )
  )
  cast = fp8.as_max_grad(variables)
  grads = jax.grad(loss, allow_int=True)(cast, X)
  new, _ = fp8.partition_for_grad_overwrite(grads)
  return fp8.grad(loss)(variables, X), fp8.apply_updates(variables, {}, new)


@feature
def max_grad_results() -> Any:
  cast = lambda x: jax.lax.convert_element_type(x, fp8.fp32_max_grad)
  back = lambda x: jax.lax.convert_element_type(x, jnp.float32)
  return back(cast(X)), back(compiled(cast)(X)), compiled(lambda x: back(cast(x)))(X)


@feature
def updates() -> Any:
  model, tx = mlp(), optax.sgd(0.1)
  variables = made(model, X)
  _, params = fp8.partition_for_grad_overwrite(variables)
  new, grads = fp8.partition_for_grad_overwrite(fp8.grad(loss_of(model))(variables, X))
  changes, _ = tx.update(grads, tx.init(params), params)
  return fp8.apply_updates(variables, changes, new)


@feature
def loss_scaling() -> Any:
  model = mlp()
  scaler, finite, loss, grads = compiled(
    lambda v: fp8.DynamicScale(scale=8.0).value_and_grad(lambda v: loss_of(model)(v, X))(v)
  )(made(model, X))
  return scaler.scale, finite, loss, grads, trained(model, skip_nonfinite=True)


@feature
def calibrated() -> Any:
  model = mlp()
  variables = fp8.calibrate(model, made(model, X), list(XS), progress=False)
  return fp8.calibrate(model, variables, list(XS), loss_of(model), percentile=99.0, progress=False)


@feature
def statistics() -> Any:
  model = mlp()
  variables = fp8.add_metrics(model, made(model, X), X)
  new = fp8.grad(loss_of(model))(variables, X)
  found = fp8.stats({**variables, OWG: new[OWG]})
  return new, found.scalars(), fp8.drop_metrics(variables)


@feature
def checked_step() -> Any:
  model = mlp()
  state = fp8.TrainState.create(apply_fn=model.apply, params=made(model, X), tx=optax.sgd(0.1))

  def step(state: Any, x: jax.Array) -> Any:
    loss = lambda variables: squares(state.apply_fn(variables, x))
    return state.apply_gradients(grads=fp8.grad(loss)(state.params))

  return [str(fp8.check_train_step(run, state, X)) for run in (step, compiled(step))]


@feature
def checkpoints() -> Any:
  variables = made(mlp(), X)
  with tempfile.TemporaryDirectory() as folder:
    fp8.save_checkpoint(f"{folder}/checkpoint", variables)
    return fp8.restore_checkpoint(f"{folder}/checkpoint", variables)


@feature
def other_states() -> Any:
  model, longer = mlp(), Mlp(fp8.DelayedScaling(amax_history_len=8).dot_general_cls)
  variables = trained(model)
  plain = fp8.downgrade_variables(variables)
  theirs = Mlp(functools.partial(reference.Fp8DirectDotGeneralOp, amax_history_length=4))
  return (
    fp8.upgrade_variables(longer, variables, X),
    fp8.upgrade_variables(model, plain, X),
    fp8.from_flax_fp8_ops(fixed(compiled(theirs.init)(KEY, X))),
  )


@feature
def flax_namespace() -> Any:
  cls = functools.partial(fp8_ops.Fp8DirectDotGeneralOp, amax_history_length=4)
  model = Mlp(cls)
  scale, history = jnp.ones((1,)), jnp.zeros((4,))
  inside = lambda s, h: squares(fp8_ops.in_qdq(jnp.float32, jnp.float8_e4m3fn, X, s, h))
  return (
    fp8.grad(loss_of(model))(made(model, X), X),
    jax.grad(inside, argnums=(0, 1))(scale, history),
    fp8_ops.qdq(X, jnp.float8_e4m3fn, scale, jnp.float32),
  )


@feature
def remat_policies() -> Any:
  model = mlp()
  policy = fp8.remat_policies.save_fp8_inputs
  loss = jax.checkpoint(lambda v: loss_of(model)(v, X), policy=policy)
  return fp8.grad(loss)(made(model, X))


@feature
def kernels_off() -> Any:
  with fp8.use_kernels("off"):
    return trained(mlp())


@feature
def second_derivative() -> Any:
  recipe = fp8.Float8CurrentScaling()
  dot = lambda x: jnp.sum(jnp.sin(ops.dot_general(x, W, DIMS, recipe=recipe, state={})))
  return compiled(jax.grad(lambda x: jnp.sum(jnp.square(jax.grad(dot)(x)))))(X)


@feature
def mapped() -> Any:
  model = mlp()
  loss = lambda v: jnp.mean(jax.vmap(loss_of(model), in_axes=(None, 0))(v, XS))
  return jax.grad(loss)(made(model, X)), jax.vmap(jax.grad(loss_of(model)), (None, 0))(
    made(model, X), XS
  )


def _sharded(model: nn.Module, grad: Any) -> Any:
  mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  variables = made(model, X)

  @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
  def loss(variables: Any, x: jax.Array) -> jax.Array:
    return jax.lax.pmean(loss_of(model)(variables, x), "data")

  place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  return compiled(grad(loss))(place(variables, P()), place(X, P("data")))


@feature
def sharded() -> Any:
  return _sharded(mlp(), fp8.grad)


BASELINES["sharded"] = lambda: _sharded(Mlp(), jax.grad)


@feature
def checkified() -> Any:
  check = checkify.checkify(fp8.grad(loss_of(mlp())), errors=checkify.float_checks)
  error, grads = compiled(check)(made(mlp(), X), X)
  return str(error.get()), grads


@feature
def explicit_mesh() -> Any:
  """Parameters were made outside of the mesh."""
  mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
  x = jax.device_put(X, NamedSharding(mesh, P("data")))
  recipes = delayed(), fp8.Float8CurrentScaling(), fp8.Float8RowwiseScaling()
  found = []
  for model in map(mlp, recipes):
    variables = made(model, X)
    with jax.set_mesh(mesh):
      found.append(jax.jit(fp8.grad(loss_of(model)))(variables, x))
  return found


@feature
def exported() -> Any:
  """One program for any batch size."""
  model = mlp()
  variables = made(model, X)
  served, frozen = fp8.freeze_for_inference(model, variables, X)
  shape = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), 16), jnp.float32)
  programs = (fp8.grad(loss_of(model)), variables), (served.apply, frozen)
  return [jax.export.export(jax.jit(run))(given, shape).call(given, X) for run, given in programs]


@feature
def sliced_stack() -> Any:
  """Layers that are stacked in one tree and taken out by an index."""
  layer = nn.Dense(16, dot_general_cls=delayed().dot_general_cls)
  stack = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), made(layer, X))

  def loss(stack: Any) -> jax.Array:
    layers = [jax.tree.map(lambda x, i=i: x[i], stack) for i in range(2)]
    return squares(layer.apply(layers[1], layer.apply(layers[0], X)))

  return fp8.grad(loss)(stack), jax.jit(jax.grad(loss))(stack)


@feature
def serialized() -> Any:
  model, recipe, config = pickle.loads(pickle.dumps((converted(), delayed(), fp8.Fp8Config())))
  assert (recipe, config) == (delayed(), fp8.Fp8Config())
  return trained(model)


@feature
def capability() -> Any:
  return str(fp8.capability(recipe=delayed()))
