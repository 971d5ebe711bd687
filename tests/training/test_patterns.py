"""Averages of parameters, and layers that stay as they are: FP8 state goes on as ever.

What is right comes from a run of the plain loop, and from NumPy.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_fp8 as fp8
from tests.training.loops import BATCH, MODEL, OWG, VARIABLES, loss_fn, our_train_state

STEPS = 6


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@functools.partial(jax.jit, static_argnums=0)
def trained(tx, batch):
  """Every state of some steps, stacked; of the train state as it is created by default."""

  def step(state, _):
    new = state.apply_gradients(grads=fp8.grad(loss_fn)(state.params, batch))
    return new, new

  state = our_train_state(tx=tx).replace(step=jnp.int32(0))
  return jax.lax.scan(step, state, None, length=STEPS)[1]


@functools.cache
def plain():
  return jax.device_get(trained(optax.adam(1e-2), BATCH).params)


def last(tree):
  return jax.tree.map(lambda leaf: leaf[-1], tree)


class TestAverages:
  """The average is of ``params["params"]``; it is evaluated with the state of now."""

  DECAY = 0.9

  def truth(self):
    """In float64."""

    def average(steps):
      ema = np.zeros_like(steps[0], np.float64)
      for new in steps:
        ema = self.DECAY * ema + (1 - self.DECAY) * np.float64(new)
      return ema

    return jax.tree.map(average, plain()["params"])

  def test_incremental_update(self):
    """``optax.incremental_update`` in the step, beside the train state."""

    def step(carry, _):
      state, ema = carry
      state = state.apply_gradients(grads=fp8.grad(loss_fn)(state.params, BATCH))
      ema = optax.incremental_update(state.params["params"], ema, 1 - self.DECAY)
      return (state, ema), None

    state = our_train_state(tx=optax.adam(1e-2)).replace(step=jnp.int32(0))
    ema = jax.tree.map(jnp.zeros_like, VARIABLES["params"])
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=STEPS)[0])
    state, ema = run((state, ema))
    self.check(ema, state.params)

  def test_ema(self):
    """``optax.ema`` as an average of parameters."""
    average = optax.ema(self.DECAY, debias=False)
    ema_state = average.init(VARIABLES["params"])
    params = VARIABLES["params"]
    for i in range(STEPS):
      params, ema_state = average.update(
        jax.tree.map(lambda leaf, i=i: leaf[i], plain()["params"]), ema_state
      )
    self.check(params, last(plain()))

  def check(self, ema, variables):
    equal(variables, last(plain()))
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), ema, self.truth()
    )
    averaged = {**variables, "params": ema}
    out = MODEL.apply(averaged, BATCH["x"])
    # The state of now quantises parameters near those that it saw: E4M3's and tanh's errors.
    exact = np.tanh(BATCH["x"] @ ema["up"]["kernel"]) @ ema["down"]["kernel"]
    np.testing.assert_allclose(out, exact, atol=0.1 * np.abs(exact).max())


FROZEN = {"up": "frozen", "down": "trained"}
IS_FROZEN = {"up": True, "down": False}
TRANSFORMS = {
  "multi_transform": optax.multi_transform(
    {"frozen": optax.set_to_zero(), "trained": optax.adam(1e-2)}, FROZEN
  ),
  "masked": optax.chain(optax.adam(1e-2), optax.masked(optax.set_to_zero(), IS_FROZEN)),
}


class TestFreezing:
  """A frozen layer's kernel has one amax; its input and output gradient have those of each step."""

  @pytest.mark.parametrize("name", TRANSFORMS)
  def test_by_the_optimiser(self, name):
    self.check(jax.device_get(trained(TRANSFORMS[name], BATCH).params))

  def test_by_differentiating_a_part(self):
    """Gradients for some parameters and for the whole state."""
    tx = optax.adam(1e-2)

    def step(carry, _):
      variables, opt_state = carry
      frozen = variables["params"]["up"]

      def loss(part):
        params = {"up": frozen, "down": part["params"]["down"]}
        return loss_fn({"params": params, OWG: part[OWG]}, BATCH)

      trained = {"params": {"down": variables["params"]["down"]}, OWG: variables[OWG]}
      overwrite, rest = fp8.partition_for_grad_overwrite(fp8.grad(loss)(trained))
      updates, opt_state = tx.update(rest, opt_state)
      variables = fp8.apply_updates(variables, updates, overwrite)
      return (variables, opt_state), variables

    carry = (VARIABLES, tx.init({"params": {"down": VARIABLES["params"]["down"]}}))
    self.check(jax.jit(lambda c: jax.lax.scan(step, c, None, length=STEPS)[1])(carry))

  def check(self, variables):
    first, down = VARIABLES["params"]["up"], variables["params"]["down"]["kernel"]
    for kept in jax.tree.leaves(
      jax.tree.map(lambda new, old: np.all(new == old), variables["params"]["up"], first)
    ):
      assert kept
    assert np.all(np.ptp(down, axis=0) > 0)
    states = variables[OWG]["up"]["Fp8DotGeneral_0"]
    # Slot 0 is the newest; the kernel's is that of the kernel that never changes.
    kernel = np.abs(first["kernel"]).max()
    np.testing.assert_array_equal(states["kernel_amax_history"][:, 0], np.full(STEPS, kernel))
    inputs = np.abs(BATCH["x"]).max()
    np.testing.assert_array_equal(states["input_amax_history"][:, 0], np.full(STEPS, inputs))
    np.testing.assert_allclose(states["input_scale"][1:, 0], inputs / 448, rtol=1e-6)
    grads = states["output_grad_amax_history"]
    assert np.all(np.diff(grads[:, 0]) != 0)
    # Each step, every amax of before is one slot older.
    np.testing.assert_array_equal(
      np.roll(grads, -1, axis=1)[1:, :-1], np.roll(grads, -1, 1)[:-1, 1:]
    )
    np.testing.assert_allclose(
      states["output_grad_scale"][1:, 0], grads[:-1].max(axis=1) / 57344, rtol=1e-6
    )
