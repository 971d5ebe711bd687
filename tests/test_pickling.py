"""Public objects support ``pickle`` and ``copy.deepcopy``.

JAX's initializers and Optax's transformations are closures, which pickle rejects. Models and states
that hold them are only copied.
"""

import copy
import pickle
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_fp8 as fp8

X = jnp.ones((2, 16))


class Model(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(16)(nn.Dense(32)(x))


class Averaged(fp8.TrainState):
  ema: Any = None


def init(params):
  return optax.adam(1e-2).init(params)


def update(grads, state, params=None):
  return optax.adam(1e-2).update(grads, state, params)


CONVERTED = fp8.fp8_linear_layers(Model(), None, X)
VARIABLES = jax.jit(CONVERTED.init)(jax.random.key(0), X)
TX = optax.GradientTransformation(init, update)


def make_state(cls=fp8.TrainState, skip_nonfinite=True, tx=TX):
  return cls.create(
    apply_fn=CONVERTED.apply, params=VARIABLES, tx=tx, skip_nonfinite=skip_nonfinite
  )


def step(state, batch):
  loss = lambda variables: jnp.mean(state.apply_fn(variables, batch) ** 2)
  value, grads = fp8.value_and_grad(loss)(state.params)
  return state.apply_gradients(grads=grads), value


MADE = {
  "recipes": lambda: {name: fp8.get_recipe(name) for name in fp8.RECIPES},
  "contractions": lambda: [fp8.get_recipe(name).dot_general_cls() for name in fp8.RECIPES],
  "Format": lambda: fp8.DelayedScaling().fp8_format,
  "Fp8Config": lambda: fp8.Fp8Config(exclude=("Dense_0",)),
  "ConversionReport": lambda: fp8.Fp8Config().report(Model(), X),
  "converted": lambda: CONVERTED,
  "frozen": lambda: fp8.freeze_for_inference(CONVERTED, VARIABLES, X)[0],
  "fp32_max_grad": lambda: jax.eval_shape(fp8.as_max_grad, VARIABLES),
  "GpuTarget": lambda: fp8.GpuTarget.named("h100"),
  "DynamicScale": fp8.DynamicScale,
}


COPIES = [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy]


@pytest.mark.parametrize("copied", COPIES, ids=["pickle", "deepcopy"])
@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_equal(made, copied):
  assert copied(original := made()) == original


@pytest.mark.parametrize("copied", COPIES, ids=["pickle", "deepcopy"])
class TestCopies:
  @pytest.mark.slow
  @pytest.mark.exhaustive
  def test_a_report_of_a_step(self, copied):
    report = fp8.check_train_step(step, make_state(), X)
    assert copied(report) == report

  def test_stats(self, copied):
    found = fp8.stats(VARIABLES)
    assert str(copied(found)) == str(found)

  @pytest.mark.slow
  @pytest.mark.exhaustive
  @pytest.mark.parametrize(("cls", "skip_nonfinite"), [(fp8.TrainState, True), (Averaged, False)])
  def test_a_state_trains_on(self, cls, skip_nonfinite, copied):
    state, _ = step(make_state(cls, skip_nonfinite), X)
    got = copied(state)
    assert type(got) is type(state)
    for one, other in ((got, state), (step(got, X)[0], step(state, X)[0])):
      assert len(jax.tree.leaves(one)) == len(jax.tree.leaves(other))
      for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)

  def test_a_frozen_model_computes_the_same(self, copied):
    model, variables = fp8.freeze_for_inference(CONVERTED, VARIABLES, X)
    np.testing.assert_array_equal(copied(model).apply(variables, X), model.apply(variables, X))


def test_a_state_with_an_optax_transformation_is_copied():
  state = make_state(tx=optax.sgd(0.1))
  got = copy.deepcopy(state)
  assert got.tx == state.tx
  assert pickle.loads(pickle.dumps(got.opt_state)) == state.opt_state
