"""One optimiser step: the same loss, optimiser and update for every run."""

import functools
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import flax_fp8 as fp8
from lm.config import TrainConfig
from lm.convert import convert
from lm.devices import Devices
from lm.model import Transformer, fuse_params
from lm.runs import BF16_AGAIN, Run, is_converted, is_float16, is_fused, recipe_of

# Finite steps before the loss scale doubles: few, so that a short run sees it happen.
GROWTH_INTERVAL = 200


class ScaledTrainState(fp8.TrainState):
  """A training state of float16.

  Attributes:
    dynamic_scale: what multiplies the loss.
  """

  dynamic_scale: fp8.DynamicScale


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
  """AdamW under a warm-up and a cosine, on gradients clipped by their global norm."""
  schedule = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=config.steps // 10,
    decay_steps=config.steps,
    end_value=0.0,
  )
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(schedule, b2=0.95, weight_decay=config.weight_decay, mask=is_kernel),
  )


def is_kernel(tree: Any) -> Any:
  """Marks the leaves named ``kernel``: what weight decay is for."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: getattr(path[-1], "key", None) == "kernel", tree
  )


def make_model(config: TrainConfig, run: Run) -> nn.Module:
  """Builds the model; ``dot_general_cls`` is all that differs between runs, or who sets it."""
  recipe, dtype = recipe_of(run), jnp.float16 if is_float16(run) else jnp.bfloat16
  if recipe is None:
    return Transformer(config.shape, dtype=dtype)
  if is_converted(run):
    return convert(config.shape, recipe, dtype)
  fused = recipe if is_fused(run) else None
  return Transformer(config.shape, recipe.dot_general_cls, fused, dtype)


def initializer(config: TrainConfig, run: Run) -> Callable[[jax.Array], fp8.TrainState]:
  """Builds model and optimiser.

  Where projections are fused, the parameters are those of the separate layers, fused.

  Returns:
    What makes the training state from a random key.
  """
  fused = recipe_of(run) if is_fused(run) else None
  model, tx = make_model(config, run), optimizer(config)

  @jax.jit
  def create(key: jax.Array) -> fp8.TrainState:
    tokens = jnp.zeros((1, config.seq_len), jnp.int32)
    variables = model.init(key, tokens)
    if fused is not None:
      separate = Transformer(config.shape).init(key, tokens)
      variables = {**variables, "params": fuse_params(separate["params"], config.shape, fused)}
    if run == BF16_AGAIN:
      variables = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), variables)
    of: dict[str, Any] = {"apply_fn": model.apply, "params": variables, "tx": tx}
    if is_float16(run):
      scale = fp8.DynamicScale(growth_interval=GROWTH_INTERVAL)
      state = ScaledTrainState.create(**of, dynamic_scale=scale, skip_nonfinite=True)
    else:
      state = fp8.TrainState.create(**of)
    return state.replace(step=jnp.zeros((), jnp.int32))

  return create


def create_state(config: TrainConfig, run: Run, devices: Devices | None = None) -> fp8.TrainState:
  """Makes the training state of the configured seed, on all of ``devices`` where there are any."""
  create, key = initializer(config, run), jax.random.key(config.seed)
  return devices.create(create, key) if devices else create(key)


def step_shapes(config: TrainConfig, run: Run) -> tuple[fp8.TrainState, jax.ShapeDtypeStruct]:
  """The arguments of ``train_step`` without their numbers: no array of the model's size is made."""
  state = jax.eval_shape(initializer(config, run), jax.random.key(config.seed))
  return state, jax.ShapeDtypeStruct((config.batch_size, config.seq_len + 1), jnp.uint8)


def mean_loss(apply_fn: Callable[..., Any], variables: Any, windows: jax.Array) -> jax.Array:
  """Mean cross entropy, nats a byte, of ``[B, T + 1]`` windows."""
  windows = windows.astype(jnp.int32)
  logits = apply_fn(variables, windows[:, :-1])
  return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def train_step(state: fp8.TrainState, windows: jax.Array) -> tuple[fp8.TrainState, jax.Array]:
  """Takes one step; the FP8 state's "gradient" is its next value, written over the old one."""
  loss_fn = functools.partial(mean_loss, state.apply_fn, windows=windows)
  if isinstance(state, ScaledTrainState):
    scale, _, loss, grads = state.dynamic_scale.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads, dynamic_scale=scale), loss
  loss, grads = fp8.value_and_grad(loss_fn)(state.params)
  return state.apply_gradients(grads=grads), loss


# Each call overwrites the state that it is given.
jitted_step = jax.jit(train_step, donate_argnums=0)


def compile_step(state: fp8.TrainState, windows: np.ndarray | jax.Array) -> tuple[Any, float]:
  """Compiles ``train_step`` ahead of time, so that no step pays for it.

  Args:
    state: the training state; each call of the compiled step donates the one it is given.
    windows: a batch, for its shape.

  Returns:
    The compiled step, and the seconds that tracing and compiling took.
  """
  begun = time.perf_counter()
  compiled = jitted_step.lower(state, windows).compile()
  return compiled, time.perf_counter() - begun
