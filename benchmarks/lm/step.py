"""One optimizer step: the same loss, optimizer and update for every run."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import flax_fp8 as fp8
from lm.config import TrainConfig
from lm.devices import Devices
from lm.model import Transformer, fuse_params
from lm.runs import CONVERTED, FLOAT16, FLOOR, FUSED, Run, has, recipe_of

# Finite steps before the loss scale doubles: few, to see it happen in a short run.
GROWTH_INTERVAL = 200
FP8_SIZED = 0.026  # the root mean square of E4M3's relative rounding error


class ScaledTrainState(fp8.TrainState):
  """The training state of a float16 run; ``dynamic_scale`` multiplies the loss."""

  dynamic_scale: fp8.DynamicScale


def perturb(params: Any, size: float, key: jax.Array) -> Any:
  """Makes each parameter larger or smaller by the relative ``size``, at random."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(key, len(leaves))
  change = lambda x, key: x * (1.0 + size * jax.random.rademacher(key, x.shape, x.dtype))
  return tree.unflatten([change(*pair) for pair in zip(leaves, keys, strict=True)])


def is_kernel(tree: Any) -> Any:
  """Marks the leaves named ``kernel``, which weight decay applies to."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: getattr(path[-1], "key", None) == "kernel", tree
  )


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
  """AdamW with a warm-up and a cosine, on gradients clipped by their global norm."""
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, config.learning_rate, config.steps // 10, config.steps, 0.0
  )
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(schedule, b2=0.95, weight_decay=config.weight_decay, mask=is_kernel),
  )


def make_model(config: TrainConfig, run: Run) -> nn.Module:
  """Builds the model. Runs differ in ``dot_general_cls``, or in who sets it."""
  recipe, dtype = recipe_of(run), jnp.float16 if has(run, FLOAT16) else jnp.bfloat16
  if recipe is None or has(run, CONVERTED):
    plain = Transformer(config.shape, dtype=dtype)
    return fp8.fp8_linear_layers(plain, fp8.Fp8Config(recipe=recipe)) if recipe else plain
  fused = recipe if has(run, FUSED) else None
  return Transformer(config.shape, recipe.dot_general_cls, fused, dtype)


def initializer(config: TrainConfig, run: Run) -> Callable[[jax.Array], fp8.TrainState]:
  """Returns a jitted function that makes the training state from a random key.

  A fused run starts from the parameters of the separate layers.
  """
  recipe, model, tx = recipe_of(run), make_model(config, run), optimizer(config)

  @jax.jit
  def create(key: jax.Array) -> fp8.TrainState:
    tokens = jnp.zeros((1, config.seq_len), jnp.int32)
    variables = model.init(key, tokens)
    if recipe is not None and has(run, FUSED):
      separate = Transformer(config.shape).init(key, tokens)["params"]
      variables = {**variables, "params": fuse_params(separate, config.shape, recipe)}
    if run == FLOOR:
      variables = perturb(variables, FP8_SIZED, jax.random.fold_in(key, 1))
    made: dict[str, Any] = {"apply_fn": model.apply, "params": variables, "tx": tx}
    if has(run, FLOAT16):
      scale = fp8.DynamicScale(growth_interval=GROWTH_INTERVAL)
      state = ScaledTrainState.create(**made, dynamic_scale=scale, skip_nonfinite=True)
    else:
      state = fp8.TrainState.create(**made)
    return state.replace(step=jnp.zeros((), jnp.int32))

  return create


def create_state(config: TrainConfig, run: Run, devices: Devices | None = None) -> fp8.TrainState:
  """Makes the training state, replicated on ``devices`` if there are any."""
  create, key = initializer(config, run), jax.random.key(config.seed)
  return devices.create(create, key) if devices else create(key)


def step_shapes(config: TrainConfig, run: Run) -> tuple[fp8.TrainState, jax.ShapeDtypeStruct]:
  """The arguments of ``train_step`` as shapes: no array of the model's size is made."""
  state = jax.eval_shape(initializer(config, run), jax.random.key(config.seed))
  return state, jax.ShapeDtypeStruct((config.batch_size, config.seq_len + 1), jnp.uint8)


def mean_loss(apply_fn: Callable[..., Any], variables: Any, windows: jax.Array) -> jax.Array:
  """Mean cross entropy, nats per byte, of ``[B, T + 1]`` sequences."""
  windows = windows.astype(jnp.int32)
  logits = apply_fn(variables, windows[:, :-1])
  return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def train_step(state: fp8.TrainState, windows: jax.Array) -> tuple[fp8.TrainState, jax.Array]:
  """Takes one step. The gradient of an FP8 state variable is its new value."""
  loss_fn = functools.partial(mean_loss, state.apply_fn, windows=windows)
  if isinstance(state, ScaledTrainState):
    scale, _, loss, grads = state.dynamic_scale.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads, dynamic_scale=scale), loss
  loss, grads = fp8.value_and_grad(loss_fn)(state.params)
  return state.apply_gradients(grads=grads), loss


# Each call donates, and so overwrites, its state.
jitted_step = jax.jit(train_step, donate_argnums=0)
