"""Each layer quantizes with its own state, independent of other layers with the same input."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8

OWG = fp8.OVERWRITE_WITH_GRADIENT
RECIPE = fp8.DelayedScaling(amax_history_len=3)
X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 32)), jnp.float32)


class Projections(nn.Module):
  """Query, key and value of one input. The value may have another recipe."""

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


def apart(variables):
  """Gives the three layers different states."""
  made = jax.tree.map(lambda leaf: leaf, variables)
  for name, amax in (("q", 4.0), ("k", 40.0), ("v", 0.4)):
    made[OWG][name]["Fp8DotGeneral_0"]["input_amax_history"] = jnp.full(3, amax)
  return made


LIFTS = {"plain": lambda module: module, "remat": nn.remat, "jit": nn.jit}


@pytest.mark.parametrize("lift", LIFTS.values(), ids=LIFTS)
def test_layers_with_one_input_have_separate_states(lift):
  model = lift(Projections)()
  variables = apart(model.init(jax.random.key(0), X))
  _, grads = jax.jit(functools.partial(step, model))(variables, X)
  new, amax = states(grads), np.float32(np.abs(X).max())
  for name, old in (("q", 4.0), ("k", 40.0), ("v", 0.4)):
    np.testing.assert_array_equal(new[name]["input_amax_history"], np.float32([amax, old, old]))
    np.testing.assert_allclose(new[name]["input_scale"], old / 448, rtol=1e-6)
  kernels = [float(new[name]["kernel_amax_history"][0]) for name in "qkv"]
  assert len(set(kernels)) == 3


@pytest.mark.parametrize("differentiate", [jax.grad, fp8.grad], ids=["jax", "fp8"])
@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_layer_outside_of_the_loss_does_not_change_another(run, differentiate):
  """Two layers read one input of magnitude 1e5. The loss depends only on the second layer."""
  layer = functools.partial(nn.Dense, 8, dot_general_cls=RECIPE.dot_general_cls, use_bias=False)

  class Heads(nn.Module):
    @nn.compact
    def __call__(self, x):
      layer(name="other")(x)
      return layer(name="used")(x)

  model, x = Heads(), 1e5 * X
  variables = model.init(jax.random.key(0), x)
  gradient = run(differentiate(lambda v: jnp.mean(jnp.square(model.apply(v, x)))))
  for _ in range(4):
    new = gradient(variables)[OWG]["used"]
    variables = {**variables, OWG: {**variables[OWG], "used": new}}
  got = run(model.apply)(variables, x)
  want = x @ variables["params"]["used"]["kernel"]
  assert np.linalg.norm(got - want) / np.linalg.norm(want) < 0.05


def test_jit_equals_eager_where_states_differ():
  model = Projections()
  variables = apart(model.init(jax.random.key(0), X))
  got = jax.jit(model.apply)(variables, X)
  np.testing.assert_allclose(got, model.apply(variables, X), rtol=1e-5, atol=1e-6)


def test_weight_norm_of_state_raises():
  layer = functools.partial(nn.Dense, 16, dot_general_cls=RECIPE.dot_general_cls)
  with pytest.raises(ValueError, match=r"nn.WeightNorm: .*variable_filter=\{'kernel'\}.*kernel'\}"):
    nn.WeightNorm(layer()).init(jax.random.key(0), X)
  model = nn.WeightNorm(layer(), variable_filter={"layer_instance/kernel"})
  variables = model.init(jax.random.key(0), X)
  state = jax.grad(lambda v: jnp.sum(model.apply(v, X) ** 2))(variables)[OWG]
  assert float(state["layer_instance"]["Fp8DotGeneral_0"]["kernel_scale"][0]) == 1


class Changed(nn.Dense):
  """A layer that multiplies by three times its kernel."""

  def param(self, name, *args, **kwargs):
    value = super().param(name, *args, **kwargs)
    return 3 * value if name == "kernel" else value


def changed(factor):
  """A ``dot_general_cls`` that multiplies the kernel by a factor."""
  dot = RECIPE.dot_general_cls
  return lambda: lambda x, kernel, *args, **kwargs: dot()(x, factor * kernel, *args, **kwargs)


KERNELS = {
  "a subclass": (
    3.0,
    lambda dtype: Changed(32, use_bias=False, dtype=dtype, dot_general_cls=RECIPE.dot_general_cls),
  ),
  "a function": (
    3.0,
    lambda dtype: nn.Dense(32, use_bias=False, dtype=dtype, dot_general_cls=changed(3.0)),
  ),
  "a mask": (
    0.0,
    lambda dtype: nn.Dense(32, use_bias=False, dtype=dtype, dot_general_cls=changed(0.0)),
  ),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("factor", "make"), KERNELS.values(), ids=KERNELS)
def test_changes_to_a_kernel_take_effect(factor, make, dtype):
  """In the forward and the backward pass, as without FP8."""
  model, plain = make(dtype), nn.Dense(32, use_bias=False, dtype=dtype)
  variables = jax.jit(model.init)(jax.random.key(0), X)
  loss = lambda apply, v, x: jnp.sum(apply(v, x).astype(jnp.float32) * X)
  ours = jax.jit(jax.grad(lambda v, x: loss(model.apply, v, x), (0, 1)))(variables, X)
  scaled = {"params": jax.tree.map(lambda leaf: factor * leaf, variables["params"])}
  want = jax.grad(lambda v, x: loss(plain.apply, v, x), (0, 1))(scaled, X)
  pairs = (
    (model.apply(variables, X), plain.apply(scaled, X)),
    (ours[0]["params"]["kernel"], factor * want[0]["params"]["kernel"]),
    (ours[1], want[1]),
  )
  for got, wanted in pairs:
    assert np.linalg.norm(got - wanted) <= 0.1 * np.linalg.norm(wanted)
