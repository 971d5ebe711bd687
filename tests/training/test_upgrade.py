"""Fresh state for variables that lack it."""

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8

OWG = fp8.OVERWRITE_WITH_GRADIENT
X = jnp.ones((2, 16))


def model(cls):
  return nn.Sequential(
    [nn.Dense(8, dot_general_cls=cls), nn.relu, nn.Dense(4, dot_general_cls=cls)]
  )


FP8 = model(fp8.DelayedScaling(amax_history_len=4).dot_general_cls)
PLAIN = model(None).init(jax.random.key(3), X)


def equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("wrap", [dict, flax.core.freeze], ids=["dict", "FrozenDict"])
def test_adds_what_init_makes_and_keeps_the_rest(wrap):
  variables = {**PLAIN, "batch_stats": {"mean": jnp.ones(3)}}
  new = fp8.upgrade_variables(FP8, wrap(variables), X)
  assert isinstance(new, type(wrap(variables)))
  assert FP8.apply(new, X).shape == (2, 4)
  equal(flax.core.unfreeze(new), {**variables, OWG: FP8.init(jax.random.key(0), X)[OWG]})


def test_keeps_state_that_is_there():
  trained = jax.tree.map(lambda leaf: leaf + 1, FP8.init(jax.random.key(0), X)[OWG])
  partial = {**PLAIN, OWG: {"layers_0": trained["layers_0"]}}
  new = fp8.upgrade_variables(FP8, partial, X)
  equal(new[OWG]["layers_0"], trained["layers_0"])
  assert float(new[OWG]["layers_2"]["Fp8DotGeneral_0"]["input_scale"][0]) == 1.0


def test_takes_shapes_and_keywords():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
      x = nn.Dropout(0.5, deterministic=not train)(x)
      return nn.Dense(4, dot_general_cls=fp8.Fp8DotGeneral, name="inner")(x)

  variables = {"params": {"inner": nn.Dense(4).init(jax.random.key(0), X)["params"]}}
  shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
  new = fp8.upgrade_variables(Model(), variables, shape, train=True)
  assert set(new[OWG]["inner"]) == {"Fp8DotGeneral_0"}


def test_model_without_fp8_gets_nothing():
  assert fp8.upgrade_variables(model(None), PLAIN, X)[OWG] == {}


def test_bare_parameters_are_refused():
  with pytest.raises(
    ValueError, match=r"upgrade_variables: .*collection 'params'; got \['layers_0'"
  ):
    fp8.upgrade_variables(FP8, PLAIN["params"], X)
