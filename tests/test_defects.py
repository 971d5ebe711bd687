"""What ``flax.linen.fp8_ops`` gets wrong: each check passes on ours and fails on Flax's.

The table in docs/coming_from/flax_fp8_ops.md lists the same checks. If a check starts to pass on
Flax's, Flax has fixed the bug. Then remove the row and the check.
"""

from __future__ import annotations

import functools
import subprocess
import sys

import flax.linen as nn
import flax.linen.fp8_ops as reference
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P

import flax_fp8 as fp8
from flax_fp8 import fp8_ops
from tests import oracle
from tests.transformations import mesh

OWG = fp8.OVERWRITE_WITH_GRADIENT
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 16)), jnp.float32)
AMAX = float(jnp.abs(X).max())


def layer(ops, features=8, name=None, **options):
  cls = lambda: ops.Fp8DotGeneral(amax_history_length=8, name="dot", **options)
  return nn.Dense(features, use_bias=False, dot_general_cls=cls, name=name)


def variables_of(module, x=X, kernel=None):
  variables = module.init(jax.random.key(0), x)
  return variables if kernel is None else {**variables, "params": {"kernel": kernel}}


def step(ops, variables, x, loss=lambda out: jnp.sum(jnp.sin(out)), **options):
  """State after a step of one layer."""
  module = layer(ops, variables["params"]["kernel"].shape[1], **options)
  return jax.jit(jax.grad(lambda v: loss(module.apply(v, x))))(variables)[OWG]["dot"]


def history_is(state, amax):
  assert float(state["input_scale"][0]) == 1.0
  assert float(state["input_amax_history"][0]) == pytest.approx(amax)


def reuse(ops):
  """A layer called several times has the largest amax of its calls."""

  class Model(nn.Module):
    @nn.compact
    def __call__(self, xs):
      dense = layer(ops, name="layer")
      return sum(jnp.sum(jnp.sin(dense(x))) for x in xs)

  model = Model()
  grads = jax.jit(jax.grad(lambda v: model.apply(v, X)))(model.init(jax.random.key(0), X))
  history_is(grads[OWG]["layer"]["dot"], AMAX)


def shared_under_vmap(ops):
  """A layer shared by a mapped batch has the largest amax of the batch."""
  module = layer(ops)
  loss = lambda v: jnp.sum(jnp.sin(jax.vmap(module.apply, in_axes=(None, 0))(v, X)))
  history_is(jax.jit(jax.grad(loss))(variables_of(module))[OWG]["dot"], AMAX)


def cast_shared_under_vmap(ops):
  """The same with the state cast to fp32_max_grad."""
  module = layer(ops)

  def loss(v):
    state = jax.tree.map(lambda leaf: leaf.astype(ops.fp32_max_grad), v[OWG])
    mapped = jax.vmap(module.apply, in_axes=(None, 0))
    return jnp.sum(jnp.sin(mapped({**v, OWG: state}, X)))

  history_is(jax.jit(jax.grad(loss))(variables_of(module))[OWG]["dot"], AMAX)


def cast_without_jit(ops):
  """State cast to fp32_max_grad and used twice, outside jit."""

  def loss(scale, history):
    scale, history = (leaf.astype(ops.fp32_max_grad) for leaf in (scale, history))
    use = lambda x: ops.in_qdq(jnp.float32, jnp.float8_e4m3fn, x, scale, history)
    return use(jnp.float32(2)) + use(jnp.float32(3))

  grads = jax.grad(loss, (0, 1))(jnp.float32(1), jnp.zeros(4))
  np.testing.assert_array_equal(grads[1], [3.0, 0.0, 0.0, 0.0])


def _sharded(ops, check_vma):
  module = layer(ops)

  def local(v, x):
    return jax.lax.psum(jnp.sum(jnp.sin(module.apply(v, x))), "data")

  loss = jax.shard_map(
    local, mesh=mesh(), in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma
  )
  grads = jax.jit(jax.grad(lambda v: loss(v, X)))(variables_of(module))
  history_is(grads[OWG]["dot"], AMAX)


def shard_map_checked(ops):
  """``shard_map(check_vma=True)``: works, with the global amax."""
  _sharded(ops, True)


def shard_map_unchecked(ops):
  """``shard_map(check_vma=False)``: the global amax, scale 1."""
  _sharded(ops, False)


def nan_batch(ops):
  """One NaN in one batch: the state stays finite, the scale recovers at the next step."""
  variables = variables_of(layer(ops))
  batches = [X, X.at[0, 0, 0].set(jnp.nan), X * 2, X * 2]
  for batch in batches:
    variables = {**variables, OWG: {"dot": step(ops, variables, batch)}}
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(variables[OWG]))
  scale = float(variables[OWG]["dot"]["input_scale"][0])
  assert scale == pytest.approx(2 * AMAX / 448, rel=1e-6)


def inf_in_an_activation(ops):
  """An infinity in an activation reaches the output, from which a loss scaler sees it."""
  module = layer(ops)
  out = module.apply(variables_of(module), X.at[1, 2, 3].set(jnp.inf))
  spoiled = ~np.all(np.isfinite(out), axis=-1)
  assert spoiled.sum() == 1
  assert spoiled[1, 2]


def inf_in_an_output_gradient(ops):
  """An infinity in an output gradient, float16 that overflowed say, reaches the kernel's."""
  module = layer(ops)
  variables = variables_of(module)
  out, vjp = jax.vjp(lambda v: module.apply(v, X), variables)
  grads = vjp(jnp.ones_like(out).at[1, 2, 3].set(jnp.inf))[0]
  spoiled = ~np.all(np.isfinite(grads["params"]["kernel"]), axis=0)
  np.testing.assert_array_equal(spoiled, np.arange(8) == 3)


@functools.cache
def gain_error(ops):
  """Gain of a bf16 GEMM against the same FP8 GEMM in float64, at worst over 40 draws."""
  module = layer(ops, 64).clone(dtype=jnp.bfloat16)
  worst = 0.0
  variables = module.init(jax.random.key(0), jnp.zeros((64, 128), jnp.bfloat16))
  apply = jax.jit(module.apply)
  for seed in range(40):
    random = np.random.default_rng(seed)
    x = jnp.asarray(random.normal(size=(64, 128)), jnp.bfloat16)
    w = jnp.asarray(random.normal(size=(128, 64)), jnp.bfloat16)
    amax = {"input": random.uniform(3, 6), "kernel": random.uniform(3, 6)}
    dot = {**variables[OWG]["dot"]}
    for role, value in amax.items():
      dot[f"{role}_amax_history"] = dot[f"{role}_amax_history"].at[0].set(value)
    got = np.float64(apply({"params": {"kernel": w}, OWG: {"dot": dot}}, x))
    name = "float8_e4m3fn"
    qx, qw = (
      oracle.qdq(np.float32(t), np.float32(amax[r]) / np.float32(448), name)
      for t, r in ((x, "input"), (w, "kernel"))
    )
    want = qx @ qw
    worst = max(worst, abs(float((got * want).sum() / (want * want).sum()) - 1))
  return worst


def bf16_gain(ops):
  """In bf16 the scales keep float32's precision: gain error below 0.05 %."""
  assert gain_error(ops) < 0.0005


def fp16_overflow(ops):
  """float16 with K=4096: the unscaled product exceeds float16, the result does not."""
  module = layer(ops).clone(dtype=jnp.float16)
  x = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1, size=(8, 4096)), jnp.float16)
  variables = variables_of(module, x, jnp.full((4096, 8), 1e-3))
  state = jax.tree.map(jnp.asarray, variables[OWG])
  for role, amax in (("input", 1.0), ("kernel", 1e-3)):
    state["dot"][f"{role}_amax_history"] = state["dot"][f"{role}_amax_history"].at[0].set(amax)
  out = module.apply({**variables, OWG: state}, x)
  want = np.float64(x) @ np.full((4096, 8), 1e-3)
  np.testing.assert_allclose(np.float64(out), want, rtol=0.05)


def fnuz(ops):
  """The dtypes of the fields are those of the GEMM."""
  module = layer(ops, e4m3_dtype=jnp.float8_e4m3fnuz, e5m2_dtype=jnp.float8_e5m2fnuz)
  variables = variables_of(module)
  text = str(jax.make_jaxpr(jax.grad(lambda v: jnp.sum(jnp.sin(module.apply(v, X)))))(variables))
  assert "f8_e4m3fnuz" in text
  assert "f8_e4m3fn[" not in text


def fnuz_only_forward(ops):
  """One dtype changed alone is honoured too, and its maximum scales."""
  variables = variables_of(layer(ops))
  for _ in range(2):
    state = step(ops, variables, X, e4m3_dtype=jnp.float8_e4m3fnuz)
    variables = {**variables, OWG: {"dot": state}}
  assert float(state["input_scale"][0]) == pytest.approx(AMAX / 240, rel=1e-6)


def _amax_of(ops, factor):
  variables = variables_of(layer(ops), kernel=jnp.ones((16, 8)))
  for _ in range(3):
    state = step(
      ops, variables, X * jnp.float32(factor), loss=lambda out: jnp.sum(out * X[0, 0, 0])
    )
    variables = {**variables, OWG: {"dot": state}}
  out = layer(ops).apply(variables, X * jnp.float32(factor))
  assert 2.0**-126 <= float(state["input_scale"][0]) <= 2.0**126
  assert np.all(np.isfinite(out))


def tiny_amax(ops):
  """Values near the smallest float32: no zero scale, no 0/0."""
  _amax_of(ops, 1e-37)


def mislabelled_einsum(ops):
  """A transposed output leaves input and kernel what they are."""
  module = ops.Fp8Einsum(amax_history_length=4)
  x, w = jnp.full((2, 3), 5.0), jnp.full((3, 4), 7.0)
  variables = module.init(jax.random.key(0), "mk,kn->nm", x, w)
  grads = jax.grad(lambda v: jnp.sum(module.apply(v, "mk,kn->nm", x, w)))(variables)
  assert float(grads[OWG]["input_amax_history"][0]) == 5.0


def scalar_result(ops):
  """An einsum down to a scalar."""
  module = ops.Fp8Einsum(amax_history_length=4)
  out, _ = module.init_with_output(jax.random.key(0), "k,k->", jnp.ones(3), jnp.ones(3))
  assert float(out) == 3.0


def all_saved_by_remat(ops):
  """A policy by which ``nn.remat`` saves everything changes nothing.

  What is saved and used as well passes through ``reduce_precision``, which makes NaN of E4M3's
  values above 240.
  """

  def loss_of(block):
    class Model(nn.Module):
      @nn.compact
      def __call__(self, x):
        return jnp.sum(jnp.sin(block(name="block")(jnp.sin(x))))

    model = Model()
    variables = model.init(jax.random.key(0), X)
    state = jax.tree.map(jnp.asarray, variables[OWG])
    found = state["block"]["layer"]["dot"]
    found["input_amax_history"] = found["input_amax_history"].at[0].set(1.0)
    return jax.jit(jax.value_and_grad(model.apply))({**variables, OWG: state}, X)

  class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.silu(layer(ops, name="layer")(x))

  policy = jax.checkpoint_policies.everything_saveable
  want, got = loss_of(Block), loss_of(nn.remat(Block, policy=policy))
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5)


CHECKS = [
  reuse, shared_under_vmap, cast_shared_under_vmap, cast_without_jit, shard_map_checked,
  shard_map_unchecked, nan_batch, inf_in_an_activation, inf_in_an_output_gradient, bf16_gain,
  fp16_overflow, fnuz, fnuz_only_forward, tiny_amax, mislabelled_einsum, scalar_result,
  all_saved_by_remat,
]  # fmt: skip


@pytest.mark.parametrize(
  "check",
  [pytest.param(bf16_gain, marks=pytest.mark.slow) if c is bf16_gain else c for c in CHECKS],
  ids=lambda check: check.__name__,
)
def test_ours_is_right(check):
  check(fp8_ops)


@pytest.mark.parametrize(
  "check", [c for c in CHECKS if c is not cast_without_jit], ids=lambda check: check.__name__
)
@pytest.mark.filterwarnings("ignore")
def test_flax_is_wrong(check):
  with pytest.raises((AssertionError, TypeError, ValueError)):
    check(reference)


def test_flax_is_wrong_without_jit():
  """In a process of its own: importing flax_fp8 mends eager accumulation for Flax's dtype too."""
  program = """
import jax, jax.numpy as jnp
from flax.linen import fp8_ops as ops
def loss(scale, history):
  scale, history = (leaf.astype(ops.fp32_max_grad) for leaf in (scale, history))
  use = lambda x: ops.in_qdq(jnp.float32, jnp.float8_e4m3fn, x, scale, history)
  return use(jnp.float32(2)) + use(jnp.float32(3))
jax.grad(loss, (0, 1))(jnp.float32(1), jnp.zeros(4))
"""
  run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
  assert run.returncode != 0
  assert "KeyError" in run.stderr


def test_huge_amax():
  """Ours alone: Flax's ops are right here too."""
  _amax_of(fp8_ops, 1e36)


def test_missing_collection_says_what_to_do():
  module = layer(fp8_ops)
  with pytest.raises(ValueError, match=r"upgrade_variables"):
    module.apply({"params": variables_of(module)["params"]}, X)


def train_once(create, variables):
  """One step of a TrainState, on a state with another collection beside."""
  state = create(apply_fn=None, params=variables, tx=optax.sgd(0.1))
  return state.apply_gradients(grads=jax.tree.map(jnp.ones_like, variables)).params


def test_other_collections_survive_a_step():
  """Flax's TrainState rebuilds its params of two collections and drops the rest."""
  variables = {**variables_of(layer(fp8_ops)), "batch_stats": {"mean": jnp.zeros(3)}}
  assert "batch_stats" not in train_once(TrainState.create, variables)
  np.testing.assert_array_equal(
    train_once(fp8.TrainState.create, variables)["batch_stats"]["mean"], np.zeros(3)
  )


@pytest.mark.slow
def test_gain_errors_side_by_side():
  """The figures that the table in docs/coming_from/flax_fp8_ops.md quotes."""
  ours, theirs = gain_error(fp8_ops), gain_error(reference)
  assert ours < 0.0005 < 0.003 < theirs
