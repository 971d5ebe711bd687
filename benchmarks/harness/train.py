"""The train step of ``step.py``, timed or compiled: Llama 3 8B's widths, with AdamW."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

import flax_fp8 as fp8
from harness.models import Block, Decoder, Mixer
from harness.sizes import LLAMA, TINY_LLAMA
from harness.variants import Variant
from lm.config import ModelShape
from lm.step import mean_loss

WIDTHS = dataclasses.replace(LLAMA, vocabulary=128_256, layers=2)
TINY = dataclasses.replace(TINY_LLAMA, vocabulary=64)


def decoder(
  shape: ModelShape, variant: Variant, mixer: Mixer, *, scan: bool = True, split: bool = False
) -> Decoder:
  """Llama blocks with float32 parameters between an embedding and a head."""
  return Decoder(shape, Block, (shape, variant.in_float32, mixer), scan, split)


def first_state(model: Decoder, length: int, batch: int = 1) -> fp8.TrainState:
  """The state before the first step."""
  variables = model.init(jax.random.key(0), jnp.zeros((batch, length), jnp.int32))
  state = fp8.TrainState.create(apply_fn=model.apply, params=variables, tx=optax.adamw(3e-4))
  return state.replace(step=jnp.zeros((), jnp.int32))


def train_step(
  model: Decoder, variant: Variant, state: fp8.TrainState, windows: jax.Array
) -> fp8.TrainState:
  """One step of a variant."""
  # Flax's own ops do not know the dtype to which ``fp8.grad`` and ``state.apply_fn`` cast.
  grad: Any = jax.grad if variant.flax else fp8.grad
  loss = lambda variables: mean_loss(model.apply, variables, windows)
  return state.apply_gradients(grads=grad(loss)(state.params))
