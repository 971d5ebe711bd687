"""``upgrade_variables`` adds, keeps and drops state."""

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from tests.linen import lifts

OWG = fp8.OVERWRITE_WITH_GRADIENT
X = jnp.ones((2, 16))


def model(cls):
  return nn.Sequential(
    [nn.Dense(8, dot_general_cls=cls), nn.relu, nn.Dense(4, dot_general_cls=cls)]
  )


FP8 = model(fp8.DelayedScaling(amax_history_len=4).dot_general_cls)
PLAIN = model(None).init(jax.random.key(3), X)


def equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("wrap", [dict, flax.core.freeze], ids=["dict", "FrozenDict"])
def test_adds_what_init_makes_and_keeps_the_rest(wrap):
  variables = {**PLAIN, "batch_stats": {"mean": jnp.ones(3)}}
  new = fp8.upgrade_variables(FP8, wrap(variables), X)
  assert isinstance(new, type(wrap(variables)))
  assert FP8.apply(new, X).shape == (2, 4)
  equal(flax.core.unfreeze(new), {**variables, OWG: FP8.init(jax.random.key(0), X)[OWG]})


def test_keeps_state_that_is_there():
  trained = jax.tree.map(lambda leaf: leaf + 1, FP8.init(jax.random.key(0), X)[OWG])
  partial = {**PLAIN, OWG: {"layers_0": trained["layers_0"]}}
  new = fp8.upgrade_variables(FP8, partial, X)
  equal(new[OWG]["layers_0"], trained["layers_0"])
  assert float(new[OWG]["layers_2"]["Fp8DotGeneral_0"]["input_scale"][0]) == 1.0


def test_takes_shapes_and_keywords():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
      x = nn.Dropout(0.5, deterministic=not train)(x)
      return nn.Dense(4, dot_general_cls=fp8.Fp8DotGeneral, name="inner")(x)

  variables = {"params": {"inner": nn.Dense(4).init(jax.random.key(0), X)["params"]}}
  shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
  new = fp8.upgrade_variables(Model(), variables, shape, train=True)
  assert set(new[OWG]["inner"]) == {"Fp8DotGeneral_0"}


STATELESS = [name for name in fp8.RECIPES if name != "delayed"]


@pytest.mark.parametrize("name", [None, *STATELESS])
def test_models_without_state_get_none(name):
  cls = name and fp8.get_recipe(name).dot_general_cls
  equal(fp8.upgrade_variables(model(cls), PLAIN, X), PLAIN)


class TestChangeOfRecipe:
  """State is kept, initialized or dropped, but never reinterpreted."""

  def trained(self, recipe):
    variables = model(recipe.dot_general_cls).init(jax.random.key(0), X)
    return {**PLAIN, OWG: jax.tree.map(lambda leaf: leaf + 3.0, variables[OWG])}

  @pytest.mark.parametrize("name", STATELESS)
  def test_state_is_dropped_and_comes_back_fresh(self, name):
    before = self.trained(fp8.DelayedScaling(amax_history_len=4))
    dropped = fp8.upgrade_variables(model(fp8.get_recipe(name).dot_general_cls), before, X)
    equal(dropped, PLAIN)
    assert OWG in before  # the argument is unchanged
    equal(fp8.upgrade_variables(FP8, dropped, X)[OWG], FP8.init(jax.random.key(0), X)[OWG])

  @pytest.mark.parametrize("length", [3, 8])
  def test_a_history_is_resized(self, length):
    before = self.trained(fp8.DelayedScaling(amax_history_len=length))
    ages = jnp.roll(jnp.arange(float(length)), 1) + 1.0  # slot 0 newest, slot 1 oldest
    before[OWG]["layers_0"]["Fp8DotGeneral_0"]["input_amax_history"] = ages
    (got,) = fp8.upgrade_variables(FP8, before, X)[OWG]["layers_0"].values()
    want = {3: [3, 0, 1, 2], 8: [8, 5, 6, 7]}[length]
    np.testing.assert_array_equal(got["input_amax_history"], want)
    np.testing.assert_array_equal(got["input_scale"], [4.0])

  def test_a_new_leaf_is_added_and_one_too_many_dropped(self):
    often = fp8.DelayedScaling(amax_history_len=4)
    seldom = fp8.DelayedScaling(amax_history_len=4, interval=5)
    before = self.trained(often)
    there = fp8.upgrade_variables(model(seldom.dot_general_cls), before, X)
    (got,) = there[OWG]["layers_0"].values()
    np.testing.assert_array_equal(got["input_steps_to_update"], [0.0])
    equal(fp8.upgrade_variables(FP8, there, X), before)

  def test_the_error_without_upgrade_gives_advice(self):
    before = self.trained(fp8.DelayedScaling(amax_history_len=8))
    with pytest.raises(ValueError, match=r"must have shape \(4,\).*upgrade_variables"):
      FP8.apply(before, X)

  @pytest.mark.parametrize("name", STATELESS)
  def test_a_stateless_recipe_leaves_foreign_state_alone(self, name):
    before = self.trained(fp8.DelayedScaling(amax_history_len=4))
    apply = jax.jit(model(fp8.get_recipe(name).dot_general_cls).apply)
    equal(apply(before, X), apply(PLAIN, X))


def test_a_model_without_parameters():
  x = jnp.ones((2, 2))
  new = fp8.upgrade_variables(fp8.Fp8Einsum(), {"params": {}}, "mk,kn->mn", x, x)
  assert fp8.Fp8Einsum().apply(new, "mk,kn->mn", x, x).shape == (2, 2)


@pytest.mark.parametrize("axis", [0, 1])
def test_histories_of_scanned_layers_are_resized(axis):
  def make(length):
    cls = fp8.DelayedScaling(amax_history_len=length).dot_general_cls
    body = lambda layer, carry: (layer(carry), None)
    axes = {"params": 0, OWG: axis}
    scan = nn.scan(body, variable_axes=axes, split_rngs={"params": True}, length=3)

    class Model(nn.Module):
      @nn.compact
      def __call__(self, x):
        return scan(nn.Dense(16, dot_general_cls=cls, name="layer"), x)[0]

    return Model()

  before = make(2).init(jax.random.key(0), X)
  state = before[OWG]["layer"]["Fp8DotGeneral_0"]
  histories = jnp.arange(1.0, 7.0).reshape(3, 2)  # a row per layer: newest, oldest
  state["input_amax_history"] = histories if axis == 0 else histories.T
  (got,) = fp8.upgrade_variables(make(3), before, X)[OWG]["layer"].values()
  want = np.array([[1, 0, 2], [3, 0, 4], [5, 0, 6]])
  np.testing.assert_array_equal(got["input_amax_history"], want if axis == 0 else want.T)
  # Another number of layers is another model, with fresh state.
  state["input_amax_history"] = jnp.ones((2, 2))
  state["input_scale"] = jnp.ones((2, 1) if axis == 0 else (1, 2))
  (got,) = fp8.upgrade_variables(make(3), before, X)[OWG]["layer"].values()
  assert not got["input_amax_history"].any()


def test_bare_parameters_are_refused():
  with pytest.raises(
    ValueError, match=r"upgrade_variables: .*collection 'params'; got \['layers_0'"
  ):
    fp8.upgrade_variables(FP8, PLAIN["params"], X)


class TestVariablesOfAnotherModel:
  @pytest.mark.parametrize(
    ("params", "message"),
    [
      ({"layers_0": PLAIN["params"]["layers_0"]}, r"missing: \['layers_2/bias', 'layers_2/k.*'\]"),
      ({**PLAIN["params"], "head": {"kernel": X}}, r"got extra: \['head/kernel'\]\. Pass"),
      (
        jax.tree.map(lambda x: x[:2], PLAIN["params"]),
        r"others: .*'layers_0/kernel \(2, 8\) for \(16, 8\)'",
      ),
      (
        {str(i): {"kernel": X} for i in range(7)},
        r"missing: \[.*\], extra: \['0/kernel', .*'4/kernel'\] \.\.\. and 2 more",
      ),
    ],
    ids=["missing", "extra", "other", "many"],
  )  # fmt: skip
  def test_paths_are_named(self, params, message):
    with pytest.raises(ValueError, match=f"upgrade_variables: .*parameters.*{message}"):
      fp8.upgrade_variables(FP8, {"params": params}, X)

  @pytest.mark.parametrize("boxed", ["variables", "model", "both"])
  def test_boxed_parameters_are_seen_through(self, boxed):
    init = nn.initializers.lecun_normal()
    inits = {True: nn.with_partitioning(init, ("in", "out")), False: init}
    dense = lambda cls, box: nn.Dense(8, dot_general_cls=cls, kernel_init=inits[box])
    variables = dense(None, boxed != "model").init(jax.random.key(0), X)
    model = dense(fp8.Fp8DotGeneral, boxed != "variables")
    new = fp8.upgrade_variables(model, variables, X)
    equal(new["params"], variables["params"])
    with pytest.raises(ValueError, match=r"'kernel \(16, 8\) for \(2, 8\)'"):
      fp8.upgrade_variables(model, variables, X[:, :2])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["-2", "1 in 0"])
def test_histories_of_stacks_along_any_axis(name):
  """Resizes histories of three slots, the number of layers, to five."""
  models = {n: lifts.written(name, fp8.DelayedScaling(amax_history_len=n)) for n in (3, 5)}
  before = lifts.trained(models[3])
  after = fp8.upgrade_variables(models[5], before, lifts.X)
  for old, new in zip(fp8.stats(before).rows, fp8.stats(after).rows, strict=True):
    assert new.history == (0, 0, *old.history)
    assert (new.path, new.scale) == (old.path, old.scale)
  equal(fp8.upgrade_variables(models[3], after, lifts.X), before)


def test_a_history_with_slots_along_another_axis_is_reset():
  recipe = fp8.DelayedScaling(amax_history_len=3)
  before = lifts.trained(lifts.written("params 0, state 1", recipe))
  after = fp8.upgrade_variables(lifts.written("0", recipe), before, lifts.X)
  assert all(row.largest == 0 for row in fp8.stats(after).rows)
