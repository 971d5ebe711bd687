"""Functions that return variables keep the type of every mapping in them."""

import flax.linen as nn
import flax.linen.fp8_ops as reference
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import flax_fp8 as fp8
from flax_fp8.linen.containers import plain
from flax_fp8.training.state import merge
from tests.containers import CONTAINERS

OWG = fp8.OVERWRITE_WITH_GRADIENT
X = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)
MODEL = nn.Sequential([nn.Dense(4, dot_general_cls=fp8.Fp8DotGeneral), nn.Dense(4)])
PLAIN = nn.Sequential([nn.Dense(4), nn.Dense(4)])
VARIABLES = jax.jit(MODEL.init)(jax.random.key(0), X)
QUICK = ("FrozenDict", "OrderedDict_in_params")
LINEN_REFUSES = ("Tagged", "Keyless", "Tagged_in_state")


def parametrized(names):
  marks = lambda name: () if name in QUICK else (pytest.mark.slow, pytest.mark.exhaustive)
  values = [pytest.param(CONTAINERS[name], id=name, marks=marks(name)) for name in names]
  return pytest.mark.parametrize("wrap", values)


containers = parametrized(CONTAINERS)


def loss_fn(variables, x=X):
  # Linen takes dict and FrozenDict only, so users convert other mappings to one of these.
  return jnp.mean(MODEL.apply(plain(variables), x) ** 2)


def equal(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  jax.tree.map(np.testing.assert_array_equal, one, other)


def by_hand(variables, x=X):
  overwrite, rest = fp8.partition_for_grad_overwrite(fp8.grad(loss_fn)(variables, x))
  own = fp8.partition_for_grad_overwrite(variables)[1]
  updates, _ = optax.sgd(0.1).update(rest, optax.sgd(0.1).init(own), own)
  return fp8.apply_updates(variables, updates, overwrite)


def by_train_state(variables, x=X, **kwargs):
  state = fp8.TrainState.create(
    apply_fn=MODEL.apply, params=variables, tx=optax.sgd(0.1, momentum=0.9), **kwargs
  )
  return state.apply_gradients(grads=fp8.grad(loss_fn)(state.params, x)).params


FUNCTIONS = {
  "as_max_grad": fp8.as_max_grad,
  "grad": fp8.grad(loss_fn),
  "value_and_grad": lambda v: fp8.value_and_grad(loss_fn)(v)[1],
  "accumulate_gradients": lambda v: fp8.accumulate_gradients(loss_fn, v, X[None])[1],
  "apply_updates": by_hand,
  "apply_gradients": by_train_state,
  "skip_nonfinite": lambda v: by_train_state(v, skip_nonfinite=True),
  "unscale": lambda v: fp8.DynamicScale().unscale(fp8.grad(loss_fn)(v))[2],
  "calibrate": lambda v: fp8.calibrate(MODEL, v, [X], progress=False),
  "calibrate_with_loss": lambda v: fp8.calibrate(MODEL, v, [X], loss_fn, progress=False),
  "upgrade_variables": lambda v: fp8.upgrade_variables(MODEL, v, X),
  "drop_metrics": fp8.drop_metrics,
}


@containers
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_function(function, wrap):
  before = wrap(VARIABLES)
  after = function(before)
  assert jax.tree.structure(after) == jax.tree.structure(before)
  if function is not fp8.as_max_grad:
    equal(jax.tree.leaves(wrap(function(VARIABLES))), jax.tree.leaves(after))


@containers
def test_partition(wrap):
  tree = wrap(VARIABLES)
  overwrite, rest = fp8.partition_for_grad_overwrite(tree)
  assert type(overwrite) is type(rest) is type(tree)
  assert jax.tree.structure(overwrite[OWG]) == jax.tree.structure(tree[OWG])
  assert jax.tree.structure(rest["params"]) == jax.tree.structure(tree["params"])
  equal(fp8.partition_for_grad_overwrite(merge(rest, overwrite))[1]["params"], rest["params"])


@containers
def test_collections_come_and_go(wrap):
  tree = wrap(VARIABLES)
  without = fp8.downgrade_variables(tree)
  assert type(without) is type(tree)
  equal(without["params"], tree["params"])
  assert type(fp8.upgrade_variables(MODEL, without, X)) is type(tree)
  with_metrics = fp8.add_metrics(MODEL, tree, X)
  assert type(with_metrics) is type(tree)
  equal(with_metrics["params"], tree["params"])
  assert type(with_metrics[OWG]) is type(tree[OWG])
  assert type(fp8.drop_metrics(with_metrics)[OWG]) is type(tree[OWG])


@containers
def test_from_flax_fp8_ops(wrap):
  before = nn.Dense(4, dot_general_cls=reference.Fp8DirectDotGeneralOp)
  tree = wrap(before.init(jax.random.key(0), X))
  made = fp8.from_flax_fp8_ops(tree)
  assert type(made) is type(tree)
  assert type(made[OWG]["Fp8DotGeneral_0"]) is type(tree[OWG]["Fp8DirectDotGeneralOp_0"])
  equal(made["params"], tree["params"])


@containers
def test_scan_over_steps(wrap):
  scanned = lambda variables, step: lax.scan(lambda v, x: (step(v, x), None), variables, X[None])[0]
  for step in (by_hand, by_train_state):
    before = wrap(VARIABLES)
    after = jax.jit(scanned, static_argnums=1)(before, step)
    assert jax.tree.structure(after) == jax.tree.structure(before)


@containers
def test_a_mapping_of_models(wrap):
  tree = {"one": wrap(VARIABLES), "other": wrap(VARIABLES)}
  loss = lambda tree: loss_fn(tree["one"]) + loss_fn(tree["other"])
  state = fp8.TrainState.create(apply_fn=MODEL.apply, params=tree, tx=optax.adam(0.1))
  new = state.apply_gradients(grads=fp8.grad(loss)(tree)).params
  assert jax.tree.structure(new) == jax.tree.structure(tree)


@containers
def test_freezing_takes_them(wrap):
  served, frozen = fp8.freeze_for_inference(MODEL, wrap(VARIABLES), X)
  expected = MODEL.apply(VARIABLES, X)
  np.testing.assert_array_equal(served.apply(frozen, X), expected)
  assert type(frozen) is type(wrap(VARIABLES))
  assert type(frozen["params"]) is type(wrap(VARIABLES)["params"])


@parametrized([name for name in CONTAINERS if name not in LINEN_REFUSES])
def test_converted_models_take_what_linen_takes(wrap):
  converted = fp8.fp8_linear_layers(PLAIN, fp8.Fp8Config(multiple_of=1))
  tree = converted.init(jax.random.key(0), X)
  np.testing.assert_array_equal(converted.apply(wrap(tree), X), converted.apply(tree, X))
  _, changed = converted.apply(wrap(tree), X, mutable=["cache"])
  _, theirs = PLAIN.apply(wrap(VARIABLES), X, mutable=["cache"])
  assert type(changed) is type(theirs)


@containers
def test_statistics_and_checks_take_them(wrap):
  assert str(fp8.stats(wrap(VARIABLES))) == str(fp8.stats(VARIABLES))
