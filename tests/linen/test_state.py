"""Layers with one input: one state quantises it, and the states of the others follow."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from flax_fp8.explain.traffic import KernelClass
from flax_fp8.linen import state as linen_state

OWG = fp8.OVERWRITE_WITH_GRADIENT
RECIPE = fp8.DelayedScaling(amax_history_len=3)
X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 32)), jnp.float32)


class Projections(nn.Module):
  """Query, key and value of one input; value's recipe may be another."""

  value: fp8.Recipe = RECIPE
  dtype: object = jnp.float32

  @nn.compact
  def __call__(self, x):
    layer = functools.partial(nn.Dense, 32, use_bias=False, dtype=self.dtype)
    query, key = (layer(dot_general_cls=RECIPE.dot_general_cls, name=n)(x) for n in "qk")
    return query * jnp.tanh(key) + layer(dot_general_cls=self.value.dot_general_cls, name="v")(x)


def loss(model, variables, x):
  return jnp.mean(jnp.square(model.apply(variables, x).astype(jnp.float32)))


def step(model, variables, x):
  return fp8.value_and_grad(functools.partial(loss, model))(variables, x)


def states(grads):
  return {name: layer["Fp8DotGeneral_0"] for name, layer in grads[OWG].items()}


def inputs(state):
  return {key: leaf for key, leaf in state.items() if key.startswith("input")}


def unshared(monkeypatch):
  monkeypatch.setattr(linen_state, "_share", lambda module, recipe, x, own: own)


def train(model, steps=3):
  variables, seen = model.init(jax.random.key(0), X), []
  for n in range(steps):
    value, grads = jax.jit(functools.partial(step, model))(variables, X * (n + 1))
    variables = {**variables, OWG: grads[OWG]}
    seen.append((value, grads))
  return seen


@pytest.mark.slow
def test_shared_input_trains_to_the_bits_of_separate_states(monkeypatch):
  shared = train(Projections())
  unshared(monkeypatch)
  chex.assert_trees_all_equal(train(Projections()), shared)


@pytest.mark.parametrize(
  "lift",
  [pytest.param(nn.remat, marks=pytest.mark.slow, id="remat"), pytest.param(nn.jit, id="jit")],
)
def test_inside_a_lifted_transformation_too(monkeypatch, lift):
  shared = train(lift(Projections)())
  unshared(monkeypatch)
  chex.assert_trees_all_equal(train(lift(Projections)()), shared)


class Scanned(nn.Module):
  """Two blocks with three projections of one input each."""

  @nn.compact
  def __call__(self, x):
    body = lambda block, x: (block(x), None)
    scanned = fp8.scan(body, {"params": 0}, split_rngs={"params": True}, length=2)
    return scanned(Projections(), x)[0]


@pytest.mark.slow
def test_under_scan_each_block_has_its_own(monkeypatch):
  shared = train(Scanned())
  unshared(monkeypatch)
  chex.assert_trees_all_equal(train(Scanned()), shared)


def apart(variables):
  """Key's and value's states are as after other steps than query's."""
  made = jax.tree.map(lambda leaf: leaf, variables)
  for name, amax in (("q", 4.0), ("k", 40.0), ("v", 0.4)):
    own = made[OWG][name]["Fp8DotGeneral_0"]
    own["input_amax_history"] = jnp.full(3, amax)
  return made


def test_states_made_apart_are_the_first_ones_after_a_step():
  model = Projections()
  variables = apart(model.init(jax.random.key(0), X))
  _, grads = jax.jit(functools.partial(step, model))(variables, X)
  new = states(grads)
  amax = np.float32(np.abs(X).max())
  np.testing.assert_array_equal(new["q"]["input_amax_history"], [amax, 4, 4])
  np.testing.assert_allclose(new["q"]["input_scale"], 4 / 448, rtol=1e-6)
  chex.assert_trees_all_equal(inputs(new["k"]), inputs(new["q"]))
  chex.assert_trees_all_equal(inputs(new["v"]), inputs(new["q"]))
  kernels = [float(new[name]["kernel_amax_history"][0]) for name in "qkv"]
  assert len(set(kernels)) == 3  # what is no input is each layer's own


def test_another_recipe_has_its_own_state():
  model = Projections(value=fp8.DelayedScaling(amax_history_len=3, margin=1))
  variables = apart(model.init(jax.random.key(0), X))
  _, grads = jax.jit(functools.partial(step, model))(variables, X)
  new = states(grads)
  np.testing.assert_array_equal(new["v"]["input_amax_history"][1:], np.float32([0.4, 0.4]))
  np.testing.assert_array_equal(new["k"]["input_amax_history"][1:], [4, 4])


def test_states_of_other_lengths_stay_apart():
  """As where a history was resized in one layer: nothing is shared, nothing raises."""
  model = Projections(value=fp8.DelayedScaling(amax_history_len=5))
  _, grads = jax.jit(functools.partial(step, model))(model.init(jax.random.key(0), X), X)
  assert states(grads)["v"]["input_amax_history"].shape == (5,)


def test_without_jit_each_state_is_its_own():
  model = Projections()
  variables = apart(model.init(jax.random.key(0), X))
  out = model.apply(variables, X)
  assert np.isfinite(out).all()


def test_the_compiled_program_quantises_the_input_once(described):
  del described
  model = Projections(dtype=jnp.bfloat16)
  x = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  report = fp8.explain(functools.partial(step, model), variables, x, target="h100")
  assert report.fp8_gemms == report.total_gemms
  reads = [k for k in report.kernels if k.kind is KernelClass.QUANTIZE and k.written >= 256 * 512]
  assert sum(kernel.written // (256 * 512) for kernel in reads) == 1
