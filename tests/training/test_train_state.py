"""``TrainState`` against Flax's, and what it must not change."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training import train_state as reference

import flax_fp8 as fp8
from tests.transformations import X as BATCHES

OWG = fp8.OVERWRITE_WITH_GRADIENT
X = jnp.asarray(BATCHES[0])
CLS = fp8.DelayedScaling(amax_history_len=4).dot_general_cls


class Model(nn.Module):
  """An FP8 layer, a batch norm, and a plain layer."""

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(8, dot_general_cls=CLS)(x)
    x = nn.BatchNorm(use_running_average=not train)(x)
    return nn.Dense(4)(x)


MODEL = Model()
VARIABLES = jax.jit(MODEL.init)(jax.random.key(0), X)
TX = optax.chain(
  optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1), optax.ema(0.9)
)


def create(cls=fp8.TrainState, params=VARIABLES, **fields):
  return cls.create(apply_fn=MODEL.apply, params=params, tx=TX, **fields)


def step(state, differentiate=fp8.grad):
  loss = lambda variables: jnp.sum(jnp.sin(state.apply_fn(variables, X)))
  return state.apply_gradients(grads=differentiate(loss)(state.params))


def equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_two_applies_of_one_model_keep_state_finite():
  """A discriminator on real and fake data with ``jax.grad`` must not double its amax."""
  state = create()

  @jax.jit
  def train(state):
    loss = lambda v: jnp.sum(state.apply_fn(v, X)) + jnp.sum(jnp.sin(state.apply_fn(v, -X)))
    return state.apply_gradients(grads=jax.grad(loss)(state.params))

  for _ in range(6):
    state = train(state)
  history = state.params[OWG]["Dense_0"]["Fp8DotGeneral_0"]["input_amax_history"]
  np.testing.assert_array_equal(history, np.full(4, np.abs(X).max()))


def test_variables_of_several_models():
  """The optimizer gets only parameters; each model trains as if it were alone."""
  both = {"one": VARIABLES, "two": {"deep": jax.tree.map(lambda leaf: leaf, VARIABLES)}}
  tx = optax.sgd(0.1)
  state = fp8.TrainState.create(apply_fn=MODEL.apply, params=both, tx=optax.adam(0.1))
  names = {str(path[-1]) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)}
  assert not any("amax_history" in name for name in names)
  state = state.replace(tx=tx, opt_state=tx.init({"one": VARIABLES["params"]}))
  loss = lambda v: (
    jnp.sum(state.apply_fn(v["one"], X)) + jnp.sum(jnp.sin(state.apply_fn(v["two"]["deep"], 2 * X)))
  )
  new = jax.jit(lambda s: s.apply_gradients(grads=jax.grad(loss)(s.params)))(state).params
  alone = fp8.TrainState.create(apply_fn=MODEL.apply, params=VARIABLES, tx=tx)
  grads = jax.grad(lambda v: jnp.sum(alone.apply_fn(v, X)))(alone.params)
  want = jax.jit(lambda s, g: s.apply_gradients(grads=g))(alone, grads).params
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), new["one"], want)
  deep = new["two"]["deep"][OWG]["Dense_0"]["Fp8DotGeneral_0"]
  assert float(deep["input_amax_history"][0]) == 2 * np.abs(X).max()


def test_state_that_an_optimizer_would_get_is_refused():
  with pytest.raises(ValueError, match=r"TrainState.create: FP8 state .* params of tuple"):
    create(params=(VARIABLES, VARIABLES))
  state = create(params={"one": VARIABLES})
  with pytest.raises(ValueError, match=r"apply_gradients: grads must hold 'one', as params does"):
    state.apply_gradients(grads={})
  with pytest.raises(
    ValueError, match=rf"grads must hold the collection '{OWG}', as params\['one'\] does"
  ):
    state.apply_gradients(grads={"one": {"params": VARIABLES["params"]}})


def test_parameters_follow_flax_exactly():
  """Parameters and optimizer state equal those of Flax with only parameters."""
  ours = create()
  theirs = reference.TrainState.create(apply_fn=None, params=VARIABLES["params"], tx=TX)
  for _ in range(3):
    grads = fp8.grad(lambda v: jnp.sum(jnp.sin(MODEL.apply(v, X))))(ours.params)
    ours = ours.apply_gradients(grads=grads)
    theirs = theirs.apply_gradients(grads=grads["params"])
    equal(ours.params[OWG], grads[OWG])
  equal(ours.params["params"], theirs.params)
  equal(ours.opt_state, theirs.opt_state)
  assert ours.step == 3


def test_the_optimizer_never_sees_state():
  state = create()
  names = [
    jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
  ]
  assert not any("scale'" in n or "amax" in n for n in names if "BatchNorm" not in n)
  equal(state.opt_state, TX.init(VARIABLES["params"]))


def test_other_collections_stay():
  state = step(create())
  equal(state.params["batch_stats"], VARIABLES["batch_stats"])


def test_other_collections_need_no_gradient():
  grads = fp8.grad(lambda v: jnp.sum(MODEL.apply(v, X)))(VARIABLES)
  del grads["batch_stats"]
  equal(create().apply_gradients(grads=grads).params["batch_stats"], VARIABLES["batch_stats"])


def test_bare_parameters_work_as_in_flax():
  params = nn.Dense(4).init(jax.random.key(0), X)["params"]
  grads = jax.tree.map(jnp.ones_like, params)
  ours = create(params=params).apply_gradients(grads=grads)
  theirs = create(reference.TrainState, params=params).apply_gradients(grads=grads)
  equal(ours.params, theirs.params)
  equal(ours.opt_state, theirs.opt_state)


def test_variables_without_state():
  variables = {"params": VARIABLES["params"], "batch_stats": VARIABLES["batch_stats"]}
  state = create(params=variables)
  new = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, variables))
  equal(jax.tree.map(jnp.shape, new.params), jax.tree.map(jnp.shape, variables))
  assert OWG not in new.params


@pytest.mark.parametrize("differentiate", [fp8.grad, jax.grad], ids=["fp8.grad", "jax.grad"])
def test_jitted_training_moves_the_state(differentiate):
  state = create()
  train_step = jax.jit(lambda state: step(state, differentiate))
  for _ in range(6):
    state = train_step(state)
  dot = state.params[OWG]["Dense_0"]["Fp8DotGeneral_0"]
  amax = float(jnp.abs(X).max())
  np.testing.assert_array_equal(dot["input_amax_history"], np.full(4, amax, np.float32))
  assert float(dot["input_scale"][0]) == pytest.approx(amax / 448, rel=1e-6)


def test_apply_fn_casts_and_compares_by_function():
  state = create()
  seen = {}

  def spy(variables, x):
    seen["dtypes"] = {str(leaf.dtype) for leaf in jax.tree.leaves(variables[OWG])}
    return x

  fp8.TrainState.create(apply_fn=spy, params=VARIABLES, tx=TX).apply_fn(VARIABLES, X)
  assert seen["dtypes"] == {"fp32_max_grad"}
  assert state.apply_fn == create().apply_fn
  assert jax.tree.structure(state) == jax.tree.structure(create())


def test_evaluation_through_apply_fn():
  equal(create().apply_fn(VARIABLES, X), MODEL.apply(VARIABLES, X))


def test_updating_batch_statistics():
  """Mutable statistics are an auxiliary output of the loss, and go in by ``replace``."""
  state = create()

  def loss(variables):
    out, updated = state.apply_fn(variables, X, train=True, mutable=["batch_stats"])
    return jnp.sum(jnp.sin(out)), updated

  (_, updated), grads = fp8.value_and_grad(loss, has_aux=True)(state.params)
  state = state.apply_gradients(grads=grads)
  state = state.replace(params={**state.params, **updated})
  assert not np.array_equal(
    state.params["batch_stats"]["BatchNorm_0"]["mean"],
    VARIABLES["batch_stats"]["BatchNorm_0"]["mean"],
  )


def test_extra_fields():
  class State(fp8.TrainState):
    rng: jax.Array | None = None

  state = create(State, rng=jax.random.key(1))
  grads = jax.tree.map(jnp.ones_like, VARIABLES)
  new = state.apply_gradients(grads=grads, rng=jax.random.key(2))
  assert isinstance(new, State)
  assert new.rng is not state.rng


def test_state_dict_round_trip():
  state = step(create())
  restored = serialization.from_state_dict(create(), serialization.to_state_dict(state))
  equal(restored.params, state.params)
  equal(restored.opt_state, state.opt_state)


class TestRefusals:
  grads = jax.tree.map(jnp.ones_like, VARIABLES)

  @pytest.mark.parametrize("collection", ["params", OWG])
  def test_missing_collection(self, collection):
    grads = {key: value for key, value in self.grads.items() if key != collection}
    with pytest.raises(ValueError, match=rf"apply_gradients: .*the collection '{collection}'.*got"):
      create().apply_gradients(grads=grads)

  @pytest.mark.parametrize("collection", ["params", OWG])
  def test_missing_leaf(self, collection):
    inner = {key: value for key, value in self.grads[collection].items() if key != "Dense_0"}
    with pytest.raises(
      ValueError, match=rf"apply_gradients: .*structure of params.*'{collection}'"
    ):
      create().apply_gradients(grads={**self.grads, collection: inner})


class TestSkipNonfinite:
  """A step with a nonfinite gradient changes nothing."""

  NAN = X.at[0, 0].set(jnp.nan)

  @staticmethod
  @jax.jit
  def step(state, x):
    loss = lambda variables: jnp.mean(jnp.sin(state.apply_fn(variables, x)))
    return state.apply_gradients(grads=fp8.grad(loss)(state.params))

  def test_a_nonfinite_step_changes_nothing(self):
    before = self.step(create(skip_nonfinite=True), X)
    after = self.step(before, self.NAN)
    equal((after.params, after.opt_state), (before.params, before.opt_state))
    assert (int(before.skipped_steps), int(after.skipped_steps), int(after.step)) == (0, 1, 2)

  @pytest.mark.parametrize("spoil", ["params", OWG])
  def test_parameters_decide_alone(self, spoil):
    """Only gradients of parameters are tested for nonfinite values, not state."""
    grads = jax.tree.map(jnp.ones_like, VARIABLES)
    first = jax.tree.leaves(grads[spoil])[0]
    grads[spoil] = jax.tree.map(
      lambda leaf: leaf.at[0].set(jnp.inf) if leaf is first else leaf, grads[spoil]
    )
    assert int(create(skip_nonfinite=True).apply_gradients(grads=grads).skipped_steps) == (
      spoil == "params"
    )

  def test_in_a_scan_with_donation(self):
    """Good, bad, good steps equal two good steps, bit for bit."""
    other = X[::-1] * 2
    run = jax.jit(
      lambda state, xs: jax.lax.scan(lambda s, x: (self.step(s, x), None), state, xs)[0],
      donate_argnums=0,
    )
    copied = jax.tree.map(jnp.array, create(skip_nonfinite=True))
    got = run(copied, jnp.stack([X, self.NAN, other]))
    want = run(jax.tree.map(jnp.array, create(skip_nonfinite=True)), jnp.stack([X, other, X])[:2])
    equal((got.params, got.opt_state), (want.params, want.opt_state))
    assert (int(got.skipped_steps), int(got.step)) == (1, 3)

  def test_metrics_move_on(self):
    """A skipped step with a NaN in the input still writes metrics."""
    state = create(skip_nonfinite=True, params=fp8.add_metrics(MODEL, VARIABLES, X))
    before = self.step(state, X)
    after = self.step(before, self.NAN)
    old, new = (s.params[OWG]["Dense_0"]["Fp8DotGeneral_0"] for s in (before, after))
    moved = {name for name in new if not np.array_equal(new[name], old[name])}
    assert "output_grad_amax" in moved
    assert not any(name.endswith(("_scale", "_history")) for name in moved)
    seen = fp8.stats(after.params).scalars()
    assert seen["Dense_0/input/nonfinite"] == 1 / X.size
    assert seen["Dense_0/kernel/nonfinite"] == 0
    assert not any(value for name, value in fp8.stats(before.params).scalars().items()
                   if name.endswith("nonfinite"))  # fmt: skip

  def test_bare_parameters(self):
    params = nn.Dense(4).init(jax.random.key(0), X)["params"]
    grads = jax.tree.map(jnp.ones_like, params)
    state = create(params=params, skip_nonfinite=True).apply_gradients(grads=grads)
    after = state.apply_gradients(grads={**grads, "bias": grads["bias"] * jnp.inf})
    equal((after.params, after.opt_state), (state.params, state.opt_state))
    assert int(after.skipped_steps) == 1

  def test_without_the_option_there_is_no_leaf(self):
    """Orbax would miss any new field in older checkpoints, even None."""
    theirs = reference.TrainState.create(apply_fn=None, params=VARIABLES, tx=TX)
    names = lambda state: {
      jax.tree_util.keystr(path[:1]) for path, _ in jax.tree_util.tree_leaves_with_path(state)
    }
    assert names(create()) == names(theirs)
    assert names(create(skip_nonfinite=True)) == names(theirs) | {".skipped_steps"}
    assert create().skipped_steps is None
    assert serialization.to_state_dict(create()).keys() == {"step", "params", "opt_state"}

  def test_subclasses(self):
    """Subclasses may have fields without default; equal states have one class."""

    class State(fp8.TrainState):
      rng: jax.Array

    made = [create(State, skip_nonfinite=True, rng=jax.random.key(1)) for _ in range(2)]
    assert jax.tree.structure(made[0]) == jax.tree.structure(made[1])
    assert isinstance(made[0], State)
    assert type(made[0]).__name__ == "State"
    again = create(type(made[0]), skip_nonfinite=True, rng=jax.random.key(1))
    assert type(again) is type(made[0])

  def test_a_checkpoint_from_before(self, tmp_path):
    old = step(create())
    fp8.save_checkpoint(tmp_path / "old", old)
    with pytest.raises(ValueError, match=r"missing: \['skipped_steps'\]"):
      fp8.restore_checkpoint(tmp_path / "old", create(skip_nonfinite=True))
    new = fp8.restore_checkpoint(
      tmp_path / "old", create(skip_nonfinite=True), allow_missing=["skipped_steps"]
    ).tree
    equal((new.params, new.opt_state, new.skipped_steps), (old.params, old.opt_state, 0))
    fp8.save_checkpoint(tmp_path / "new", new.replace(skipped_steps=jnp.int32(3)))
    assert int(fp8.restore_checkpoint(tmp_path / "new", new).tree.skipped_steps) == 3


def finite(tree):
  return all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(tree))


def test_optax_apply_if_finite():
  """Parameters stay; state takes a step without nonfinite amaxes, and stays finite."""
  tx = optax.apply_if_finite(TX, max_consecutive_errors=5)
  state = fp8.TrainState.create(apply_fn=MODEL.apply, params=VARIABLES, tx=tx)
  before = TestSkipNonfinite.step(state, X)
  after = TestSkipNonfinite.step(before, TestSkipNonfinite.NAN)
  equal(after.params["params"], before.params["params"])
  equal(after.opt_state.inner_state, before.opt_state.inner_state)
  assert int(after.opt_state.total_notfinite) == 1
  dot = after.params[OWG]["Dense_0"]["Fp8DotGeneral_0"]
  assert finite(dot)
  amax = float(jnp.abs(X).max())
  np.testing.assert_array_equal(dot["input_amax_history"], np.float32([0, 0, 0, amax]))
  assert finite(TestSkipNonfinite.step(after, X).params)


def test_flax_idiom_of_where():
  """``where(is_fin, new, old)`` over ``params`` and ``opt_state``, as in Flax's examples."""
  before = TestSkipNonfinite.step(create(), X)
  new = TestSkipNonfinite.step(before, TestSkipNonfinite.NAN)
  assert finite(new.params[OWG])
  keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(False, a, b), new, old)
  after = new.replace(
    params=keep(new.params, before.params), opt_state=keep(new.opt_state, before.opt_state)
  )
  equal((after.params, after.opt_state), (before.params, before.opt_state))
  assert finite(TestSkipNonfinite.step(after, X).params)
