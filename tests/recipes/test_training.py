"""Every recipe with ``TrainState``, saved and restored."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization

import flax_fp8 as fp8
from tests.recipes import cases
from tests.recipes.cases import RECIPES, STATELESS, normal

OWG = fp8.OVERWRITE_WITH_GRADIENT
X = jnp.asarray(normal(0, 16, 24))
Y = jnp.asarray(np.sin(X @ normal(1, 24, 4)))
TX = optax.adam(0.02)
one_of_each_kind = pytest.mark.parametrize("name", ["delayed", "mxfp8"])


def make(recipe):
  cls = recipe.dot_general_cls
  model = nn.Sequential(
    [nn.Dense(40, dot_general_cls=cls), nn.tanh, nn.Dense(4, dot_general_cls=cls)]
  )
  variables = jax.jit(model.init)(jax.random.key(0), X)
  return fp8.TrainState.create(apply_fn=model.apply, params=variables, tx=TX)


@functools.cache
def trained(name):
  """Runs some steps. Returns state, losses and the compiled step."""

  @cases.quickly
  def step(state):
    rngs = {"sr_rng": jax.random.fold_in(jax.random.key(1), state.step)}
    loss = lambda v: jnp.mean((state.apply_fn(v, X, rngs=rngs) - Y) ** 2)
    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value

  state, losses = make(RECIPES[name]), []
  for _ in range(40):
    state, loss = step(state)
    losses.append(float(loss))
  return state, losses, step


@pytest.mark.slow
@pytest.mark.parametrize("name", [*cases.ONE_OF_EACH_CLASS, "stochastic"])
def test_trains(name):
  """The loss falls tenfold. A recipe without state makes no variables."""
  state, losses, _ = trained(name)
  assert losses[-1] < losses[0] / 10
  assert set(state.params) == ({"params"} if name in STATELESS else {"params", OWG})
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))


@one_of_each_kind
def test_serialization(name):
  state, _, step = trained(name)
  restored = serialization.from_bytes(make(RECIPES[name]), serialization.to_bytes(state))
  cases.equal(jax.tree.leaves(restored), jax.tree.leaves(state))
  cases.equal(jax.tree.leaves(step(restored)), jax.tree.leaves(step(state)))


@one_of_each_kind
def test_orbax(name, tmp_path):
  """After saving and restoring, training continues with the same values."""
  state, _, step = trained(name)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "state", make(RECIPES[name]))
  cases.equal(jax.tree.leaves(restored), jax.tree.leaves(state))
  cases.equal(jax.tree.leaves(step(restored)), jax.tree.leaves(step(state)))


def test_another_recipe_takes_over_the_state_that_fits():
  """State with the same name and shape is kept. Missing state is initialized."""
  state, _, _ = trained("delayed")
  old = state.params
  model = nn.Sequential(
    [
      nn.Dense(width, dot_general_cls=RECIPES["delayed, interval"].dot_general_cls)
      for width in (40, 4)
    ]
  )
  params = {"layers_0": old["params"]["layers_0"], "layers_1": old["params"]["layers_2"]}
  overwrite = {"layers_0": old[OWG]["layers_0"], "layers_1": old[OWG]["layers_2"]}
  new = fp8.upgrade_variables(model, {"params": params, OWG: overwrite}, X)
  for layer, leaves in overwrite.items():
    got = dict(new[OWG][layer]["Fp8DotGeneral_0"])
    for role in ("input", "kernel", "output_grad"):
      cases.equal(got.pop(f"{role}_steps_to_update"), jnp.zeros(1))
    cases.equal(got, dict(leaves["Fp8DotGeneral_0"]))
  stateless = fp8.upgrade_variables(model, {"params": params}, X)
  cases.equal(stateless["params"], params)
  assert set(stateless[OWG]) == set(overwrite)
