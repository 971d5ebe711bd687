"""Every model of ``models.py`` becomes FP8 without a change to it."""

import dataclasses

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from tests.linen.convert.models import CASES

OWG = fp8.OVERWRITE_WITH_GRADIENT


@pytest.fixture(params=CASES, scope="module")
def case(request):
  return CASES[request.param]


def flat(tree):
  return flax.traverse_util.flatten_dict(tree, sep="/")


def modules_with_state(variables):
  return {path.rpartition("/")[0] for path in flat(variables[OWG])}


def relative_error(got, wanted):
  return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def models(case):
  return case.model, case.twin


@pytest.fixture(scope="module")
def pair(case):
  """Variables of the model and of its twin, both of one key."""
  return tuple(jax.jit(m.init)(jax.random.key(0), *case.args) for m in (case.model, case.twin))


def test_params_are_the_same_and_state_is_all_that_is_added(pair):
  plain, twin = pair
  assert jax.tree.structure(plain) == jax.tree.structure({k: twin[k] for k in plain})
  jax.tree.map(np.testing.assert_array_equal, plain, {k: twin[k] for k in plain})
  assert twin.keys() - plain.keys() == {OWG}


def test_state_is_where_the_dry_run_says(case, pair):
  assert modules_with_state(pair[1]) == set(case.fp8_layers)
  report = case.config.report(case.model, *case.args)
  said = {row.layer.path for row in report.taken}
  strip = lambda path: path if path in said else path.rpartition("/")[0]
  assert {strip(path) for path in case.fp8_layers} == said


def test_forward_is_within_format_error(case, pair):
  wanted, got = (jax.jit(m.apply)(v, *case.args) for m, v in zip(models(case), pair, strict=True))
  assert got.shape == wanted.shape
  assert got.dtype == wanted.dtype
  error = relative_error(np.float64(got), np.float64(wanted))
  # An E4M3 value is off by up to 2**-4; a GEMM of two, root mean square, by about 3.7 %, and
  # Layers in a row add up. Zero would mean that nothing was rounded.
  assert 1e-4 < error < 0.2


def test_gradients_flow_and_state_is_new(case, pair):
  twin, args = case.twin, case.args
  loss = lambda v: jnp.mean(jnp.square(twin.apply(v, *args)))
  value, grads = jax.jit(fp8.value_and_grad(loss, allow_int=True))(pair[1])
  assert np.isfinite(value)
  square = lambda v: jnp.mean(jnp.square(case.model.apply(v, *args)))
  wanted = jax.jit(jax.grad(square, allow_int=True))(pair[0])
  for path, leaf in flat(nn.meta.unbox(wanted["params"])).items():
    got = flat(nn.meta.unbox(grads["params"]))[path]
    assert (np.abs(leaf).max() == 0) == (np.abs(got).max() == 0), path
  for path, leaf in flat(grads[OWG]).items():
    unused = "narrow" in path or "wide" in path  # one of two branches runs
    if path.endswith("amax_history") and not unused:
      assert np.all(leaf[..., 0] > 0), path


def test_a_recipe_without_state_adds_nothing(case, pair):
  config = dataclasses.replace(case.config, recipe=fp8.Float8CurrentScaling())
  twin = fp8.fp8_linear_layers(case.model, config)
  assert OWG not in jax.eval_shape(twin.init, jax.random.key(0), *case.args)
  wanted, got = (m.apply(pair[0], *case.args) for m in (case.model, twin))
  assert 1e-4 < relative_error(np.float64(got), np.float64(wanted)) < 0.2
