"""``fp8.scan`` and ``fp8.vmap`` are Linen's with the axes of the state written out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from tests.recipes import cases

OWG = fp8.OVERWRITE_WITH_GRADIENT
RECIPE = fp8.DelayedScaling(amax_history_len=4)
X = jnp.asarray(cases.normal(0, 3, 2, 8))
KEY = jax.random.key(0)


def dense(recipe=RECIPE):
  return nn.Dense(8, dot_general_cls=recipe.dot_general_cls)


class Layer(nn.Module):
  """A step of a scan, and the same as a method of another name."""

  recipe: fp8.Recipe = RECIPE

  @nn.compact
  def __call__(self, x, y):
    return dense(self.recipe)(x), y

  @nn.compact
  def twice(self, x, y):
    return 2 * dense(self.recipe)(x), y


def step(module, x, y):
  """The target as a function."""
  return module(x, y)


def run(model, x=X[0]):
  """Variables, output and gradients."""

  @cases.quickly
  def all_of_it():
    variables = model.init(KEY, x, X)
    loss = lambda v: jnp.sum(model.apply(v, x, X)[0] ** 2)
    return variables, fp8.value_and_grad(loss)(variables)

  return all_of_it()


def shapes(model):
  """Of the variables."""
  return jax.eval_shape(model.init, KEY, X[0], X)


SPLIT, SHARED = {"split_rngs": {"params": True}}, {"split_rngs": {"params": False}}
SCANS = {  # what a user writes, and what it means
  "a layer each": (
    {"variable_axes": {"params": 0}, **SPLIT},
    {"variable_axes": {"params": 0, OWG: 0}, **SPLIT},
  ),
  "on another axis": (
    {"variable_axes": {"params": 1}, **SPLIT},
    {"variable_axes": {"params": 1, OWG: 1}, **SPLIT},
  ),
  "several at once": (
    {"variable_axes": {("params", "stats"): 0}, **SPLIT},
    {"variable_axes": {("params", "stats"): 0, OWG: 0}, **SPLIT},
  ),
  "shared": (
    {"variable_broadcast": "params", **SHARED},
    {"variable_broadcast": ["params", OWG], **SHARED},
  ),
  "all but": (
    {"variable_axes": {nn.DenyList("stats"): 0}, **SPLIT},
    {"variable_axes": {nn.DenyList("stats"): 0}, **SPLIT},
  ),
  "named": (
    {"variable_axes": {"params": 0, OWG: 1}, **SPLIT},
    {"variable_axes": {"params": 0, OWG: 1}, **SPLIT},
  ),
}


@pytest.mark.parametrize("case", SCANS)
def test_scan_is_linens(case):
  written, meant = SCANS[case]
  ours, theirs = fp8.scan(Layer, **written)(), nn.scan(Layer, **meant)()
  if case not in ("a layer each", "shared"):
    assert OWG in shapes(ours)
    assert shapes(ours) == shapes(theirs)
    return
  got = run(ours)
  assert OWG in got[0]
  cases.equal(got, run(theirs))


def test_scan_takes_positions_and_functions():
  class Functional(nn.Module):
    lift: bool

    @nn.compact
    def __call__(self, x, ys):
      scan = fp8.scan if self.lift else nn.scan
      axes = {"params": 0} if self.lift else {"params": 0, OWG: 0}
      return scan(step, axes, False, False, {"params": True})(Layer(name="layer"), x, ys)

  assert OWG in shapes(Functional(True))
  assert shapes(Functional(True)) == shapes(Functional(False))


@pytest.mark.parametrize("lift", ["scan", "vmap"])
def test_methods_and_metadata(lift):
  """What is passed on is passed on: other methods, and the name of the new axis."""
  boxed = nn.with_partitioning(nn.initializers.ones, (None, None))

  class Boxed(Layer):
    @nn.compact
    def other(self, x, y):
      return nn.Dense(8, kernel_init=boxed, dot_general_cls=RECIPE.dot_general_cls)(x), y

  how = {"metadata_params": {nn.PARTITION_NAME: "layers"}, "methods": ["other"], **SPLIT}
  model = getattr(fp8, lift)(Boxed, variable_axes={"params": 0}, **how)()
  x = X[0] if lift == "scan" else X
  variables = jax.eval_shape(lambda: model.init(KEY, x, X, method="other"))
  assert nn.get_partition_spec(variables)["params"]["Dense_0"]["kernel"][0] == "layers"
  assert jax.tree.leaves(variables[OWG])[0].shape[0] == 3


VMAPS = {
  "experts": ({"params": 0}, {"params": 0, OWG: 0}),
  "shared": ({"params": None}, {"params": None, OWG: None}),
  "one state for all": ({"params": 0, OWG: None}, {"params": 0, OWG: None}),
}


@pytest.mark.parametrize("case", VMAPS)
def test_vmap_is_linens(case):
  written, meant = VMAPS[case]
  split = {"params": written["params"] == 0}
  got = run(fp8.vmap(Layer, written, split)(), x=X)
  if case != "one state for all":
    cases.equal(got, run(nn.vmap(Layer, meant, split)(), x=X))
  leaf = got[1][1][OWG]["Dense_0"]["Fp8DotGeneral_0"]["input_amax_history"]
  amax = np.abs(X).max(axis=(1, 2) if meant[OWG] == 0 else None)
  np.testing.assert_array_equal(leaf[..., 0], amax)


@pytest.mark.parametrize("lift", ["scan", "vmap"])
def test_keys_of_stochastic_rounding_are_split(lift):
  recipe = fp8.Float8CurrentScaling(grad_rounding="stochastic")
  x = X[0] if lift == "scan" else X
  rngs = {"sr_rng": jax.random.key(1)}
  ours = getattr(fp8, lift)(Layer, {"params": 0}, **SPLIT)(recipe)
  split = {"split_rngs": {"params": True, "sr_rng": True}}
  theirs = getattr(nn, lift)(Layer, {"params": 0}, **split)(recipe)

  @cases.quickly
  def gradient(kernel):
    variables = {"params": {"Dense_0": {"kernel": kernel, "bias": jnp.zeros((3, 8))}}}
    loss = lambda model: lambda v: jnp.sum(jnp.sin(model.apply(v, x, X, rngs=rngs)[0]))
    return [jax.grad(loss(model))(variables) for model in (ours, theirs)]

  cases.equal(*gradient(jnp.asarray(cases.normal(1, 3, 8, 8))))
