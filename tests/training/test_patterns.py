"""FP8 state stays correct with averaged parameters and frozen layers.

Expected values come from NumPy and from a run of the plain loop.
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


DECAY = 0.9


@functools.partial(jax.jit, static_argnums=0)
def run(tx):
  """Runs some steps with an average of parameters; returns all states, stacked."""

  def step(carry, _):
    state, ema = carry
    state = state.apply_gradients(grads=fp8.grad(loss_fn)(state.params, BATCH))
    carry = state, optax.incremental_update(state.params["params"], ema, 1 - DECAY)
    return carry, (carry[0].params, carry[1])

  state = our_train_state(tx=tx).replace(step=jnp.int32(0))
  carry = state, jax.tree.map(jnp.zeros_like, VARIABLES["params"])
  return jax.lax.scan(step, carry, None, length=STEPS)[1]


@functools.cache
def plain():
  return jax.device_get(run(optax.adam(1e-2)))


def last(tree):
  return jax.tree.map(lambda leaf: leaf[-1], tree)


class TestAverages:
  """Averages ``params["params"]``, and evaluates the average with the current state."""

  def test_incremental_update(self):
    self.check(last(plain()[1]))

  def test_ema(self):
    average = optax.ema(DECAY, debias=False)
    params, ema_state = None, average.init(VARIABLES["params"])
    for i in range(STEPS):
      now = jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), plain()[0]["params"])
      params, ema_state = average.update(now, ema_state)
    self.check(params)

  def check(self, ema):
    variables = plain()[0]
    for name, layer in variables["params"].items():
      kernel = np.zeros((4, 4))
      for new in np.float64(layer["kernel"]):
        kernel = DECAY * kernel + (1 - DECAY) * new
      np.testing.assert_allclose(ema[name]["kernel"], kernel, rtol=1e-5, atol=1e-6)
    out = MODEL.apply({**last(variables), "params": ema}, BATCH["x"])
    layer = lambda x, name: x @ np.float64(ema[name]["kernel"]) + np.float64(ema[name]["bias"])
    exact = layer(np.tanh(layer(np.float64(BATCH["x"]), "up")), "down")
    # Smaller parameters than the recorded ones do not saturate. The rest is the error of E4M3,
    # 2**-4 of each factor of the two products.
    np.testing.assert_allclose(out, exact, atol=4 * 2.0**-4 * np.abs(exact).max())


FROZEN = {"up": "frozen", "down": "trained"}
IS_FROZEN = {"up": True, "down": False}
TRANSFORMS = {
  "multi_transform": optax.multi_transform(
    {"frozen": optax.set_to_zero(), "trained": optax.adam(1e-2)}, FROZEN
  ),
  "masked": optax.chain(optax.adam(1e-2), optax.masked(optax.set_to_zero(), IS_FROZEN)),
}


class TestFreezing:
  """The kernel of a frozen layer has one amax; its input and output gradient change."""

  @pytest.mark.parametrize("name", TRANSFORMS)
  def test_by_the_optimizer(self, name):
    self.check(run(TRANSFORMS[name])[0])

  def test_by_differentiating_a_part(self):
    """Differentiates some parameters and the whole state."""
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
    variables, frozen = jax.device_get((variables, VARIABLES["params"]["up"]))
    for name, value in frozen.items():
      kept = variables["params"]["up"][name]
      np.testing.assert_array_equal(kept, np.broadcast_to(value, kept.shape))
    assert np.all(np.ptp(variables["params"]["down"]["kernel"], axis=0) > 0)
    states = variables[OWG]["up"]["Fp8DotGeneral_0"]
    # Slot 0 is the newest. The kernel never changes, so its amax is constant.
    kernel = np.abs(frozen["kernel"]).max()
    np.testing.assert_array_equal(states["kernel_amax_history"][:, 0], np.full(STEPS, kernel))
    inputs = np.abs(BATCH["x"]).max()
    np.testing.assert_array_equal(states["input_amax_history"][:, 0], np.full(STEPS, inputs))
    np.testing.assert_allclose(states["input_scale"][1:, 0], inputs / 448, rtol=1e-6)
    grads = states["output_grad_amax_history"]
    assert np.all(np.diff(grads[:, 0]) != 0)
    # Each step makes every older amax one slot older.
    np.testing.assert_array_equal(
      np.roll(grads, -1, axis=1)[1:, :-1], np.roll(grads, -1, 1)[:-1, 1:]
    )
    np.testing.assert_allclose(
      states["output_grad_scale"][1:, 0], grads[:-1].max(axis=1) / 57344, rtol=1e-6
    )
