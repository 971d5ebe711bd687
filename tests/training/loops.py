"""Training steps as users write them: correct ones, and wrong ones with the expected findings.

All train the same small model on the same batch. ``BATCH`` has eight examples, and the last ones
are the smallest.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.linen.fp8_ops as reference
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import dynamic_scale, train_state
from jax.sharding import PartitionSpec as P

import flax_fp8 as fp8

OWG = fp8.OVERWRITE_WITH_GRADIENT
LENGTH, WIDTH, PARTS = 4, 4, 2
CLS = fp8.DelayedScaling(amax_history_len=LENGTH).dot_general_cls
FLAX = functools.partial(reference.Fp8DirectDotGeneralOp, amax_history_length=LENGTH)

_random = np.random.default_rng(0)
_sizes = np.array([1, 3, 2, 4, 2, 1, 0.5, 0.25], np.float32)
BATCH = {
  "x": jnp.asarray(_random.normal(size=(8, WIDTH)).astype(np.float32) * _sizes[:, None]),
  "y": jnp.asarray(_random.normal(size=(8, WIDTH)).astype(np.float32)),
}


class Model(nn.Module):
  """Two FP8 layers."""

  cls: Any = CLS
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = jnp.tanh(nn.Dense(WIDTH, dot_general_cls=self.cls, name="up")(x))
    if self.dropout:
      x = nn.Dropout(self.dropout, deterministic=False)(x)
    return nn.Dense(WIDTH, dot_general_cls=self.cls, name="down")(x)


def init(model: nn.Module, *inputs: Any) -> Any:
  """Initializes a model in one compiled function, which is faster."""
  keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
  return jax.jit(model.init)(keys, *(inputs or (BATCH["x"],)))


MODEL = Model()
VARIABLES = init(MODEL)
FLAX_MODEL = Model(FLAX)
FLAX_VARIABLES = init(FLAX_MODEL)
SGD = optax.sgd(0.1)


def loss_fn(variables: Any, batch: Any, model: nn.Module = MODEL, **kwargs: Any) -> jax.Array:
  return jnp.mean((model.apply(variables, batch["x"], **kwargs) - batch["y"]) ** 2)


def microbatches(batch: Any, parts: int = PARTS) -> Any:
  return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)


def grads_of_parts(variables: Any, batch: Any) -> list[Any]:
  split = microbatches(batch)
  part = lambda i: jax.tree.map(lambda x: x[i], split)
  return [fp8.grad(loss_fn)(variables, part(i)) for i in range(PARTS)]


def update(variables: Any, grads: Any, tx: Any = SGD, opt_state: Any = None) -> Any:
  """Takes one correct step on variables, without ``TrainState``."""
  overwrite, rest = fp8.partition_for_grad_overwrite(grads)
  params = {"params": variables["params"]}
  updates, opt_state = tx.update(rest, tx.init(params) if opt_state is None else opt_state, params)
  return fp8.apply_updates(variables, updates, overwrite), opt_state


@dataclasses.dataclass
class Loop:
  """A training step.

  Attributes:
    name: name of the function that makes it.
    make: returns step, state and batch.
    kinds: kinds of the expected findings.
    slow: whether it runs only in the slow tests, because other loops cover its kinds.
  """

  name: str
  make: Callable[[], tuple[Any, Any, Any]]
  kinds: frozenset[str]
  slow: bool

  @functools.cached_property
  def report(self) -> fp8.TrainStepReport:
    """The report of ``check_train_step``."""
    return fp8.check_train_step(*self.make())


LOOPS: list[Loop] = []


def loop(*kinds: str, slow: bool = False) -> Callable[[Any], Any]:
  """Registers a function that returns ``(step, state)`` or ``(step, state, batch)``."""

  def enter(make: Callable[[], Any]) -> Any:
    @functools.cache
    def made() -> tuple[Any, Any, Any]:
      step, state, *batch = make()
      return step, state, batch[0] if batch else BATCH

    LOOPS.append(Loop(make.__name__, made, frozenset(kinds), slow))
    return make

  return enter


def our_train_state(variables: Any = VARIABLES, tx: Any = SGD, model: nn.Module = MODEL) -> Any:
  return fp8.TrainState.create(apply_fn=model.apply, params=variables, tx=tx)


# Correct loops.


class Shared(nn.Module):
  """Attention and a gated MLP, so that several layers share one input."""

  cls: Any = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    layer = functools.partial(nn.Dense, dot_general_cls=self.cls, dtype=self.dtype)
    tokens = jnp.stack([x, jnp.roll(x, 1, -1)], 1)
    query, key, value = (layer(WIDTH, name=name)(tokens) for name in ("query", "key", "value"))
    mixed = nn.softmax(query @ key.swapaxes(1, 2)) @ value
    hidden = nn.silu(layer(8, name="gate")(mixed)) * layer(8, name="up")(mixed)
    return (x + jnp.mean(layer(WIDTH, name="down")(hidden), 1)).astype(jnp.float32)


class SharedStack(nn.Module):
  """Two scanned ``Shared`` blocks."""

  cls: Any = None
  remat: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    block = nn.remat(Shared) if self.remat else Shared
    body = lambda block, x: (block(x), None)
    scanned = fp8.scan(body, {"params": 0}, split_rngs={"params": True}, length=2)
    return scanned(block(self.cls), x)[0]


CONFIG = fp8.Fp8Config(recipe=fp8.DelayedScaling(amax_history_len=LENGTH), multiple_of=1)
SHARED = {
  "written": Shared(CLS),
  "written_bfloat16": Shared(CLS, jnp.bfloat16),
  "converted": fp8.fp8_linear_layers(Shared(), CONFIG),
  "scanned": SharedStack(CLS),
  "scanned_remat": SharedStack(CLS, remat=True),
  "converted_scanned": fp8.fp8_linear_layers(SharedStack(), CONFIG),
}


def _shared_inputs(name: str, differentiate: Any) -> Any:
  @jax.jit
  def step(state, batch):
    loss = lambda v: jnp.mean((state.apply_fn(v, batch["x"]) - batch["y"]) ** 2)
    return state.apply_gradients(grads=differentiate(loss)(state.params))

  model = SHARED[name]
  return step, our_train_state(init(model), model=model)


def _enter_shared_inputs() -> None:
  """Each model with one way to differentiate, and each way with some models."""
  ways = {"jax": jax.grad, "fp8": fp8.grad}
  for label, name, slow in (
    ("fp8", "written", False),
    ("jax", "converted", True),
    ("jax", "scanned_remat", False),
    ("jax", "written_bfloat16", True),
    ("fp8", "scanned", True),
    ("jax", "converted_scanned", True),
  ):
    make = functools.partial(_shared_inputs, name, ways[label])
    functools.update_wrapper(make, _shared_inputs)
    make.__name__ = f"shared_inputs_{name}_{label}"
    loop(slow=slow)(make)


_enter_shared_inputs()


@loop()
def train_state_and_value_and_grad() -> Any:
  """The loop of the README, jitted, with donated state."""

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, batch):
    loss = lambda v: jnp.mean((state.apply_fn(v, batch["x"]) - batch["y"]) ** 2)
    value, grads = fp8.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), {"loss": value}

  return step, our_train_state(tx=optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2)))


@loop()
def flax_train_state_apart() -> Any:
  """Flax's class with only parameters in ``params``, and FP8 state in another field."""

  class State(train_state.TrainState):
    fp8_state: Any

  @jax.jit
  def step(state, batch):
    grads, new = jax.grad(
      lambda params, own: loss_fn({"params": params, OWG: own}, batch), argnums=(0, 1)
    )(state.params, state.fp8_state[OWG])
    return state.apply_gradients(grads=grads, fp8_state={OWG: new})

  return step, State.create(
    apply_fn=None, params=VARIABLES["params"], tx=SGD, fp8_state={OWG: VARIABLES[OWG]}
  )


@loop()
def flax_train_state_whole() -> Any:
  """The loop of Flax's documentation: Flax's class and layers, with all variables."""

  @jax.jit
  def step(state, batch):
    value, grads = jax.value_and_grad(loss_fn)(state.params, batch, FLAX_MODEL)
    return value, state.apply_gradients(grads=grads)

  return step, train_state.TrainState.create(apply_fn=None, params=FLAX_VARIABLES, tx=SGD)


@loop()
def optax_by_hand() -> Any:
  """Returns a tuple of variables and optimizer state, and a loss."""
  tx = optax.adafactor(1e-2)

  @jax.jit
  def step(state, batch):
    variables, opt_state = state
    value, grads = fp8.value_and_grad(loss_fn)(variables, batch)
    return *update(variables, grads, tx, opt_state), value

  return step, (VARIABLES, tx.init({"params": VARIABLES["params"]}))


@loop()
def not_jitted_without_names() -> Any:
  """Keeps state under a key other than the collection, in NumPy."""

  def step(state, batch):
    variables = {"params": state["params"], OWG: state["fp8"]}
    new, _ = update(variables, fp8.grad(loss_fn)(variables, batch))
    return {"params": new["params"], "fp8": new[OWG]}

  state = {"params": VARIABLES["params"], "fp8": VARIABLES[OWG]}
  return jax.jit(step), jax.tree.map(np.asarray, state)


@loop()
def multi_steps() -> Any:
  """Updates parameters at every second step, and state at each."""
  tx = optax.MultiSteps(optax.lion(1e-2), 2)

  @jax.jit
  def step(state, batch):
    return state.apply_gradients(grads=fp8.grad(loss_fn)(state.params, batch))

  return step, our_train_state(tx=tx.gradient_transformation())


@loop()
def scan_over_steps() -> Any:
  """Takes two steps per call, so histories shift by two slots."""

  @jax.jit
  def step(variables, batch):
    one = lambda v, part: (update(v, fp8.grad(loss_fn)(v, part))[0], None)
    return jax.lax.scan(one, variables, batch)[0]

  return step, VARIABLES, microbatches(BATCH)


@loop(slow=True)
def max_over_microbatches() -> Any:
  """Scans over microbatches inside the loss, and differentiates the whole loss."""

  @jax.jit
  def step(state, batch):
    def loss(variables):
      one = lambda total, part: (total + loss_fn(variables, part) / PARTS, None)
      return jax.lax.scan(one, jnp.float32(0), microbatches(batch))[0]

    return state.apply_gradients(grads=fp8.grad(loss)(state.params))

  return step, our_train_state()


@loop()
def accumulated() -> Any:
  """Accumulates gradients with dropout and a PRNG key per microbatch."""
  model = Model(dropout=0.3)
  batch = {**microbatches(BATCH, 4), "key": jax.random.split(jax.random.key(2), 4)}

  def loss(variables, part):
    return loss_fn(variables, part, model, rngs={"dropout": part["key"]})

  @jax.jit
  def step(state, batch):
    value, grads = fp8.accumulate_gradients(loss, state.params, batch)
    return state.apply_gradients(grads=grads), value

  return step, our_train_state(init(model), model=model), batch


@loop()
def ema_over_params() -> Any:
  """Keeps a moving average of only the parameters."""

  @jax.jit
  def step(state, batch):
    new, _ = update(state["variables"], fp8.grad(loss_fn)(state["variables"], batch))
    return {
      "variables": new,
      "ema": optax.incremental_update(new["params"], state["ema"], 0.1),
      "target": state["target"],
    }

  return step, {"variables": VARIABLES, "ema": VARIABLES["params"], "target": VARIABLES}


@loop()
def frozen_layers() -> Any:
  """Freezes the parameters of a layer; its state still moves."""
  labels = {"up": "frozen", "down": "trained"}
  tx = optax.multi_transform({"frozen": optax.set_to_zero(), "trained": optax.adam(1e-2)}, labels)
  step, _ = train_state_and_value_and_grad()
  return step, our_train_state(tx=tx)


@loop()
def skipped_steps() -> Any:
  """Skips the first steps, which overflow, as usual in float16."""

  @jax.jit
  def step(state, batch):
    variables, scale = state["variables"], state["scale"]
    grads = fp8.grad(loss_fn)(variables, batch)
    fine = scale < 2.0**14
    new, _ = update(variables, grads)
    keep = lambda n, o: jnp.where(fine, n, o)
    scale = jnp.where(fine, scale, scale / 2)
    return {"variables": jax.tree.map(keep, new, variables), "scale": scale}

  return step, {"variables": VARIABLES, "scale": jnp.float32(2.0**16)}


@loop()
def float16_with_a_loss_scale() -> Any:
  """Skips the first steps, which overflow; metrics still change."""

  class Half(nn.Module):
    @nn.compact
    def __call__(self, x):
      half = functools.partial(nn.Dense, WIDTH, dtype=jnp.float16, dot_general_cls=CLS)
      return half(name="down")(jnp.tanh(half(name="up")(x))).astype(jnp.float32)

  model = Half()

  @jax.jit
  def step(state, batch):
    scaler, _, value, grads = state["scaler"].value_and_grad(loss_fn)(
      state["train"].params, batch, model
    )
    return {"train": state["train"].apply_gradients(grads=grads), "scaler": scaler}, value

  train = fp8.TrainState.create(
    apply_fn=model.apply,
    params=fp8.add_metrics(model, init(model), BATCH["x"]),
    tx=SGD,
    skip_nonfinite=True,
  )
  return step, {"train": train, "scaler": fp8.DynamicScale(scale=2.0**23)}


@loop(slow=True)
def apply_if_finite() -> Any:
  step, _ = train_state_and_value_and_grad()
  return step, our_train_state(tx=optax.apply_if_finite(optax.adam(1e-2), 3))


def data_mesh(devices: int = 4) -> jax.sharding.Mesh:
  return jax.make_mesh(
    (devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
  )


def sharded_grads(check_vma: bool) -> Callable[[Any, Any], Any]:
  """Differentiates outside a shard_map."""

  def loss(variables, batch):
    local = lambda v, b: jax.lax.pmean(loss_fn(v, b), "data")
    return jax.shard_map(
      local, mesh=data_mesh(), in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma
    )(variables, batch)

  return jax.grad(loss)


def _shard_map(check_vma: bool) -> Any:
  @jax.jit
  def step(state, batch):
    return state.apply_gradients(grads=sharded_grads(check_vma)(state.params, batch))

  return step, our_train_state()


@loop()
def shard_map_checked() -> Any:
  return _shard_map(True)


@loop()
def shard_map_unchecked() -> Any:
  return _shard_map(False)


@loop(slow=True)
def shard_map_pmax_inside() -> Any:
  """Differentiates inside a shard_map; averages parameters, and takes the maximum of state."""
  return _inside_shard_map(lambda grads: {
    "params": jax.lax.pmean(grads["params"], "data"),
    OWG: jax.tree.map(lambda x: jax.lax.pmax(x, "data"), grads[OWG]),
  })  # fmt: skip


def _inside_shard_map(reduce: Callable[[Any], Any]) -> Any:
  def local(variables, batch):
    return reduce(jax.grad(loss_fn)(variables, batch, FLAX_MODEL))

  @jax.jit
  def step(variables, batch):
    grads = jax.shard_map(
      local, mesh=data_mesh(), in_specs=(P(), P("data")), out_specs=P(), check_vma=False
    )(variables, batch)
    return update(variables, grads)[0]

  return step, FLAX_VARIABLES


@loop()
def scanned_layers_with_metrics() -> Any:
  """Scans layers that have metrics."""

  class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      return jnp.tanh(nn.Dense(WIDTH, dot_general_cls=CLS, name="dense")(x)), None

  class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
      axes = {"params": 0, OWG: 0}
      rngs = {"params": True}
      return nn.scan(Block, variable_axes=axes, split_rngs=rngs, length=2)(name="block")(x, None)[0]

  model = Scanned()
  variables = fp8.add_metrics(model, init(model), BATCH["x"])

  @jax.jit
  def step(state, batch):
    return state.apply_gradients(grads=fp8.grad(loss_fn)(state.params, batch, model))

  return step, our_train_state(variables, optax.adam(1e-2), model)


@loop()
def converted_with_an_interval() -> Any:
  """Trains a converted model with an excluded layer, and updates scales at an interval."""
  recipe = fp8.DelayedScaling(amax_history_len=LENGTH, interval=3, margin=1, power_of_two=True)
  model = fp8.fp8_linear_layers(Model(None), fp8.Fp8Config(recipe=recipe, multiple_of=1))
  variables = init(model)

  @jax.jit
  def step(state, batch):
    return state.apply_gradients(grads=fp8.grad(loss_fn)(state.params, batch, model))

  return step, our_train_state(variables, model=model)


@loop(slow=True)
def most_recent_after_the_first_step() -> Any:
  """Uses other options of the recipe, high-precision dgrad and wgrad, and an unused layer."""

  class Partly(nn.Module):
    @nn.compact
    def __call__(self, x):
      recipe = fp8.DelayedScaling(
        amax_history_len=LENGTH, amax_compute_algo="most_recent", first_step="current"
      )
      unseen = fp8.DelayedScaling(amax_history_len=LENGTH, high_precision=("dgrad", "wgrad"))
      x = nn.Dense(WIDTH, dot_general_cls=recipe.dot_general_cls, name="up")(x)
      aside = nn.Dense(WIDTH, dot_general_cls=CLS, name="aside")(x)
      x = nn.Dense(WIDTH, dot_general_cls=unseen.dot_general_cls, name="down")(jnp.tanh(x))
      return x + jax.lax.stop_gradient(aside)

  model = Partly()

  @jax.jit
  def step(state, batch):
    return state.apply_gradients(grads=fp8.grad(loss_fn)(state.params, batch, model))

  return step, our_train_state(init(model), model=model)


def short_model() -> tuple[nn.Module, Any]:
  model = Model(fp8.DelayedScaling(amax_history_len=1, margin=2).dot_general_cls)
  return model, init(model)


@loop()
def histories_of_one_slot() -> Any:
  model, variables = short_model()
  step = lambda v, batch: update(v, fp8.grad(loss_fn)(v, batch, model))[0]
  return jax.jit(step), variables


@loop()
def pipeline() -> Any:
  """Runs microbatches through two pipeline stages, each with its own state."""

  class Stage(nn.Module):
    @nn.compact
    def __call__(self, x):
      return jnp.tanh(nn.Dense(WIDTH, dot_general_cls=CLS)(x))

  stages = nn.vmap(Stage, variable_axes={"params": 0, OWG: 0}, split_rngs={"params": True})()
  variables = init(stages, jnp.zeros((2, 4, WIDTH)))

  def run(v, batch):
    parts = microbatches(batch)

    def tick(held, i):
      fed = jnp.where(i < PARTS, parts["x"][i % PARTS], 0)
      out = stages.apply(v, jnp.stack([fed, held]))
      error = jnp.mean((out[1] - parts["y"][(i - 1) % PARTS]) ** 2)
      return out[0], jnp.where(i > 0, error, 0)

    return jnp.mean(jax.lax.scan(tick, jnp.zeros((4, WIDTH)), jnp.arange(PARTS + 1))[1])

  step = lambda v, batch: update(v, fp8.grad(run)(v, batch))[0]
  return jax.jit(step), variables


# Wrong loops.


@loop("summed")
def sum_over_microbatches() -> Any:
  @jax.jit
  def step(state, batch):
    grads = jax.tree.map(lambda *g: sum(g), *grads_of_parts(state.params, batch))
    return state.apply_gradients(grads=grads)

  return step, our_train_state()


@loop("scaled")
def division_by_the_loss_scale() -> Any:
  @jax.jit
  def step(state, batch):
    scaler, finite, value, grads = state["scaler"].value_and_grad(loss_fn)(
      state["train"].params, batch
    )
    new = state["train"].apply_gradients(grads=grads)
    keep = lambda n, o: jnp.where(finite, n, o)
    return {"train": jax.tree.map(keep, new, state["train"]), "scaler": scaler}, value

  return step, {"train": our_train_state(), "scaler": dynamic_scale.DynamicScale()}


@loop("scaled", slow=True)
def division_by_the_number_of_tokens() -> Any:
  """Divides the whole tree, including correct state, by the number of tokens."""

  def step(variables: Any, batch: Any) -> Any:
    summed = lambda variables, part: loss_fn(variables, part) * part["x"].size
    _, grads = fp8.accumulate_gradients(summed, variables, microbatches(batch), reduction="sum")
    return update(variables, jax.tree.map(lambda g: g / batch["x"].size, grads))[0]

  return jax.jit(step), VARIABLES


@loop()
def weights_of_microbatches() -> Any:
  """Does the same correctly, with weights."""

  def step(variables: Any, batch: Any) -> Any:
    parts = microbatches(batch)
    weights = jnp.full(PARTS, parts["x"][0].size)
    _, grads = fp8.accumulate_gradients(loss_fn, variables, parts, weights=weights)
    return update(variables, grads)[0]

  return jax.jit(step), VARIABLES


@loop("averaged")
def ema_over_state() -> Any:
  """Keeps a moving average of all variables."""

  @jax.jit
  def step(state, batch):
    new, _ = update(state["variables"], fp8.grad(loss_fn)(state["variables"], batch))
    ema = jax.tree.map(lambda e, n: 0.99 * e + 0.01 * n, state["ema"], new)
    return {"variables": new, "ema": ema}

  return step, {"variables": VARIABLES, "ema": VARIABLES}


@loop("averaged", slow=True)
def lookahead_over_state() -> Any:
  """Trains with averaged state."""

  @jax.jit
  def step(variables, batch):
    new, _ = update(variables, fp8.grad(loss_fn)(variables, batch))
    return optax.incremental_update(new, variables, 0.5)

  return step, VARIABLES


@loop("kept")
def old_state_over_new() -> Any:
  """Merges old state over new state."""

  @jax.jit
  def step(state, batch):
    new = state.apply_gradients(grads=fp8.grad(loss_fn)(state.params, batch))
    return state.replace(step=new.step, params={**new.params, OWG: state.params[OWG]})

  return step, our_train_state()


@loop("dropped")
def state_dropped() -> Any:
  @jax.jit
  def step(state, batch):
    grads = fp8.grad(loss_fn)(state.params, batch)
    new, _ = update(state.params, grads)
    return state.replace(step=state.step + 1, params={"params": new["params"]}), {"loss": 0.0}

  return step, our_train_state()


@loop("decayed")
def weight_decay() -> Any:
  """Adds weight decay to the gradients of all variables."""
  decay = optax.add_decayed_weights(1e-2)

  @jax.jit
  def step(state, batch):
    grads = fp8.grad(loss_fn)(state.params, batch)
    grads, _ = decay.update(grads, decay.init(state.params), state.params)
    return state.apply_gradients(grads=grads)

  return step, our_train_state()


@loop("decayed", slow=True)
def weight_decay_after_the_update() -> Any:
  @jax.jit
  def step(variables, batch):
    new, _ = update(variables, fp8.grad(loss_fn)(variables, batch))
    return jax.tree.map(lambda x: x * (1 - 1e-4), new)

  return step, VARIABLES


@loop("clipped")
def global_norm_clipping() -> Any:
  clip = optax.clip_by_global_norm(1.0)

  @jax.jit
  def step(state, batch):
    grads = fp8.grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads=clip.update(grads, clip.init(grads))[0])

  return step, our_train_state()


@loop("clipped", slow=True)
def clipping_of_values() -> Any:
  clip = optax.clip(1.0)

  @jax.jit
  def step(state, batch):
    grads = fp8.grad(loss_fn)(state.params, batch)
    return state.apply_gradients(grads=clip.update(grads, clip.init(grads))[0])

  return step, our_train_state()


@loop("psum")
def psum_under_shard_map() -> Any:
  return _inside_shard_map(lambda grads: jax.lax.psum(grads, "data"))


@loop("psum", slow=True)
def flax_layers_in_shard_map() -> Any:
  """Differentiates outside a shard_map, which is correct except for Flax's layers."""

  @jax.jit
  def step(variables, batch):
    def loss(variables):
      local = lambda v, b: jax.lax.pmean(loss_fn(v, b, FLAX_MODEL), "data")
      return jax.shard_map(
        local, mesh=data_mesh(), in_specs=(P(), P("data")), out_specs=P(), check_vma=False
      )(variables, batch)

    return update(variables, jax.grad(loss)(variables))[0]

  return step, FLAX_VARIABLES


@loop("mean")
def pmean_under_shard_map() -> Any:
  return _inside_shard_map(lambda grads: jax.lax.pmean(grads, "data"))


@loop("mean", slow=True)
def mean_over_microbatches() -> Any:
  @jax.jit
  def step(state, batch):
    grads = jax.tree.map(lambda *g: sum(g) / PARTS, *grads_of_parts(state.params, batch))
    return state.apply_gradients(grads=grads)

  return step, our_train_state()


@loop("partial")
def last_microbatch_wins() -> Any:
  @jax.jit
  def step(state, batch):
    parts = grads_of_parts(state.params, batch)
    params = jax.tree.map(lambda *g: sum(g) / PARTS, *(part["params"] for part in parts))
    return state.apply_gradients(grads={"params": params, OWG: parts[-1][OWG]})

  return step, our_train_state()


@loop("optimizer")
def state_in_adam() -> Any:
  """Overwrites state correctly, but Adam also keeps moments of it."""
  tx = optax.adam(1e-2)

  @jax.jit
  def step(state, batch):
    variables, opt_state = state
    grads = fp8.grad(loss_fn)(variables, batch)
    updates, opt_state = tx.update(grads, opt_state, variables)
    new = optax.apply_updates(variables, updates)
    return {**new, OWG: grads[OWG]}, opt_state

  return step, (VARIABLES, tx.init(VARIABLES))


@loop("optimizer", "added", slow=True)
def state_as_parameters() -> Any:
  """Passes all variables to the optimizer."""
  tx = optax.adamw(1e-2)

  @jax.jit
  def step(state, batch):
    variables, opt_state = state
    updates, opt_state = tx.update(fp8.grad(loss_fn)(variables, batch), opt_state, variables)
    return optax.apply_updates(variables, updates), opt_state

  return step, (VARIABLES, tx.init(VARIABLES))


@loop("added", slow=True)
def sgd_on_state() -> Any:
  @jax.jit
  def step(variables, batch):
    grads = fp8.grad(loss_fn)(variables, batch)
    return jax.tree.map(lambda v, g: v - 0.1 * g, variables, grads)

  return step, VARIABLES


@loop("reset", slow=True)
def fresh_state_every_step() -> Any:
  @jax.jit
  def step(variables, batch):
    new, _ = update(variables, fp8.grad(loss_fn)(variables, batch))
    return {**new, OWG: VARIABLES[OWG]}

  return step, VARIABLES


@loop("rounded", slow=True)
def gradients_cast_to_bfloat16() -> Any:
  @jax.jit
  def step(state, batch):
    grads = fp8.grad(loss_fn)(state.params, batch)
    grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16).astype(jnp.float32), grads)
    return state.apply_gradients(grads=grads)

  return step, our_train_state()


@loop("summed")
def sum_of_histories_of_one_slot() -> Any:
  """Sums histories of one slot, where a factor of two looks like a margin of one."""
  model, variables = short_model()

  @jax.jit
  def step(variables, batch):
    split = microbatches(batch)
    parts = [jax.tree.map(lambda x, i=i: x[i], split) for i in range(PARTS)]
    grads = [fp8.grad(loss_fn)(variables, part, model) for part in parts]
    return update(variables, jax.tree.map(lambda *g: sum(g), *grads))[0]

  return step, variables


@loop("averaged", slow=True)
def average_of_histories_of_one_slot() -> Any:
  model, variables = short_model()

  @jax.jit
  def step(variables, batch):
    new, _ = update(variables, fp8.grad(loss_fn)(variables, batch, model))
    return optax.incremental_update(new, variables, 0.5)

  return step, variables


NAMED = {loop.name: loop for loop in LOOPS}
