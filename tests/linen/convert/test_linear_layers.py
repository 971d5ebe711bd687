"""``fp8_linear_layers`` converts every model of ``models.py`` unmodified."""

import dataclasses
import functools

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from tests.linen.convert.models import CASES, D, F

OWG = fp8.OVERWRITE_WITH_GRADIENT


# Other models, and test_wild.py and test_contractions.py, have the same lifts and layers.
SLOW = ("bfloat16", "remat", "vmapped", "custom_dot_general", "jitted")
CASE_NAMES = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES]


@pytest.fixture(params=CASE_NAMES, scope="module")
def case(request):
  return CASES[request.param]


def flat(tree):
  return flax.traverse_util.flatten_dict(tree, sep="/")


def modules_with_state(variables):
  return {path.rpartition("/")[0] for path in flat(variables[OWG])}


def relative_error(got, wanted):
  return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


@pytest.fixture(scope="module")
def pair(case):
  """Variables, output and gradients of the model and of the converted module, for one key."""

  def run(model, value_and_grad):
    def loss(variables):
      out = model.apply(variables, *case.args)
      return jnp.mean(jnp.square(out)), out

    variables = jax.jit(model.init)(jax.random.key(0), *case.args)
    gradient = value_and_grad(loss, has_aux=True, allow_int=True)
    (_, out), grads = jax.jit(gradient)(variables)
    return variables, out, grads

  return run(case.model, jax.value_and_grad), run(case.converted, fp8.value_and_grad)


def test_params_are_unchanged_and_only_state_is_added(pair):
  plain, converted = (variables for variables, *_ in pair)
  assert jax.tree.structure(plain) == jax.tree.structure({k: converted[k] for k in plain})
  jax.tree.map(np.testing.assert_array_equal, plain, {k: converted[k] for k in plain})
  assert converted.keys() - plain.keys() == {OWG}


def test_state_is_where_the_dry_run_says(case, pair):
  assert modules_with_state(pair[1][0]) == set(case.fp8_layers)
  report = case.config.report(case.model, *case.args)
  said = {row.layer.path for row in report.taken}
  strip = lambda path: path if path in said else path.rpartition("/")[0]
  assert {strip(path) for path in case.fp8_layers} == said


def test_forward_is_within_format_error(pair):
  wanted, got = (out for _, out, _ in pair)
  assert got.shape == wanted.shape
  assert got.dtype == wanted.dtype
  error = relative_error(np.float64(got), np.float64(wanted))
  # An E4M3 value has a relative error of up to 2**-4. The relative error of a GEMM is about 3.7 %,
  # and the errors of successive layers add up. An error of zero means that nothing was rounded.
  assert 1e-4 < error < 0.2


def test_gradients_flow_and_state_is_new(pair):
  wanted, grads = (grads for *_, grads in pair)
  for path, leaf in flat(nn.meta.unbox(wanted["params"])).items():
    got = flat(nn.meta.unbox(grads["params"]))[path]
    assert np.all(np.isfinite(got)), path
    assert (np.abs(leaf).max() == 0) == (np.abs(got).max() == 0), path
  for path, leaf in flat(nn.meta.unbox(grads[OWG])).items():
    unused = "narrow" in path or "wide" in path  # one of two branches runs
    if path.endswith("amax_history") and not unused:
      assert np.all(leaf[..., 0] > 0), path


@pytest.mark.parametrize("name", ["scanned", "moe", "jitted"])
def test_a_recipe_without_state_adds_nothing(name):
  case = CASES[name]
  variables = jax.jit(case.model.init)(jax.random.key(0), *case.args)
  config = dataclasses.replace(case.config, recipe=fp8.Float8CurrentScaling())
  converted = fp8.fp8_linear_layers(case.model, config)
  assert OWG not in jax.eval_shape(converted.init, jax.random.key(0), *case.args)
  wanted, got = (jax.jit(m.apply)(variables, *case.args) for m in (case.model, converted))
  assert 1e-4 < relative_error(np.float64(got), np.float64(wanted)) < 0.2


class HandEdited(nn.Module):
  """``Mlp`` with ``dot_general_cls`` passed to each layer."""

  @nn.compact
  def __call__(self, x):
    new = fp8.DelayedScaling().dot_general_cls
    x = nn.gelu(nn.Dense(F, dot_general_cls=new)(x))
    return nn.Dense(D, use_bias=False, dot_general_cls=new, name="down")(x)


def test_equals_the_hand_edited_model():
  """Both models have the same paths and the same bits for three steps."""
  case = CASES["compact"]
  variables = [
    jax.jit(m.init)(jax.random.key(0), *case.args) for m in (HandEdited(), case.converted)
  ]
  loss = lambda module, v: jnp.mean(jnp.square(module.apply(v, *case.args)))
  steps = [jax.jit(fp8.grad(functools.partial(loss, m))) for m in (HandEdited(), case.converted)]
  for _ in range(3):
    jax.tree.map(np.testing.assert_array_equal, *variables)
    variables = [step(v) for step, v in zip(steps, variables, strict=True)]


def test_a_checkpoint_without_fp8_continues_in_the_converted_module():
  case = CASES["scanned"]
  plain = jax.jit(case.model.init)(jax.random.key(0), *case.args)
  variables = fp8.upgrade_variables(case.converted, plain, *case.args)
  jax.tree.map(np.testing.assert_array_equal, plain["params"], variables["params"])
  assert modules_with_state(variables) == set(case.fp8_layers)
  jax.tree.map(np.testing.assert_array_equal, fp8.downgrade_variables(variables), plain)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_metrics_follow_the_state_through_a_scan_of_params_only(recipe):
  case = CASES["scanned"]
  config = fp8.Fp8Config(recipe=fp8.get_recipe(recipe))
  converted = fp8.fp8_linear_layers(case.model, config)
  variables = jax.jit(converted.init)(jax.random.key(0), *case.args)
  variables = fp8.add_metrics(converted, variables, *case.args)
  loss = lambda v: jnp.mean(jnp.square(converted.apply(v, *case.args)))
  rows = fp8.stats(jax.jit(fp8.grad(loss))(variables)).rows
  assert {row.layer for row in rows} == {
    f"layers[{i}]/mlp/{name}" for i in range(3) for name in ("Dense_0", "down")
  }
  assert all(row.amax > 0 and row.noise > 0 for row in rows)


def test_is_calibrated_through_a_scan():
  case = CASES["scanned"]
  variables = jax.jit(case.converted.init)(jax.random.key(0), *case.args)
  loss = lambda v, x: 1e-9 * jnp.mean(jnp.square(case.converted.apply(v, x)))
  step = jax.jit(fp8.grad(loss))
  flushed = lambda grads: [not leaf.any() for leaf in jax.tree.leaves(grads["params"]["layers"])]
  assert any(flushed(step(variables, *case.args)))
  variables = fp8.calibrate(case.converted, variables, case.args, loss, progress=False)
  assert not any(flushed(step(variables, *case.args)))


def test_variables_of_another_model_are_refused():
  case = CASES["compact"]
  other = {"params": {"Dense_0": jnp.ones(3)}, OWG: {"Dense_0": {"Fp8DotGeneral_0": {"x": 1.0}}}}
  with pytest.raises(ValueError, match=r"state for 'Dense_0', which is an array in params"):
    case.converted.apply(other, *case.args)
  with pytest.raises(ValueError, match=r"variables must be a variables dict; got <class 'list'>"):
    case.converted.apply([1.0], *case.args)
  with pytest.raises(ValueError, match=r"upgrade_variables: .*Dense_0"):
    fp8.upgrade_variables(case.converted, other, *case.args)
  without = {"params": jax.jit(case.model.init)(jax.random.key(0), *case.args)["params"]}
  with pytest.raises(ValueError, match="upgrade_variables"):
    case.converted.apply(without, *case.args)
