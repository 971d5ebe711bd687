"""Accumulated gradients equal those of the whole batch, and state takes one step."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import flax_fp8 as fp8

OWG = fp8.OVERWRITE_WITH_GRADIENT
RECIPE = fp8.DelayedScaling(amax_history_len=4, power_of_two=True)
MICROBATCHES, BATCH, WIDTH = 4, 2, 8


class Model(nn.Module):
  """Two layers. The first is called twice."""

  @nn.compact
  def __call__(self, x):
    first = nn.Dense(WIDTH, dot_general_cls=RECIPE.dot_general_cls)
    x = nn.relu(first(nn.relu(first(x))))
    return nn.Dense(WIDTH, dot_general_cls=RECIPE.dot_general_cls)(x)


model = Model()
X = np.random.default_rng(0).normal(size=(MICROBATCHES, BATCH, WIDTH))
X = jnp.asarray(X * np.array([1.0, 4.0, 2.0, 0.5]).reshape(-1, 1, 1), jnp.float32)
VARIABLES = jax.jit(model.init)(jax.random.key(1), X[0])
OLD = jax.jit(fp8.grad(lambda v: jnp.sum(model.apply(v, 2 * X[1]) ** 2)))(VARIABLES)[OWG]
VARIABLES = {**VARIABLES, OWG: OLD}


def loss_fn(variables, x):
  return jnp.mean(jnp.square(model.apply(variables, x)))


def whole(variables, x):
  return loss_fn(variables, x.reshape(-1, WIDTH))


def assert_same(got, want, rtol=1e-5):
  jax.tree.map(np.testing.assert_array_equal, got[OWG], want[OWG])
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)
  jax.tree.map(close, got["params"], want["params"])


@pytest.fixture(scope="module")
def of_the_whole():
  return jax.jit(fp8.value_and_grad(whole))(VARIABLES, X)


def test_is_the_whole_batch(of_the_whole):
  got = jax.jit(lambda v: fp8.accumulate_gradients(loss_fn, v, X))(VARIABLES)
  np.testing.assert_allclose(got[0], of_the_whole[0], rtol=1e-6)
  assert_same(got[1], of_the_whole[1])


def test_sums_and_stacks_auxiliary_outputs(of_the_whole):
  with_aux = lambda v, x: (loss_fn(v, x) / MICROBATCHES, {"x": x[0]})
  run = jax.jit(lambda v: fp8.accumulate_gradients(with_aux, v, X, has_aux=True, reduction="sum"))
  (loss, aux), grads = run(VARIABLES)
  np.testing.assert_allclose(loss, of_the_whole[0], rtol=1e-6)
  np.testing.assert_array_equal(aux["x"], X[:, 0])
  assert_same(grads, of_the_whole[1])


def test_keys_are_sliced_like_data():
  keys = jax.random.split(jax.random.key(2), MICROBATCHES)

  def draws(variables, microbatch):
    return jnp.sum(variables * jax.random.normal(microbatch["key"])), microbatch["x"]

  run = lambda v: fp8.accumulate_gradients(draws, v, {"key": keys, "x": X}, has_aux=True)
  (_, x), grad = run(jnp.float32(1.0))
  np.testing.assert_allclose(grad, jnp.mean(jax.vmap(jax.random.normal)(keys)), rtol=1e-6)
  np.testing.assert_array_equal(x, X)


def test_a_state_that_no_microbatch_uses_stays():
  unused = {"other": {"input_scale": jnp.full((1,), 3.0)}, **OLD}
  variables = {**VARIABLES, OWG: unused}
  _, grads = fp8.accumulate_gradients(loss_fn, variables, X)
  assert float(grads[OWG]["other"]["input_scale"][0]) == 3.0


def test_a_state_that_one_microbatch_uses_takes_its_step():
  def sometimes(variables, microbatch):
    x, used = microbatch
    return jax.lax.cond(used, lambda: loss_fn(variables, x), lambda: jnp.float32(0))

  used = jnp.arange(MICROBATCHES) == 2
  run = jax.jit(lambda v: fp8.accumulate_gradients(sometimes, v, (X, used), reduction="sum")[1])
  assert_same(run(VARIABLES), jax.jit(fp8.grad(loss_fn))(VARIABLES, X[2]))


def test_a_microbatch_that_is_not_finite_leaves_the_state_finite(of_the_whole):
  broken = X.at[2, 0, 0].set(jnp.nan)
  loss, grads = jax.jit(lambda v: fp8.accumulate_gradients(loss_fn, v, broken))(VARIABLES)
  assert jnp.isnan(loss)
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads[OWG]))
  # The largest amax is in another microbatch.
  got, want = (g[OWG]["Dense_0"]["Fp8DotGeneral_0"] for g in (grads, of_the_whole[1]))
  np.testing.assert_array_equal(got["input_amax_history"], want["input_amax_history"])


def test_sums_are_float32_and_gradients_of_the_parameters_dtype():
  w = jnp.bfloat16(1.0)
  # In bfloat16, 256 + 1 + 1 + ... stays 256.
  microbatches = jnp.array([256.0] + [1.0] * 64, jnp.bfloat16)
  run = lambda v: fp8.accumulate_gradients(lambda w, x: w * x, v, microbatches, reduction="sum")
  assert run(w)[1] == jnp.bfloat16(320)
  assert run(w)[1].dtype == jnp.bfloat16


# Masked tokens: each microbatch has another number of tokens.
MASK = np.zeros((MICROBATCHES, BATCH * WIDTH), np.float32)
for _row, _tokens in zip(MASK, (2, 8, 4, 2), strict=True):
  _row[:_tokens] = 1
MASK = jnp.asarray(MASK.reshape(X.shape))
TOKENS = jnp.sum(MASK, axis=(1, 2))


def masked_mean(variables, microbatch, apply=model.apply):
  error = jnp.square(apply(variables, microbatch["x"])) * microbatch["mask"]
  return jnp.sum(error) / jnp.sum(microbatch["mask"])


def flattened(microbatches):
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), microbatches)


of_all_tokens = jax.jit(fp8.value_and_grad(masked_mean))


class TestWeights:
  @pytest.mark.parametrize("dtype", [jnp.int32, jnp.bfloat16])
  def test_is_one_pass_over_all_tokens(self, dtype):
    batch = {"x": X, "mask": MASK}
    want = of_all_tokens(VARIABLES, flattened(batch))
    run = lambda v: fp8.accumulate_gradients(masked_mean, v, batch, weights=TOKENS.astype(dtype))
    got = jax.jit(run)(VARIABLES)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    assert_same(
      got[1], want[1]
    )  # the numbers of tokens are powers of two, so state is equal bit for bit

  def test_weights_in_float64_against_plain_jax(self):
    """Uses a model without FP8, because FP8 does not compute in float64."""
    with jax.enable_x64(True):
      layer = nn.Dense(WIDTH, param_dtype=jnp.float64)
      x = jax.random.normal(jax.random.key(3), X.shape, jnp.float64)
      mask = jax.random.bernoulli(jax.random.key(4), 0.4, X.shape).astype(jnp.float64)
      batch, tokens = {"x": x, "mask": mask}, jnp.sum(mask, axis=(1, 2)).astype(int)
      assert len(set(tokens.tolist())) > 1
      variables = layer.init(jax.random.key(1), x[0])
      mean = lambda v, m: masked_mean(v, m, layer.apply)
      want = jax.value_and_grad(mean)(variables, flattened(batch))
      got = fp8.accumulate_gradients(mean, variables, batch, weights=tokens)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-15)
    jax.tree.map(close, got, want)

  def test_a_microbatch_without_tokens_adds_nothing(self):
    """Its mean is NaN, but its input still counts for amaxes."""
    batch = {"x": X, "mask": MASK.at[1].set(0)}
    want = of_all_tokens(VARIABLES, flattened(batch))
    assert jnp.isnan(masked_mean(VARIABLES, jax.tree.map(lambda x: x[1], batch)))
    weights = TOKENS.at[1].set(0)
    run = lambda v: fp8.accumulate_gradients(masked_mean, v, batch, weights=weights)
    got = jax.jit(run)(VARIABLES)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    assert_same(got[1], want[1])

  def test_equal_weights_are_the_mean(self, of_the_whole):
    with_aux = lambda v, x: (loss_fn(v, x), x[0])
    (loss, aux), grads = fp8.accumulate_gradients(
      with_aux, VARIABLES, X, has_aux=True, weights=np.full(MICROBATCHES, 3)
    )
    np.testing.assert_allclose(loss, of_the_whole[0], rtol=1e-6)
    np.testing.assert_array_equal(aux, X[:, 0])
    assert_same(grads, of_the_whole[1])

  @pytest.mark.parametrize(
    ("weights", "reduction", "got"),
    [
      (jnp.ones(3), "mean", r"shape \(3,\) and dtype float32 for 4 microbatches"),
      (1.0, "mean", r"shape \(\) and dtype float32"),
      (jnp.ones(4, jnp.complex64), "mean", "dtype complex64"),
      (jnp.ones(4), "sum", "reduction='sum'"),
    ],
  )
  def test_bad_weights(self, weights, reduction, got):
    message = rf"accumulate_gradients: weights must be one real number per .*got .*{got}.*Pass"
    with pytest.raises(ValueError, match=message):
      fp8.accumulate_gradients(loss_fn, VARIABLES, X, reduction=reduction, weights=weights)


@pytest.mark.parametrize("check_vma", [True, False])
def test_under_shard_map(of_the_whole, check_vma):
  mesh = jax.make_mesh((BATCH,), ("data",), axis_types=(AxisType.Auto,))

  def local(variables, x):
    loss, grads = fp8.accumulate_gradients(loss_fn, variables, x)
    if not check_vma:  # a checked shard_map already sums the gradients of replicated parameters
      grads = {**grads, "params": jax.lax.psum(grads["params"], "data")}
    grads["params"] = jax.tree.map(lambda g: g / BATCH, grads["params"])
    return jax.lax.pmean(loss, "data"), grads

  specs = {"in_specs": (P(), P(None, "data")), "out_specs": P()}
  run = jax.jit(jax.shard_map(local, mesh=mesh, check_vma=check_vma, **specs))
  loss, grads = run(VARIABLES, X)
  want = of_the_whole[1]
  np.testing.assert_allclose(loss, of_the_whole[0], rtol=1e-6)
  # Each device differentiates the mean of its part: output gradients are twice as large.
  twice = lambda path, leaf: leaf.at[0].mul(BATCH) if "output_grad_amax" in str(path[-1]) else leaf
  want = {**want, OWG: jax.tree_util.tree_map_with_path(twice, want[OWG])}
  assert_same(grads, want)


def test_on_a_mesh_with_explicit_axes(of_the_whole):
  mesh = jax.make_mesh((BATCH, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
  by_columns = lambda leaf: P(None, "model") if leaf.shape == (WIDTH, WIDTH) else P()
  with jax.set_mesh(mesh):
    v = jax.tree.map(lambda a: jax.device_put(a, by_columns(a)), VARIABLES)
    x = jax.device_put(X, P(None, "data"))
    loss, grads = jax.jit(lambda v, x: fp8.accumulate_gradients(loss_fn, v, x))(v, x)
  np.testing.assert_allclose(loss, of_the_whole[0], rtol=1e-6)
  assert_same(grads, of_the_whole[1])


def test_with_multi_steps_each_microbatch_is_a_step_of_the_state():
  tx = optax.MultiSteps(optax.sgd(1.0), every_k_schedule=MICROBATCHES)
  create = lambda tx: fp8.TrainState.create(apply_fn=model.apply, params=VARIABLES, tx=tx)
  step = jax.jit(lambda s, x: s.apply_gradients(grads=fp8.grad(loss_fn)(s.params, x)))
  state = create(tx.gradient_transformation())
  for x in X:
    before, state = state, step(state, x)
  histories = lambda s: s.params[OWG]["Dense_0"]["Fp8DotGeneral_0"]["kernel_amax_history"]
  # The kernel is the same in all microbatches, so its amax fills the history.
  kernel = jnp.abs(VARIABLES["params"]["Dense_0"]["kernel"]).max()
  np.testing.assert_array_equal(histories(state), jnp.full(4, kernel))
  unchanged = lambda a, b: np.testing.assert_array_equal(a, b)
  jax.tree.map(unchanged, before.params["params"], VARIABLES["params"])
  assert all(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(state.opt_state.acc_grads)) is False
  at_once = create(optax.sgd(1.0))
  grads = jax.jit(lambda v: fp8.accumulate_gradients(loss_fn, v, X)[1])(VARIABLES)
  at_once = at_once.apply_gradients(grads=grads)
  # Scales change during the accumulation: gradients agree up to the error of FP8.
  leaves = zip(*(jax.tree.leaves(s.params["params"]) for s in (state, at_once)), strict=True)
  for got, want in leaves:
    assert jnp.linalg.norm(got - want) < 0.2 * jnp.linalg.norm(want) + 1e-6
