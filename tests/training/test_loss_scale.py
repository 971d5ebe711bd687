"""Loss scaling follows Flax and a scalar oracle, and does not divide FP8 state."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training import dynamic_scale as reference
from jax.sharding import PartitionSpec as P

import flax_fp8 as fp8
from tests.transformations import mesh

OWG = fp8.OVERWRITE_WITH_GRADIENT
RECIPE = fp8.DelayedScaling(amax_history_len=4)
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float16)
SCALE = 2.0**12


def layer(recipe=RECIPE):
  return nn.Dense(8, dtype=jnp.float16, dot_general_cls=recipe.dot_general_cls)


MODEL = layer()
VARIABLES = jax.jit(MODEL.init)(jax.random.key(0), X)


def loss_fn(variables, x=X, recipe=RECIPE):
  return jnp.mean(jnp.sin(layer(recipe).apply(variables, x).astype(jnp.float32)))


def equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def seed_scaler(finite, *, scale, growth, backoff, interval):
  """Implements growth, backoff and interval in scalar Python; yields the scale after each step.

  The scale grows at the ``interval``-th consecutive finite step.
  """
  since = 0
  for is_finite in finite:
    if not is_finite:
      scale, since = scale * backoff, 0
    else:
      since += 1
      if since >= interval:
        scale, since = scale * growth, 0
    yield scale


FINITE = [1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 1]


@pytest.mark.parametrize(
  "fields",
  [
    {"growth_interval": 2, "scale": 8.0, "minimum_scale": None},
    {"growth_interval": 1, "growth_factor": 3.0, "backoff_factor": 0.25, "scale": 2.0**126},
    {"growth_interval": 3, "minimum_scale": 1.0, "scale": 4.0},
  ],
  ids=["plain", "factors", "minimum"],
)
def test_follows_flax_and_the_oracle(fields):
  """The oracle grows at the n-th finite step, and Flax at the step after its interval."""
  ours, theirs = fp8.DynamicScale(**fields), reference.DynamicScale(**fields)
  step = jax.jit(lambda scale, p, finite: scale.value_and_grad(lambda p: p / finite)(p))
  oracle = seed_scaler(
    FINITE,
    scale=fields["scale"],
    growth=ours.growth_factor,
    backoff=ours.backoff_factor,
    interval=ours.growth_interval + 1,
  )
  largest, smallest = float(np.finfo(np.float32).max), fields.get("minimum_scale") or 0.0
  bounded = False
  for finite, want in zip(FINITE, oracle, strict=True):
    ours, *rest = step(ours, 2.0**-130, float(finite))
    theirs, *others = step(theirs, 2.0**-130, float(finite))
    assert float(ours.scale) == float(theirs.scale)
    assert int(ours.fin_steps) == int(theirs.fin_steps)
    bounded |= not smallest <= want <= largest
    assert bounded or float(ours.scale) == want
    assert [bool(rest[0]), float(rest[2])] == [bool(others[0]), float(others[2])]
    assert bool(rest[0]) == bool(finite)
  assert bounded == (fields != {"growth_interval": 2, "scale": 8.0, "minimum_scale": None})


@functools.partial(jax.jit, static_argnums=2)
def run(dynamic_scale, variables, recipe):
  return dynamic_scale.value_and_grad(lambda v: loss_fn(v, recipe=recipe))(variables)


def scaled(cls, variables=VARIABLES, recipe=RECIPE, scale=SCALE):
  return run(cls(scale=scale), variables, recipe)


def test_state_is_that_of_the_scaled_loss():
  """Only gradients of parameters are divided. Flax's class divides state too."""
  _, finite, loss, grads = scaled(fp8.DynamicScale)
  want, new = jax.jit(fp8.value_and_grad(lambda v: SCALE * loss_fn(v)))(VARIABLES)
  assert bool(finite)
  assert float(loss) == float(want) / SCALE
  equal(grads[OWG], new[OWG])
  equal(grads["params"], jax.tree.map(lambda g: g / SCALE, new["params"]))
  theirs = scaled(reference.DynamicScale).grad
  equal(theirs[OWG], jax.tree.map(lambda leaf: leaf / SCALE, new[OWG]))


def test_finite_depends_on_parameters_only():
  grads = {"params": {"w": jnp.ones(2)}, OWG: {"dot": {"input_scale": jnp.array([jnp.inf])}}}
  _, finite, same = fp8.DynamicScale(scale=2.0).unscale(grads)
  assert bool(finite)
  equal(same, {**grads, "params": {"w": jnp.full(2, 0.5)}})
  bad = {**grads, "params": {"w": jnp.array([1.0, jnp.nan])}}
  smaller, finite, _ = fp8.DynamicScale(scale=2.0).unscale(bad)
  assert not bool(finite)
  assert float(smaller.scale) == 1.0


def test_arguments_of_value_and_grad():
  """Covers several arguments, an auxiliary output, and a float16 loss scaled in float32."""
  fun = lambda a, b, c: ((a * b * c).astype(jnp.float16), {"seen": c})
  run = fp8.DynamicScale(scale=2.0**10).value_and_grad(fun, argnums=(0, 2), has_aux=True)
  _, finite, (loss, aux), grads = run(jnp.float32(2), jnp.float32(3), jnp.float32(50))
  assert [float(g) for g in grads] == [150.0, 6.0]
  assert (float(loss), float(aux["seen"]), bool(finite)) == (300.0, 50.0, True)


def test_over_a_mapped_axis():
  """Averages gradients, takes the maximum of state, and is finite only if all parts are."""
  grads = {"params": jnp.array([[2.0, 4.0], [6.0, 8.0]]), OWG: jnp.array([[1.0, 5.0], [3.0, 2.0]])}
  run = jax.vmap(lambda g: fp8.DynamicScale(scale=2.0).unscale(g, "i"), axis_name="i")
  scale, finite, got = run(grads)
  equal(got, {"params": jnp.array([[2.0, 3.0]] * 2), OWG: jnp.array([[3.0, 5.0]] * 2)})
  assert finite.tolist() == [True, True]
  scale, finite, _ = run({**grads, "params": grads["params"].at[1, 0].set(jnp.inf)})
  assert finite.tolist() == [False, False]
  assert scale.scale.tolist() == [1.0, 1.0]


def test_on_devices():
  """Inside an unchecked shard_map, gradients and amaxes are those of the whole batch."""

  def local(variables, x):
    run = fp8.DynamicScale(scale=SCALE).value_and_grad(loss_fn, axis_name="data")
    _, finite, loss, grads = run(variables, x)
    return finite, jax.lax.pmean(loss, "data"), grads

  run = jax.shard_map(local, mesh=mesh(), in_specs=(P(), P("data")), out_specs=P(), check_vma=False)
  finite, loss, grads = jax.jit(run)(VARIABLES, X)
  _, _, want_loss, want = scaled(fp8.DynamicScale)
  assert bool(finite)
  assert float(loss) == pytest.approx(float(want_loss), rel=1e-4)
  for role in ("input", "kernel"):
    name = f"{role}_amax_history"
    equal(*(g[OWG]["Fp8DotGeneral_0"][name] for g in (grads, want)))
  # Output gradients in E5M2 are four times as large as those of the whole batch.
  a, b = (np.ravel(g["params"]["kernel"]) for g in (grads, want))
  assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b)


class State(fp8.TrainState):
  """A training state with the loss scale, so that checkpoints contain it."""

  dynamic_scale: fp8.DynamicScale


TX = optax.adam(1e-2)


def create(**fields):
  return State.create(
    apply_fn=MODEL.apply,
    params=VARIABLES,
    tx=TX,
    skip_nonfinite=True,
    dynamic_scale=fp8.DynamicScale(growth_interval=2, **fields),
  )


@jax.jit
def train_step(state, x):
  run = state.dynamic_scale.value_and_grad(lambda v: loss_fn(v, x))
  scale, _, loss, grads = run(state.params)
  return state.apply_gradients(grads=grads, dynamic_scale=scale), loss


def test_a_run_that_overflows_backs_off_and_grows_again():
  """The first steps overflow in the float16 backward pass and are skipped."""
  state, scales = create(scale=2.0**24), []
  for _ in range(14):
    before = state
    state, loss = train_step(state, X)
    assert np.isfinite(loss)
    scales.append(float(state.dynamic_scale.scale / before.dynamic_scale.scale))
    if scales[-1] < 1:
      equal((state.params, state.opt_state), (before.params, before.opt_state))
  assert scales[:3] == [0.5] * 3
  assert scales.count(2.0) > 1
  assert scales.count(0.5) == int(state.skipped_steps)
  assert int(state.step) == 14
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


def test_microbatches_are_unscaled_once():
  """``unscale`` after ``accumulate_gradients`` gives the gradients of the whole batch."""
  scale, halves = fp8.DynamicScale(scale=SCALE), X.reshape(2, -1, X.shape[-1])

  @jax.jit
  def step(variables):
    loss, grads = fp8.accumulate_gradients(
      lambda v, x: scale.scale * loss_fn(v, x), variables, halves
    )
    return loss / scale.scale, *scale.unscale(grads)

  loss, following, finite, grads = step(VARIABLES)
  whole = scaled(fp8.DynamicScale)
  assert bool(finite)
  assert int(following.fin_steps) == int(whole.dynamic_scale.fin_steps) == 1
  np.testing.assert_allclose(loss, whole.aux, rtol=1e-3)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3),
    grads["params"],
    whole.grad["params"],
  )
  state = [tree[OWG]["Fp8DotGeneral_0"] for tree in (grads, whole.grad)]
  for name in ("input", "kernel"):
    equal(*(each[f"{name}_amax_history"] for each in state))
  got, want = (each["output_grad_amax_history"][0] for each in state)
  np.testing.assert_allclose(got, want, rtol=1e-2)
  infinite = jax.jit(lambda v: fp8.DynamicScale().unscale(jax.tree.map(lambda x: x + jnp.inf, v)))
  assert not bool(infinite({"params": VARIABLES["params"]})[1])


def test_round_trips(tmp_path):
  """A state dict and a checkpoint keep the scale, its steps, and the skipped steps."""
  state = train_step(train_step(create(scale=2.0**24), X)[0], X)[0]
  assert int(state.skipped_steps) == 2
  equal(serialization.from_state_dict(create(), serialization.to_state_dict(state)), state)
  fp8.save_checkpoint(tmp_path / "saved", state)
  target = jax.tree.map(jnp.zeros_like, state)
  equal(fp8.restore_checkpoint(tmp_path / "saved", target).tree, state)


def saturated_after_growth(recipe):
  """Returns the fraction of output gradients that saturate after the scale doubled."""
  variables = fp8.add_metrics(layer(recipe), layer(recipe).init(jax.random.key(0), X), X)
  for scale in (SCALE, SCALE, 2 * SCALE, 2 * SCALE):
    grads = scaled(fp8.DynamicScale, variables, recipe, scale).grad
    variables = {**variables, OWG: grads[OWG]}
    yield float(grads[OWG]["Fp8DotGeneral_0"]["output_grad_saturated"][0])


@pytest.mark.parametrize(
  ("fields", "saturates"),
  [({}, True), ({"margin": 1}, False), ({"overflow": "current"}, False)],
  ids=["plain", "margin", "overflow"],
)
def test_the_step_after_growth(fields, saturates):
  """For one step, a delayed scale is half of what is needed, unless an option prevents it."""
  _, before, grown, after = saturated_after_growth(fp8.DelayedScaling(amax_history_len=4, **fields))
  assert (before, after) == (0.0, 0.0)
  assert (grown > 0.1) == saturates
