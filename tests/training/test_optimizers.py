"""Optax optimizers with extra arguments or wrappers see only parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_fp8 as fp8

OWG = fp8.OVERWRITE_WITH_GRADIENT
_random = np.random.default_rng(0)
X = jnp.asarray(_random.normal(size=(16, 4)).astype(np.float32))
Y = jnp.asarray(_random.normal(size=(16, 3)).astype(np.float32))
CLS = fp8.DelayedScaling(amax_history_len=4).dot_general_cls


class Model(nn.Module):
  """A float32 layer with a known optimum, and an FP8 layer."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3, name="plain")(x), nn.Dense(3, dot_general_cls=CLS, name="fp8")(x)


MODEL = Model()
VARIABLES = jax.jit(MODEL.init)(jax.random.key(0), X)


def loss_fn(variables, apply=MODEL.apply):
  """A convex loss: least squares of the float32 layer, and FP8 parameters near 1."""
  plain, through_fp8 = apply(variables, X)
  others = sum(jnp.sum((x - 1) ** 2) for x in jax.tree.leaves(variables["params"]["fp8"]))
  return jnp.mean((plain - Y) ** 2) + others + 0.0 * jnp.sum(through_fp8)


def best():
  """Returns the optimum, computed by NumPy in float64."""
  x = np.concatenate([np.asarray(X, np.float64), np.ones((16, 1))], axis=1)
  solution = np.linalg.lstsq(x, np.asarray(Y, np.float64), rcond=None)[0]
  plain = {"kernel": solution[:-1], "bias": solution[-1]}
  return {"plain": plain, "fp8": jax.tree.map(np.ones_like, VARIABLES["params"]["fp8"])}


def train(tx, steps, *, loss_fn=loss_fn, **kwargs):
  state = fp8.TrainState.create(apply_fn=MODEL.apply, params=VARIABLES, tx=tx, **kwargs)

  @jax.jit
  def step(state):
    value, grads = fp8.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads, value=value, value_fn=loss_fn)

  for _ in range(steps):
    state = step(state)
  return state


def close(params, expected, atol=2e-3):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), params, expected)


def moved(state, steps):
  """Checks that FP8 state took one step per update, and none in a line search."""
  history = np.asarray(state.params[OWG]["fp8"]["Fp8DotGeneral_0"]["input_amax_history"])
  assert np.count_nonzero(history) == min(steps, 4)
  assert set(history[history > 0]) == {np.abs(X).max()}


class TestLbfgs:
  def test_reaches_the_optimum(self):
    state = train(optax.lbfgs(), 12)
    close(state.params["params"], best())
    moved(state, 12)

  @pytest.mark.slow
  def test_is_that_of_parameters_alone(self):
    state, tx = train(optax.lbfgs(), 3), optax.lbfgs()
    params, frozen = VARIABLES["params"], {OWG: VARIABLES[OWG]}
    opt_state = tx.init(params)
    value_fn = lambda params: loss_fn({"params": params, **frozen})
    for _ in range(3):
      value, grad = jax.jit(jax.value_and_grad(value_fn))(params)
      updates, opt_state = tx.update(
        grad, opt_state, params, value=value, grad=grad, value_fn=value_fn
      )
      params = optax.apply_updates(params, updates)
    close(state.params["params"], params, atol=1e-5)

  def test_by_hand(self):
    tx, variables = optax.lbfgs(), VARIABLES
    opt_state = tx.init(fp8.partition_for_grad_overwrite(variables)[1])

    @jax.jit
    def step(variables, opt_state):
      state, rest = fp8.partition_for_grad_overwrite(variables)
      value, grads = fp8.value_and_grad(loss_fn)(variables)
      overwrite, grad = fp8.partition_for_grad_overwrite(grads)
      more = {"value": value, "grad": grad, "value_fn": lambda rest: loss_fn({**rest, **state})}
      updates, opt_state = tx.update(grad, opt_state, rest, **more)
      return fp8.apply_updates(variables, updates, overwrite), opt_state

    for _ in range(12):
      variables, opt_state = step(variables, opt_state)
    close(variables["params"], best())

  @pytest.mark.slow
  def test_through_fp8(self):
    def loss(variables):
      return jnp.mean((MODEL.apply(variables, X)[1] - Y) ** 2)

    state = train(optax.lbfgs(), 12, loss_fn=loss)
    least = np.mean(np.linalg.lstsq(np.c_[X, np.ones(16)], Y, rcond=None)[1] / 16)
    assert loss(VARIABLES) > 1.5 * least
    assert loss(state.params) < 1.05 * least

  @pytest.mark.slow
  def test_the_apply_fn_of_a_state_and_a_mapping_of_models(self):
    tree = {"one": VARIABLES, "other": VARIABLES}
    state = fp8.TrainState.create(apply_fn=MODEL.apply, params=tree, tx=optax.lbfgs())

    @jax.jit
    def step(state):
      loss = lambda tree: sum(loss_fn(v, state.apply_fn) for v in tree.values())
      value, grads = fp8.value_and_grad(loss)(state.params)
      return state.apply_gradients(grads=grads, value=value, value_fn=loss)

    for _ in range(12):
      state = step(state)
    for variables in state.params.values():
      close(variables["params"], best())

  def test_bare_parameters(self):
    layer = nn.Dense(3)
    loss = lambda params: jnp.mean((layer.apply({"params": params}, X) - Y) ** 2)
    params = VARIABLES["params"]["plain"]
    state = fp8.TrainState.create(apply_fn=layer.apply, params=params, tx=optax.lbfgs())

    @jax.jit
    def step(state):
      value, grads = jax.value_and_grad(loss)(state.params)
      return state.apply_gradients(grads=grads, value=value, value_fn=loss)

    for _ in range(8):
      state = step(state)
    close(state.params, best()["plain"])


def plateau(**kwargs):
  return optax.contrib.reduce_on_plateau(factor=0.5, patience=2, accumulation_size=1, **kwargs)


@pytest.mark.slow
def test_reduce_on_plateau_lowers_its_scale():
  state = fp8.TrainState.create(
    apply_fn=MODEL.apply, params=VARIABLES, tx=optax.chain(optax.adam(1e-3), plateau())
  )
  grads = fp8.grad(loss_fn)(VARIABLES)
  scales = []
  for value in (3.0, 2.0, 2.0, 2.0, 2.0, 2.0):
    state = state.apply_gradients(grads=grads, value=jnp.array(value))
    scales.append(float(optax.tree.get(state.opt_state, "scale")))
  assert scales == [1, 1, 1, 0.5, 0.5, 0.25]


def labels(params):
  return {name: "slow" if name == "plain" else "fast" for name in params}


WRAPPERS = {
  "chain": lambda: optax.chain(optax.clip_by_global_norm(10.0), optax.adam(0.1), plateau()),
  "MultiSteps": lambda: optax.MultiSteps(optax.chain(optax.adam(0.1), plateau()), 1),
  "MultiSteps_transformation": lambda: optax.MultiSteps(
    optax.chain(optax.adam(0.1), plateau()), 1
  ).gradient_transformation(),
  "masked": lambda: optax.chain(
    optax.adam(0.1), optax.masked(plateau(), lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
  ),
  "partition": lambda: optax.partition(
    {"slow": optax.chain(optax.adam(0.1), plateau()), "fast": optax.adam(0.1)}, labels
  ),
  "polyak_sgd": lambda: optax.polyak_sgd(0.1),
  "takes_nothing": lambda: optax.GradientTransformation(*optax.adam(0.1)[:2]),
}


@pytest.mark.parametrize(
  ("name", "skip"), [*((name, False) for name in WRAPPERS), ("chain", True), ("MultiSteps", True)]
)
def test_wrappers(name, skip):
  state = train(WRAPPERS[name](), 5, skip_nonfinite=skip)
  assert loss_fn(state.params) < loss_fn(VARIABLES)
  moved(state, 5)
  assert not any(OWG in jax.tree_util.keystr(path) for path, _ in
                 jax.tree_util.tree_leaves_with_path(state.opt_state))  # fmt: skip


def test_schedule_free():
  state = train(optax.contrib.schedule_free_adamw(0.5, weight_decay=0.0), 100)
  params = optax.contrib.schedule_free_eval_params(state.opt_state, state.params["params"])
  close(params, best(), atol=0.1)


@pytest.mark.slow
def test_a_skipped_step_keeps_the_line_search():
  state = train(optax.lbfgs(), 12, skip_nonfinite=True)
  close(state.params["params"], best())

  @jax.jit
  def bad_step(state):
    value, grads = fp8.value_and_grad(loss_fn)(state.params)
    bad = {**grads, "params": jax.tree.map(lambda g: g * jnp.nan, grads["params"])}
    return state.apply_gradients(grads=bad, value=value, value_fn=loss_fn)

  new = bad_step(state)
  assert int(new.skipped_steps) == 1
  jax.tree.map(np.testing.assert_array_equal, new.params, state.params)
  jax.tree.map(np.testing.assert_array_equal, new.opt_state, state.opt_state)


def test_grad_is_of_parameters_alone():
  seen = {}

  def update(updates, state, params=None, **extra):
    seen.update(extra, params=params)
    return jax.tree.map(jnp.zeros_like, updates), state

  tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
  state = fp8.TrainState.create(apply_fn=MODEL.apply, params=VARIABLES, tx=tx)
  value, grads = fp8.value_and_grad(loss_fn)(VARIABLES)
  state.apply_gradients(grads=grads, value=value, grad=jax.tree.map(lambda g: 2 * g, grads))
  assert set(seen) == {"value", "grad", "params"}
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), seen["grad"], grads["params"])
  seen.clear()
  state.apply_gradients(grads=grads)
  assert set(seen) == {"params"}


def test_another_name_is_no_field():
  state = fp8.TrainState.create(apply_fn=MODEL.apply, params=VARIABLES, tx=optax.adam(0.1))
  with pytest.raises(TypeError, match="batch_stat"):
    state.apply_gradients(grads=fp8.grad(loss_fn)(VARIABLES), batch_stat=1)
