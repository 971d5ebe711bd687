"""Stochastic rounding: unbiased, reproducible, and only for gradients."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from flax_fp8 import quantize
from tests import oracle
from tests.recipes import cases
from tests.recipes.cases import RECIPES, compiled, integers, normal, quickly
from tests.test_formats import ALL

by_format = pytest.mark.parametrize("float8", ALL, ids=lambda f: f.name)
by_class = pytest.mark.parametrize("name", cases.ONE_OF_EACH_CLASS)
KEYS = jax.random.split(jax.random.key(1), 4096)


def cast(x, float8, key):
  run = quickly(lambda x, key: quantize.saturating_cast(x, float8, key))
  return np.asarray(run(jnp.asarray(x, jnp.float32), key), np.float64)


@by_format
class TestCast:
  def test_every_code_is_a_fixed_point(self, float8):
    values = np.arange(256, dtype=np.uint8).view(float8.dtype).astype(np.float32)
    values = values[~np.isinf(values)]
    for key in KEYS[:3]:
      got = cast(values, float8, key)
      np.testing.assert_array_equal(got, values)
      np.testing.assert_array_equal(np.signbit(got), np.signbit(values))

  def test_saturates_and_keeps_nan(self, float8):
    x = [np.inf, -np.inf, 1e30, -1e30, float8.max * 1.01, np.nan]
    want = [float8.max, -float8.max, float8.max, -float8.max, float8.max, np.nan]
    np.testing.assert_array_equal(cast(x, float8, KEYS[0]), want)

  def test_gives_a_neighbor(self, float8):
    """The result is one of the two neighboring FP8 values, and each of them sometimes."""
    values = np.array(oracle.magnitudes(float8.name), np.float64)
    inside = np.concatenate([values[:-1] * (1 - f) + values[1:] * f for f in (0.05, 0.5, 0.95)])
    x = np.concatenate([inside, -inside]).astype(np.float32)
    above = np.searchsorted(values, np.abs(x), side="left")
    low, high = np.copysign(values[above - 1], x), np.copysign(values[above], x)
    run = quickly(jax.vmap(lambda key: quantize.saturating_cast(jnp.asarray(x), float8, key)))
    got = np.asarray(run(KEYS[:16]), np.float64)
    assert np.all((got == low) | (got == high))
    middle = np.arange(x.size) // (values.size - 1) % 3 == 1
    assert np.all(np.any(got == low, axis=0) & np.any(got == high, axis=0) | ~middle | (high == 0))

  def test_is_unbiased(self, float8):
    """The mean over keys equals the value within four standard errors."""
    values = np.array(oracle.magnitudes(float8.name), np.float64)
    index = np.array([0, 1, 3, 7, 20, 50, 90, len(values) - 2])
    low, step = values[index], np.diff(values)[index]
    fraction = np.array([1 / 64, 0.3, 0.5, 0.81])[:, None]
    x = (low + fraction * step).astype(np.float32)
    run = quickly(jax.vmap(lambda key: quantize.saturating_cast(jnp.asarray(x), float8, key)))
    mean = np.asarray(run(KEYS), np.float64).mean(axis=0)
    chance = (np.float64(x) - low) / step
    standard_error = step * np.sqrt(chance * (1 - chance) / len(KEYS))
    resolution = step * 2.0**-16
    assert np.all(np.abs(mean - x) <= 4 * standard_error + resolution)


def powers_of_two(seed, *shape):
  """Makes powers of two of both signs, which are exact in FP8 with any scale from their amax."""
  random = np.random.default_rng(seed)
  return (2.0 ** random.integers(-1, 3, shape) * random.choice([-1, 1], shape)).astype(np.float32)


X, W, C = powers_of_two(0, 8, 40), powers_of_two(1, 40, 12), normal(2, 8, 12)


def stochastic(name):
  return dataclasses.replace(RECIPES[name], grad_rounding="stochastic")


@by_class
class TestRecipes:
  def test_gradients_are_unbiased_and_the_output_is_as_before(self, name):
    """Input and kernel are exact here, so the mean over keys equals the float64 gradient."""
    recipe, keys = stochastic(name), KEYS[:400]
    run = quickly(jax.vmap(lambda key: cases.step(recipe, X, W, C, key=key)[:3]))
    out, dx, dw = run(keys)
    exact = cases.exact(X, W, C)
    # Only the scales are rounded: twice each, and their product once.
    np.testing.assert_allclose(out, np.broadcast_to(exact[0], out.shape), rtol=5 * 2.0**-24)
    for samples, want in zip((dx, dw), exact[1:], strict=True):
      samples = np.asarray(samples, np.float64)
      standard_error = samples.std(axis=0) / np.sqrt(len(keys))
      # Some of 800 elements exceed four standard errors. Their mean square is near one.
      z = (samples.mean(axis=0) - want) / np.maximum(standard_error, 1e-5 * np.abs(want) + 1e-6)
      assert np.abs(z).max() < 5
      assert np.mean(z**2) < 1.5

  def test_forward_and_state_are_those_of_rounding_to_nearest(self, name):
    x, w = normal(3, 8, 40), normal(4, 40, 12)
    got = cases.compiled_quickly(stochastic(name), x, w, C)
    nearest = cases.compiled_quickly(RECIPES[name], x, w, C)
    cases.equal((got[0], got[3]), (nearest[0], nearest[3]))
    assert not np.array_equal(got[1], nearest[1])
    assert not np.array_equal(got[2], nearest[2])

  def test_is_a_function_of_the_key(self, name):
    recipe = stochastic(name)
    one, same, other = (
      cases.compiled_quickly(recipe, X, W, C, key=jax.random.key(seed)) for seed in (3, 3, 4)
    )
    cases.equal(one, same)
    assert not np.array_equal(one[1], other[1])

  def test_the_gradient_needs_a_key(self, name):
    layer = nn.Dense(12, dot_general_cls=stochastic(name).dot_general_cls)
    variables = jax.eval_shape(layer.init, jax.random.key(0), X)
    jax.eval_shape(layer.apply, variables, X)
    loss = lambda v: jnp.sum(layer.apply(v, X))
    match = r"Fp8DotGeneral: stochastic rounding .* needs a PRNG key; .*rngs=\{'sr_rng': key\}"
    with pytest.raises(ValueError, match=match):
      jax.eval_shape(jax.grad(loss), variables)


RECIPE = fp8.Float8CurrentScaling(grad_rounding="stochastic")
RNGS = {"sr_rng": jax.random.key(5)}


class Parallel(nn.Module):
  """Two layers, or one layer called twice. With equal keys, their gradients would be equal."""

  twice: bool = False

  @nn.compact
  def __call__(self, x, y):
    make = lambda name: nn.Dense(
      12,
      use_bias=False,
      name=name,
      kernel_init=nn.initializers.ones,
      dot_general_cls=RECIPE.dot_general_cls,
    )
    first = make("first")
    return first(x), first(y) if self.twice else make("second")(y)


@pytest.mark.parametrize("twice", [False, True], ids=["layers", "calls"])
def test_each_layer_and_call_rounds_by_a_key_of_its_own(twice):
  module = Parallel(twice)
  variables = jax.jit(module.init)(jax.random.key(0), X, X)

  @quickly
  def gradients(x, y):
    _, vjp = jax.vjp(lambda x, y: module.apply(variables, x, y, rngs=RNGS), x, y)
    return vjp((jnp.asarray(C), jnp.asarray(C)))

  first, second = gradients(X, X)
  assert not np.array_equal(first, second)


@pytest.mark.parametrize("split", [True, False], ids=["split", "shared"])
def test_scan_splits_the_key(split):
  """The steps of a scan apply the same layer to the same values."""
  body = nn.scan(
    lambda module, carry, x: (carry, module(x)),
    variable_broadcast="params",
    split_rngs={"params": False, "sr_rng": split},
  )

  class Model(nn.Module):
    @nn.compact
    def __call__(self, xs):
      return body(nn.Dense(12, dot_general_cls=RECIPE.dot_general_cls), 0, xs)[1]

  xs, cs = np.stack([X, X]), np.stack([C, C])
  variables = jax.jit(Model().init)(jax.random.key(0), xs)

  @quickly
  def gradient(variables, xs, cs):
    return jax.vjp(lambda xs: Model().apply(variables, xs, rngs=RNGS), xs)[1](cs)[0]

  first, second = gradient(variables, xs, cs)
  assert np.array_equal(first, second) == (not split)


def test_legacy_keys():
  """``jax.random.PRNGKey`` returns keys that are plain arrays of uint32."""
  got = compiled(RECIPE, integers(0, 4, 8), integers(1, 8, 4), C[:4, :4], key=jax.random.PRNGKey(0))
  assert all(np.all(np.isfinite(value)) for value in got[:3])
