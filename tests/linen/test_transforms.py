"""``fp8.scan``, ``fp8.vmap`` and ``fp8.cond`` against Linen's with explicit axes of the state."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from tests.recipes import cases

OWG = fp8.OVERWRITE_WITH_GRADIENT
RECIPE = fp8.DelayedScaling(amax_history_len=4)
X = jnp.asarray(cases.normal(0, 3, 2, 8))
KEY = jax.random.key(0)


def dense(recipe=RECIPE):
  return nn.Dense(8, dot_general_cls=recipe.dot_general_cls)


class Layer(nn.Module):
  """A step of a scan, as ``__call__`` and as another method."""

  recipe: fp8.Recipe = RECIPE

  @nn.compact
  def __call__(self, x, y):
    return dense(self.recipe)(x), y

  @nn.compact
  def twice(self, x, y):
    return 2 * dense(self.recipe)(x), y


def step(module, x, y):
  """The target as a function."""
  return module(x, y)


def run(model, x=X[0]):
  """Returns variables, output and gradients."""

  @cases.quickly
  def all_of_it():
    variables = model.init(KEY, x, X)
    loss = lambda v: jnp.sum(model.apply(v, x, X)[0] ** 2)
    return variables, fp8.value_and_grad(loss)(variables)

  return all_of_it()


def shapes(model):
  """Returns the shapes of the variables."""
  return jax.eval_shape(model.init, KEY, X[0], X)


SPLIT, SHARED = {"split_rngs": {"params": True}}, {"split_rngs": {"params": False}}
SCANS = {  # the arguments of fp8.scan, and the equivalent arguments of nn.scan
  "a layer each": (
    {"variable_axes": {"params": 0}, **SPLIT},
    {"variable_axes": {"params": 0, OWG: 0}, **SPLIT},
  ),
  "on another axis": (
    {"variable_axes": {"params": 1}, **SPLIT},
    {"variable_axes": {"params": 1, OWG: 1}, **SPLIT},
  ),
  "several at once": (
    {"variable_axes": {("params", "stats"): 0}, **SPLIT},
    {"variable_axes": {("params", "stats"): 0, OWG: 0}, **SPLIT},
  ),
  "shared": (
    {"variable_broadcast": "params", **SHARED},
    {"variable_broadcast": ["params", OWG], **SHARED},
  ),
  "all but": (
    {"variable_axes": {nn.DenyList("stats"): 0}, **SPLIT},
    {"variable_axes": {nn.DenyList("stats"): 0}, **SPLIT},
  ),
  "named": (
    {"variable_axes": {"params": 0, OWG: 1}, **SPLIT},
    {"variable_axes": {"params": 0, OWG: 1}, **SPLIT},
  ),
}


@pytest.mark.parametrize("case", SCANS)
def test_scan_is_linens(case):
  written, meant = SCANS[case]
  ours, theirs = fp8.scan(Layer, **written)(), nn.scan(Layer, **meant)()
  if case not in ("a layer each", "shared"):
    assert OWG in shapes(ours)
    assert shapes(ours) == shapes(theirs)
    return
  got = run(ours)
  assert OWG in got[0]
  cases.equal(got, run(theirs))


def test_scan_takes_positions_and_functions():
  class Functional(nn.Module):
    lift: bool

    @nn.compact
    def __call__(self, x, ys):
      scan = fp8.scan if self.lift else nn.scan
      axes = {"params": 0} if self.lift else {"params": 0, OWG: 0}
      return scan(step, axes, False, False, {"params": True})(Layer(name="layer"), x, ys)

  assert OWG in shapes(Functional(True))
  assert shapes(Functional(True)) == shapes(Functional(False))


@pytest.mark.parametrize("lift", ["scan", "vmap"])
def test_methods_and_metadata(lift):
  """``methods`` and ``metadata_params`` are passed on."""
  boxed = nn.with_partitioning(nn.initializers.ones, (None, None))

  class Boxed(Layer):
    @nn.compact
    def other(self, x, y):
      return nn.Dense(8, kernel_init=boxed, dot_general_cls=RECIPE.dot_general_cls)(x), y

  how = {"metadata_params": {nn.PARTITION_NAME: "layers"}, "methods": ["other"], **SPLIT}
  model = getattr(fp8, lift)(Boxed, variable_axes={"params": 0}, **how)()
  x = X[0] if lift == "scan" else X
  variables = jax.eval_shape(lambda: model.init(KEY, x, X, method="other"))
  assert nn.get_partition_spec(variables)["params"]["Dense_0"]["kernel"][0] == "layers"
  assert jax.tree.leaves(variables[OWG])[0].shape[0] == 3


VMAPS = {
  "experts": ({"params": 0}, {"params": 0, OWG: 0}),
  "shared": ({"params": None}, {"params": None, OWG: None}),
  "one state for all": ({"params": 0, OWG: None}, {"params": 0, OWG: None}),
}


@pytest.mark.parametrize("case", VMAPS)
def test_vmap_is_linens(case):
  written, meant = VMAPS[case]
  split = {"params": written["params"] == 0}
  got = run(fp8.vmap(Layer, written, split)(), x=X)
  if case != "one state for all":
    cases.equal(got, run(nn.vmap(Layer, meant, split)(), x=X))
  leaf = got[1][1][OWG]["Dense_0"]["Fp8DotGeneral_0"]["input_amax_history"]
  amax = np.abs(X).max(axis=(1, 2) if meant[OWG] == 0 else None)
  np.testing.assert_array_equal(leaf[..., 0], amax)


@pytest.mark.parametrize("lift", ["scan", "vmap"])
def test_keys_of_stochastic_rounding_are_split(lift):
  recipe = fp8.Float8CurrentScaling(grad_rounding="stochastic")
  x = X[0] if lift == "scan" else X
  rngs = {"sr_rng": jax.random.key(1)}
  ours = getattr(fp8, lift)(Layer, {"params": 0}, **SPLIT)(recipe)
  split = {"split_rngs": {"params": True, "sr_rng": True}}
  theirs = getattr(nn, lift)(Layer, {"params": 0}, **split)(recipe)

  @cases.quickly
  def gradient(kernel):
    variables = {"params": {"Dense_0": {"kernel": kernel, "bias": jnp.zeros((3, 8))}}}
    loss = lambda model: lambda v: jnp.sum(jnp.sin(model.apply(v, x, X, rngs=rngs)[0]))
    return [jax.grad(loss(model))(variables) for model in (ours, theirs)]

  cases.equal(*gradient(jnp.asarray(cases.normal(1, 3, 8, 8))))


class Either(nn.Module):
  """One of two layers, by a condition."""

  recipe: fp8.Recipe = RECIPE
  lift: bool = True

  def setup(self):
    self.layer_0, self.layer_1 = dense(self.recipe), dense(self.recipe)

  def __call__(self, pred, x):
    cond = fp8.cond if self.lift else nn.cond
    return cond(pred, lambda m, x: m.layer_0(x), lambda m, x: 2 * m.layer_1(x), self, x)


TAKEN = jnp.array([True, False, True])


@pytest.mark.parametrize("mapped", [True, False])
def test_cond_does_not_update_the_branch_not_taken(mapped):
  """Each branch updates the state as the layer without a condition, even under vmap."""
  model = fp8.vmap(Either, {"params": 0}, {"params": True})() if mapped else Either()
  pred, x = (TAKEN, X) if mapped else (TAKEN[0], X[0])
  variables = model.init(KEY, pred, x)
  alone = fp8.vmap(lambda m, x: m(x), {"params": 0}, {"params": True})

  class Alone(nn.Module):
    @nn.compact
    def __call__(self, x):
      return alone(dense(), x) if mapped else dense()(x)

  def loss(model, *args):
    return lambda v: jnp.sum(model.apply(v, *args) ** 2)

  @cases.quickly
  def gradients(variables):
    layers = [{name: tree[f"layer_{i}"] for name, tree in variables.items()} for i in (0, 1)]
    inside = lambda layer: {name: {"Dense_0": tree} for name, tree in layer.items()}
    doubled = lambda v: 4 * loss(Alone(), x)(v)
    alone = [
      fp8.grad(f)(inside(v)) for f, v in zip((loss(Alone(), x), doubled), layers, strict=True)
    ]
    return fp8.grad(loss(model, pred, x))(variables), alone

  got, wants = gradients(variables)
  for index, want in enumerate(wants):
    taken = np.array(pred) ^ (index == 1)
    for name, old, fresh in (("params", 0, want["params"]), (OWG, variables[OWG], want[OWG])):
      kept = jax.tree.map(jnp.zeros_like, variables["params"]) if old == 0 else old
      for a, b, c in zip(
        *map(jax.tree.leaves, (got[name][f"layer_{index}"], fresh, kept[f"layer_{index}"])),
        strict=True,
      ):
        choose = taken.reshape(-1, *(1,) * (a.ndim - 1)) if mapped else taken
        np.testing.assert_array_equal(a, np.where(choose, b, c))


def test_nn_cond_records_the_branch_not_taken():
  """This is why ``fp8.cond`` exists."""
  model = fp8.vmap(Either, {"params": 0}, {"params": True})
  variables = model().init(KEY, TAKEN, X)
  loss = lambda lift: lambda v: jnp.sum(model(lift=lift).apply(v, TAKEN, X))
  gradients = cases.quickly(lambda v: [fp8.grad(loss(lift))(v)[OWG] for lift in (True, False)])
  ours, theirs = (state["layer_0"] for state in gradients(variables))
  amaxes = [m["Fp8DotGeneral_0"]["input_amax_history"][1, 0] for m in (ours, theirs)]
  assert amaxes == [0, np.abs(X[1]).max()]


def test_cond_without_state_is_linens():
  recipe = fp8.Float8CurrentScaling()
  models = Either(recipe), Either(recipe, lift=False)
  variables = models[0].init(KEY, True, X[0])
  loss = lambda model, pred: lambda v: jnp.sum(model.apply(v, pred, X[0]) ** 2)
  gradients = cases.quickly(
    lambda v, pred: [fp8.value_and_grad(loss(model, pred))(v) for model in models]
  )
  for pred in (True, False):
    cases.equal(*gradients(variables, pred))


def test_cond_of_a_frozen_model():
  variables = Either().init(KEY, True, X[0])
  model, frozen = fp8.freeze_for_inference(Either(), variables, True, X[0])
  want = Either().apply(variables, True, X[0])
  np.testing.assert_array_equal(model.apply(frozen, True, X[0]), want)
