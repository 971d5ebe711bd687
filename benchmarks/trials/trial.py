"""One trial: an arm, trained once from a seed, with held-out losses at gates.

The record of a trial has losses and nothing of the machine, so equal seeds give equal files.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import flax_fp8 as fp8
from harness.models import Decoder
from lm.config import TrainConfig, UsageError
from lm.model import Block
from lm.step import mean_loss, optimizer, perturb
from lm.text import Corpus
from trials.arms import GATES, Arm

Record: TypeAlias = dict[str, Any]
Carry: TypeAlias = tuple[Any, Any]  # variables, optimizer state
SPIKE, EVERY = 4096.0, 8


def plain_model(config: TrainConfig, arm: Arm | None = None) -> nn.Module:
  """The model of ``train_lm.py``, with blocks that are not stacked, so each has a path."""
  return Decoder(config.shape, Block, (config.shape, arm and arm.dot_general_cls), scan=False)


def make_model(config: TrainConfig, arm: Arm) -> nn.Module:
  plain = plain_model(config, arm)
  return fp8.fp8_linear_layers(plain, arm.config) if arm.config else plain


@functools.cache
def initializer(config: TrainConfig, arm: Arm) -> Callable[[jax.Array], Carry]:
  """Returns a jitted function from a key to the variables and the optimizer state of step 0."""
  model, tx = make_model(config, arm), optimizer(config)

  @jax.jit
  def create(key: jax.Array) -> Carry:
    variables = model.init(key, jnp.zeros((1, config.seq_len), jnp.int32))
    if arm.perturbed:
      changed = perturb(variables["params"], arm.perturbed, jax.random.fold_in(key, 1))
      variables = {**variables, "params": changed}
    return variables, fp8.TrainState.create(apply_fn=model.apply, params=variables, tx=tx).opt_state

  return create


def spike(step: int | jax.Array, key: jax.Array) -> jax.Array:
  """The factor of a step's loss: large for one step in ``EVERY``, at random."""
  return jnp.where(jax.random.randint(jax.random.fold_in(key, step), (), 0, EVERY), 1.0, SPIKE)


@functools.cache
def stretch(config: TrainConfig, arm: Arm, *, in_fp8: bool) -> Callable[..., Any]:
  """Returns the jitted steps of a gate.

  They take the carry, the number of the first step, windows, and the key of the seed. They return
  the new carry and the losses.
  """
  model, tx = (make_model(config, arm) if in_fp8 else plain_model(config)), optimizer(config)
  # flax.linen.fp8_ops computes with its state, which fp32_max_grad does not allow.
  differentiate = fp8.value_and_grad if arm.config else jax.value_and_grad

  def step(key: jax.Array, state: fp8.TrainState, windows: jax.Array) -> Any:
    rngs = {"sr_rng": jax.random.fold_in(key, state.step)}
    apply_fn = functools.partial(model.apply, rngs=rngs)
    factor = spike(state.step, key) if arm.spikes else 1.0
    loss_fn = lambda variables: factor * mean_loss(apply_fn, variables, windows)
    loss, grads = differentiate(loss_fn)(state.params)
    new = state.apply_gradients(grads=grads)
    if not arm.keep_state:
      new = new.replace(params={**state.params, "params": new.params["params"]})
    return new, loss / factor

  @functools.partial(jax.jit, donate_argnums=0)
  def run(carry: Carry, first: jax.Array, windows: jax.Array, key: jax.Array) -> Any:
    given, opt_state = carry
    variables = given if in_fp8 else {"params": given["params"]}
    state = fp8.TrainState.create(apply_fn=model.apply, params=variables, tx=tx)
    state = state.replace(step=first, opt_state=opt_state)
    state, losses = jax.lax.scan(functools.partial(step, key), state, windows)
    return ({**given, **state.params}, state.opt_state), losses

  return run


@functools.cache
def loss_of(config: TrainConfig, arm: Arm | None) -> Callable[..., jax.Array]:
  """Returns the jitted mean loss of all batches; that of the BF16 model without an arm."""
  model = make_model(config, arm) if arm else plain_model(config)
  key = jax.random.key(0)

  def mean(variables: Any, batches: jax.Array) -> jax.Array:
    given = variables if arm else {"params": variables["params"]}
    loss = functools.partial(mean_loss, functools.partial(model.apply, rngs={"sr_rng": key}), given)
    return jax.lax.map(loss, batches).mean()

  return jax.jit(mean)


def stretches(config: TrainConfig, corpus: Corpus) -> Iterator[np.ndarray]:
  """The batches of each gate: uint8 ``[steps / GATES, batch_size, seq_len + 1]``."""
  each, left = divmod(config.steps, GATES)
  if left:
    raise UsageError(f"--steps: must be a multiple of {GATES}; got {config.steps}.")
  for gate in range(GATES):
    yield np.stack([corpus.batch(config, gate * each + step) for step in range(each)])


def run_trial(config: TrainConfig, arm: Arm, corpus: Corpus) -> Record:
  """Trains one arm from ``config.seed``; returns its losses."""
  # Seeds and floors share compiled programs, which depend on neither.
  same = dataclasses.replace(config, seed=0, learning_rate=config.learning_rate * arm.learning_rate)
  steps_arm = dataclasses.replace(arm, name="", base="", perturbed=0.0)
  key, each = jax.random.key(config.seed), config.steps // GATES
  carry = initializer(same, arm)(key)
  held_out = jnp.asarray(np.stack(corpus.validation_batches(config)))
  training: list[float] = []
  gates: list[float] = []
  for gate, windows in enumerate(stretches(config, corpus)):
    is_fp8 = gate in arm.gates
    run = stretch(same, steps_arm, in_fp8=is_fp8)
    carry, losses = run(carry, jnp.int32(gate * each), windows, key)
    training += losses.tolist()
    gates.append(float(loss_of(same, steps_arm if is_fp8 else None)(carry[0], held_out)))
  return {
    "arm": arm.name,
    "seed": config.seed,
    "training": training,
    "held_out": gates,
    "held_out_in_bf16": float(loss_of(same, None)(carry[0], held_out)),
  }
