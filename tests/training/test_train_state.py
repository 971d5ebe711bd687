"""The swap-in ``TrainState`` against Flax's, and what it must not touch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training import train_state as reference

import flax_fp8 as fp8
from tests.transformations import X as BATCHES

OWG = fp8.OVERWRITE_WITH_GRADIENT
X = jnp.asarray(BATCHES[0])
CLS = fp8.DelayedScaling(amax_history_len=4).dot_general_cls


class Model(nn.Module):
  """An FP8 layer, a batch norm, and an ordinary layer."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(8, dot_general_cls=CLS)(x)
    x = nn.BatchNorm(use_running_average=not train)(x)
    return nn.Dense(4)(x)


MODEL = Model()
VARIABLES = MODEL.init(jax.random.key(0), X)
TX = optax.chain(
  optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1), optax.ema(0.9)
)


def create(cls=fp8.TrainState, params=VARIABLES, **fields):
  return cls.create(apply_fn=MODEL.apply, params=params, tx=TX, **fields)


def step(state, differentiate=fp8.grad):
  loss = lambda variables: jnp.sum(jnp.sin(state.apply_fn(variables, X)))
  return state.apply_gradients(grads=differentiate(loss)(state.params))


def equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_parameters_follow_flax_exactly():
  """Parameters and optimiser state are those that Flax gets from the parameters alone."""
  ours = create()
  theirs = reference.TrainState.create(apply_fn=None, params=VARIABLES["params"], tx=TX)
  for _ in range(3):
    grads = fp8.grad(lambda v: jnp.sum(jnp.sin(MODEL.apply(v, X))))(ours.params)
    ours = ours.apply_gradients(grads=grads)
    theirs = theirs.apply_gradients(grads=grads["params"])
    equal(ours.params[OWG], grads[OWG])
  equal(ours.params["params"], theirs.params)
  equal(ours.opt_state, theirs.opt_state)
  assert ours.step == 3


def test_the_optimiser_never_sees_state():
  state = create()
  names = [
    jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
  ]
  assert not any("scale'" in n or "amax" in n for n in names if "BatchNorm" not in n)
  equal(state.opt_state, TX.init(VARIABLES["params"]))


def test_other_collections_stay():
  state = step(create())
  equal(state.params["batch_stats"], VARIABLES["batch_stats"])


def test_other_collections_need_no_gradient():
  grads = fp8.grad(lambda v: jnp.sum(MODEL.apply(v, X)))(VARIABLES)
  del grads["batch_stats"]
  equal(create().apply_gradients(grads=grads).params["batch_stats"], VARIABLES["batch_stats"])


def test_bare_parameters_work_as_in_flax():
  params = nn.Dense(4).init(jax.random.key(0), X)["params"]
  grads = jax.tree.map(jnp.ones_like, params)
  ours = create(params=params).apply_gradients(grads=grads)
  theirs = create(reference.TrainState, params=params).apply_gradients(grads=grads)
  equal(ours.params, theirs.params)
  equal(ours.opt_state, theirs.opt_state)


def test_variables_without_state():
  variables = {"params": VARIABLES["params"], "batch_stats": VARIABLES["batch_stats"]}
  state = create(params=variables)
  new = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, variables))
  equal(jax.tree.map(jnp.shape, new.params), jax.tree.map(jnp.shape, variables))
  assert OWG not in new.params


@pytest.mark.parametrize("differentiate", [fp8.grad, jax.grad], ids=["fp8.grad", "jax.grad"])
def test_jitted_training_moves_the_state(differentiate):
  state = create()
  train_step = jax.jit(lambda state: step(state, differentiate))
  for _ in range(6):
    state = train_step(state)
  dot = state.params[OWG]["Dense_0"]["Fp8DotGeneral_0"]
  amax = float(jnp.abs(X).max())
  np.testing.assert_array_equal(dot["input_amax_history"], np.full(4, amax, np.float32))
  assert float(dot["input_scale"][0]) == pytest.approx(amax / 448, rel=1e-6)


def test_apply_fn_casts_and_compares_by_function():
  state = create()
  seen = {}

  def spy(variables, x):
    seen["dtypes"] = {str(leaf.dtype) for leaf in jax.tree.leaves(variables[OWG])}
    return x

  fp8.TrainState.create(apply_fn=spy, params=VARIABLES, tx=TX).apply_fn(VARIABLES, X)
  assert seen["dtypes"] == {"fp32_max_grad"}
  assert state.apply_fn == create().apply_fn
  assert jax.tree.structure(state) == jax.tree.structure(create())


def test_evaluation_through_apply_fn():
  equal(create().apply_fn(VARIABLES, X), MODEL.apply(VARIABLES, X))


def test_updating_batch_statistics():
  """The usual pattern: mutable statistics come back beside the loss, and go in by ``replace``."""
  state = create()

  def loss(variables):
    out, updated = state.apply_fn(variables, X, train=True, mutable=["batch_stats"])
    return jnp.sum(jnp.sin(out)), updated

  (_, updated), grads = fp8.value_and_grad(loss, has_aux=True)(state.params)
  state = state.apply_gradients(grads=grads)
  state = state.replace(params={**state.params, **updated})
  assert not np.array_equal(
    state.params["batch_stats"]["BatchNorm_0"]["mean"],
    VARIABLES["batch_stats"]["BatchNorm_0"]["mean"],
  )


def test_extra_fields():
  class State(fp8.TrainState):
    rng: jax.Array | None = None

  state = create(State, rng=jax.random.key(1))
  grads = jax.tree.map(jnp.ones_like, VARIABLES)
  new = state.apply_gradients(grads=grads, rng=jax.random.key(2))
  assert isinstance(new, State)
  assert new.rng is not state.rng


def test_state_dict_round_trip():
  state = step(create())
  restored = serialization.from_state_dict(create(), serialization.to_state_dict(state))
  equal(restored.params, state.params)
  equal(restored.opt_state, state.opt_state)


class TestRefusals:
  grads = jax.tree.map(jnp.ones_like, VARIABLES)

  @pytest.mark.parametrize("collection", ["params", OWG])
  def test_missing_collection(self, collection):
    grads = {key: value for key, value in self.grads.items() if key != collection}
    with pytest.raises(ValueError, match=rf"apply_gradients: .*the collection '{collection}'.*got"):
      create().apply_gradients(grads=grads)

  @pytest.mark.parametrize("collection", ["params", OWG])
  def test_missing_leaf(self, collection):
    inner = {key: value for key, value in self.grads[collection].items() if key != "Dense_0"}
    with pytest.raises(
      ValueError, match=rf"apply_gradients: .*structure of params.*'{collection}'"
    ):
      create().apply_gradients(grads={**self.grads, collection: inner})
