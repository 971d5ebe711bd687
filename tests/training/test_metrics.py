"""Metrics of whole models: adding, updating and removing them."""

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_fp8 as fp8
from flax_fp8 import fp8_ops
from flax_fp8.ops.metrics import METRICS
from tests.recipes import cases
from tests.recipes.cases import quickly

OWG = fp8.OVERWRITE_WITH_GRADIENT
RECIPES = {"delayed": fp8.DelayedScaling(amax_history_len=4), "current": fp8.Float8CurrentScaling()}
X = cases.normal(0, 4, 8)
LEAVES = {f"{role}_{name}" for role in ("input", "kernel", "output_grad") for name in METRICS}


class Model(nn.Module):
  """Two scanned layers, then a layer called twice."""

  recipe: fp8.Recipe
  collections: tuple[str, ...] = ("params", OWG)

  @nn.compact
  def __call__(self, x):
    dense = lambda name: nn.Dense(8, dot_general_cls=self.recipe.dot_general_cls, name=name)
    scan = nn.scan(
      lambda module, x, _: (module(x), None),
      variable_axes=dict.fromkeys(self.collections, 0),
      split_rngs={"params": True},
      length=2,
    )
    x = scan(dense("layers"), x, None)[0]
    head = dense("head")
    return head(x) + head(3 * x)


@pytest.mark.parametrize(("name", "wrap"), [("delayed", dict), ("current", flax.core.freeze)])
def test_added_and_dropped(name, wrap):
  model = Model(RECIPES[name])
  variables = wrap(jax.jit(model.init)(jax.random.key(0), X))
  more = fp8.add_metrics(model, variables, jax.ShapeDtypeStruct(X.shape, X.dtype))
  for layer, shape in (("layers", (2, 1)), ("head", (1,))):
    leaves = more[OWG][layer]["Fp8DotGeneral_0"]
    assert set(leaves) >= LEAVES
    assert all(leaves[name].shape == shape and not np.any(leaves[name]) for name in LEAVES)
  jax.tree.map(np.testing.assert_array_equal, more["params"], variables["params"])
  again = fp8.add_metrics(model, jax.tree.map(lambda leaf: leaf + 1, more), X)
  assert not np.any(again[OWG]["head"]["Fp8DotGeneral_0"]["input_noise"])
  back = fp8.drop_metrics(more)
  assert type(back) is type(variables)
  cases.equal(back, variables)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_travel_through_a_train_state(name):
  """A layer called twice has the larger value, and each stacked layer its own."""
  model = Model(RECIPES[name])
  variables = jax.jit(model.init)(jax.random.key(0), X)
  loss_fn = lambda v: jnp.mean(model.apply(v, X) ** 2)

  def step(variables):
    state = fp8.TrainState.create(apply_fn=model.apply, params=variables, tx=optax.sgd(0.1))
    return state.apply_gradients(grads=fp8.grad(loss_fn)(state.params)).params

  new = quickly(step)(fp8.add_metrics(model, variables, X))
  assert jax.tree.structure(fp8.drop_metrics(new)) == jax.tree.structure(variables)
  assert np.any(new["params"]["head"]["kernel"] != variables["params"]["head"]["kernel"])
  amax = lambda layer: np.ravel(new[OWG][layer]["Fp8DotGeneral_0"]["input_amax"])
  assert amax("layers")[0] == np.abs(X).max()
  assert amax("layers").shape == (2,)
  if name == "delayed":
    assert amax("head")[0] == new[OWG]["head"]["Fp8DotGeneral_0"]["input_amax_history"][0]


def test_of_the_modules_of_fp8_ops():
  model = nn.Dense(8, dot_general_cls=fp8_ops.Fp8DotGeneral)
  variables = jax.jit(model.init)(jax.random.key(0), X)
  more = fp8.add_metrics(model, variables, X)
  new = quickly(fp8.grad(lambda v: jnp.sum(model.apply(v, X))))(more)
  assert new[OWG]["Fp8DirectDotGeneralOp_0"]["input_amax"] == np.abs(X).max()


@pytest.mark.filterwarnings("ignore:Fp8DotGeneralOp is deprecated")
def test_errors():
  variables = {"params": {}}
  with pytest.raises(ValueError, match=r"add_metrics: variables must be .*got \['kernel'\]. Wrap"):
    fp8.add_metrics(nn.Dense(8), {"kernel": X}, X)
  with pytest.raises(ValueError, match=r"drop_metrics: variables must be .*got <class 'list'>"):
    fp8.drop_metrics([])
  for cls in (None, fp8_ops.Fp8DotGeneralOp):
    with pytest.raises(ValueError, match=r"add_metrics: the model must have FP8 .*got Dense with"):
      fp8.add_metrics(nn.Dense(8, dot_general_cls=cls), variables, X)
  model = Model(RECIPES["current"], collections=("params",))
  message = r"add_metrics: every FP8 .*none at 'layers/Fp8DotGeneral_0'. Add .*variable_axes"
  with pytest.raises(ValueError, match=message):
    fp8.add_metrics(model, jax.jit(model.init)(jax.random.key(0), X), X)
