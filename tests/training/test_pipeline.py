"""FP8 state with a pipeline equals the state without: bubbles do not change it.

Data are multiples of powers of two, as in ``test_algebra.py``. So no sum is rounded, and states are
compared bit for bit.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_fp8 as fp8

OWG = fp8.OVERWRITE_WITH_GRADIENT
RECIPE = fp8.DelayedScaling(amax_history_len=3, power_of_two=True, margin=2)
STAGES, MICROBATCHES, BATCH, WIDTH = 4, 6, 2, 4


class Stage(nn.Module):
  """Two layers with biases, so that the zeros of a bubble would not stay zeros."""

  @nn.compact
  def __call__(self, x):
    for _ in range(2):
      init = {"kernel_init": draw(1), "bias_init": draw(8)}
      x = nn.relu(nn.Dense(WIDTH, dot_general_cls=RECIPE.dot_general_cls, **init)(x))
    return x


def draw(largest):
  """Draws multiples of 1/2 up to ``largest / 2``, so that values stay small."""
  return lambda key, shape, dtype: jax.random.randint(key, shape, 0, largest + 1).astype(dtype) / 2


class Skipped(nn.Module):
  """A stage that returns its input unchanged if there is no microbatch."""

  @nn.compact
  def __call__(self, x, busy):
    return fp8.cond(busy, lambda stage, x: stage(x), lambda _, x: x, Stage(name="stage"), x)


class Pipeline(nn.Module):
  """At turn t, stage s computes microbatch t - s and passes its output to the next stage."""

  @nn.compact
  def __call__(self, microbatches):
    axes = {"params": 0, OWG: 0}
    stages = nn.vmap(Skipped, variable_axes=axes, split_rngs={"params": True})(name="stages")

    def turn(stages, held, turns):
      arriving, t = turns
      microbatch = t - jnp.arange(STAGES)
      busy = (microbatch >= 0) & (microbatch < MICROBATCHES)
      outputs = stages(held.at[0].set(arriving), busy)
      return jnp.roll(outputs, 1, axis=0), outputs[-1]

    scan = nn.scan(turn, variable_broadcast=["params", OWG], split_rngs={"params": False})
    last, held = (jnp.zeros((n, *microbatches.shape[1:])) for n in (STAGES - 1, STAGES))
    turns = (jnp.concatenate([microbatches, last]), jnp.arange(MICROBATCHES + STAGES - 1))
    _, outputs = scan(stages, held, turns)
    return outputs[STAGES - 1 :]


class InOrder(nn.Module):
  """Runs the same stages in sequence, with the same variables."""

  @nn.compact
  def __call__(self, x):
    axes = {"params": 0, OWG: 0}
    step = lambda skipped, x, _: (skipped(x, True), None)
    scan = nn.scan(step, variable_axes=axes, split_rngs={"params": True}, length=STAGES)
    return scan(Skipped(name="stages"), x, None)[0]


random = np.random.default_rng(0)
# Negative inputs give smaller outputs than the biases, which are the outputs of a bubble.
X = random.integers(-3, 0, (MICROBATCHES, BATCH, WIDTH)).astype(np.float32)
X *= np.array([1, 1, 2, 0.5, 1, 0.5], np.float32).reshape(-1, 1, 1)
C = random.integers(-1, 2, X.shape).astype(np.float32) / 2


@pytest.fixture(scope="module")
def variables():
  made = Pipeline().init(jax.random.key(0), X)
  powers = lambda leaf: np.exp2(random.integers(0, 7, leaf.shape)).astype(np.float32)
  return {**made, OWG: jax.tree.map(powers, made[OWG])}


def pipelined(variables):
  return jnp.sum(Pipeline().apply(variables, X) * C)


def in_order(variables):
  loss_fn = lambda v, microbatch: jnp.sum(InOrder().apply(v, microbatch[0]) * microbatch[1])
  return fp8.accumulate_gradients(loss_fn, variables, (X, C), reduction="sum")


@pytest.mark.slow
def test_is_the_model_without_pipeline(variables):
  loss, grads = jax.jit(fp8.value_and_grad(pipelined))(variables)
  want_loss, want = jax.jit(in_order)(variables)
  assert loss == want_loss
  jax.tree.map(np.testing.assert_array_equal, grads, want)
  assert any(map(jnp.any, jax.tree.leaves(grads["params"])))


@pytest.mark.slow
def test_with_each_stage_on_a_device_of_its_own(variables):
  mesh = jax.make_mesh((STAGES,), ("stage",), axis_types=(AxisType.Auto,))
  want = jax.jit(fp8.grad(pipelined))(variables)
  placed = jax.device_put(variables, NamedSharding(mesh, P("stage")))
  grads = jax.jit(fp8.grad(pipelined))(placed)
  jax.tree.map(np.testing.assert_array_equal, grads, want)
  assert {leaf.sharding.spec for leaf in jax.tree.leaves(grads[OWG])} == {P("stage")}
