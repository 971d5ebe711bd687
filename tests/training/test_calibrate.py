"""Calibration records the amaxes of a float64 model, and the first step flushes nothing."""

import re

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from tests import oracle
from tests.linen import lifts
from tests.recipes import cases

OWG = fp8.OVERWRITE_WITH_GRADIENT
ROLES = {"input": "float8_e4m3fn", "kernel": "float8_e4m3fn", "output_grad": "float8_e5m2"}
RECIPE = fp8.DelayedScaling(amax_history_len=4)
TINY = 1e-6  # factor of the loss: output gradients of 1e-7 are zero in E5M2 at scale 1
BATCHES = [np.float32(np.random.default_rng(i).normal(size=(4, 8)) * (i + 1)) for i in range(3)]


class Layers(nn.Module):
  """Three layers in a row."""

  recipe: fp8.Recipe | None = RECIPE

  @nn.compact
  def __call__(self, x):
    cls = None if self.recipe is None else self.recipe.dot_general_cls
    for i in range(3):
      x = nn.Dense(8, use_bias=False, dot_general_cls=cls, name=f"layer_{i}")(x)
    return x


MODEL = Layers()
VARIABLES = jax.jit(MODEL.init)(jax.random.key(0), BATCHES[0])
KERNELS = [np.float64(VARIABLES["params"][f"layer_{i}"]["kernel"]) for i in range(3)]


def loss_fn(variables, batch):
  return TINY * jnp.mean(MODEL.apply(variables, batch) ** 2)


def calibrate(module, variables, batches, *args, **kwargs):
  return fp8.calibrate(module, variables, batches, *args, progress=False, **kwargs)


def dot(variables, layer):
  return variables[OWG][layer]["Fp8DotGeneral_0"]


def met(x):
  """Returns every tensor of the model in float64, by layer and role."""
  inputs = [np.float64(x)]
  for kernel in KERNELS:
    inputs.append(inputs[-1] @ kernel)
  grads = [TINY * 2 * inputs[3] / inputs[3].size]
  for kernel in reversed(KERNELS):
    grads.append(grads[-1] @ kernel.T)
  return [{"input": inputs[i], "kernel": KERNELS[i], "output_grad": grads[2 - i]} for i in range(3)]


def assert_recorded(variables, layer, role, amaxes, margin=0):
  """Checks that the history has these amaxes, oldest first, and that the scale matches."""
  want = np.zeros(4)
  for amax in amaxes:
    want = oracle.roll(want, amax)
  state = dot(variables, layer)
  np.testing.assert_allclose(state[f"{role}_amax_history"], want, rtol=1e-5)
  scale = oracle.scale(want, 1.0, ROLES[role], margin)
  np.testing.assert_allclose(state[f"{role}_scale"], [scale], rtol=1e-5)


@pytest.fixture(scope="module")
def calibrated():
  return calibrate(MODEL, VARIABLES, BATCHES, loss_fn)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("layer", range(3))
def test_equals_the_oracle(calibrated, layer, role):
  amaxes = [np.abs(met(batch)[layer][role]).max() for batch in BATCHES]
  assert_recorded(calibrated, f"layer_{layer}", role, amaxes)


first_step = cases.quickly(fp8.grad(loss_fn))


def flushed(variables):
  """Returns the parameters with gradients of zero at the first step in FP8."""
  grads = first_step(variables, BATCHES[0])["params"]
  return [name for name, leaf in grads.items() if not np.any(leaf["kernel"])]


def test_no_gradient_of_the_first_step_is_flushed(calibrated):
  assert flushed(VARIABLES) == ["layer_0", "layer_1", "layer_2"]
  assert flushed(calibrated) == []
  got = first_step(calibrated, BATCHES[0])["params"]
  for i, tensors in enumerate(met(BATCHES[0])):
    want = tensors["input"].T @ tensors["output_grad"]
    error = np.linalg.norm(got[f"layer_{i}"]["kernel"] - want)
    assert error < 0.15 * np.linalg.norm(want)  # the epsilon of E5M2 is 0.25


def test_changes_nothing_but_state(calibrated):
  assert jax.tree.structure(calibrated) == jax.tree.structure(VARIABLES)
  jax.tree.map(np.testing.assert_array_equal, calibrated["params"], VARIABLES["params"])
  model = Layers()
  frozen = calibrate(model, flax.core.freeze(VARIABLES), BATCHES[:1])
  assert isinstance(frozen, flax.core.FrozenDict)


def test_continues_a_history(calibrated):
  more = calibrate(MODEL, calibrated, BATCHES[:1], loss_fn)
  amaxes = [np.abs(met(BATCHES[i])[0]["input"]).max() for i in (0, 1, 2, 0)]
  assert_recorded(more, "layer_0", "input", amaxes)


def test_forward_only_leaves_output_gradients():
  """Metrics of output gradients keep their values too."""
  variables = fp8.add_metrics(MODEL, VARIABLES, BATCHES[0])
  old = jax.tree.map(lambda leaf: leaf + 0.5, variables[OWG])
  old = {**variables, OWG: old}
  new = calibrate(MODEL, old, BATCHES[1::-1])
  for layer in ("layer_0", "layer_2"):
    for name, leaf in dot(new, layer).items():
      if name.startswith("output_grad_"):
        np.testing.assert_array_equal(leaf, dot(old, layer)[name])
  rows = {(row.layer, row.role): row for row in fp8.stats(new).rows}
  first = rows["layer_0", "input"]
  assert first.amax == dot(new, "layer_0")["input_amax"][0] == np.abs(BATCHES[0]).max()
  assert first.largest == np.abs(BATCHES[1]).max()
  # Metrics are measured at the new scale.
  scale = np.float32(first.largest) / np.float32(448)
  x_hat, x = oracle.qdq(BATCHES[0], scale, "float8_e4m3fn"), np.float64(BATCHES[0])
  assert first.noise == pytest.approx(np.sum((x - x_hat) ** 2) / np.sum(x**2), rel=1e-4)
  assert first.saturated == 0


def test_percentile(calibrated):
  """The percentile is taken over all magnitudes of a tensor; 100 is the maximum."""
  spiked = BATCHES[0].copy()
  spiked[0, 0] = 1e4
  new = calibrate(MODEL, VARIABLES, [spiked], loss_fn, percentile=90)
  for layer, tensors in enumerate(met(spiked)):
    for role, tensor in tensors.items():
      assert_recorded(new, f"layer_{layer}", role, [np.percentile(np.abs(tensor), 90)])
  whole = calibrate(MODEL, VARIABLES, BATCHES, loss_fn, percentile=100)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), whole[OWG], calibrated[OWG]
  )


CHOICES = {
  "most recent": ({"amax_compute_algo": "most_recent"}, lambda a: a[-1]),
  "margin": ({"margin": 2}, lambda a: 4 * max(a)),
  "power of two": ({"power_of_two": True}, lambda a: 448 * oracle.next_power_of_two(max(a) / 448)),
  "interval": ({"interval": 3}, max),
  "first step": ({"first_step": "current"}, max),
  "E4M3": ({"fp8_format": fp8.Format.E4M3}, max),
  "stochastic": ({"grad_rounding": "stochastic"}, max),
}


@pytest.mark.parametrize("name", CHOICES)
def test_scales_by_the_recipe(name):
  fields, reach = CHOICES[name]
  recipe = fp8.DelayedScaling(amax_history_len=4, **fields)
  model = nn.Dense(8, dot_general_cls=recipe.dot_general_cls)
  variables = jax.jit(model.init)(jax.random.key(0), BATCHES[0])
  batches = [BATCHES[2], BATCHES[0]]
  new = calibrate(model, variables, batches, lambda v, x: jnp.sum(model.apply(v, x)))
  state = new[OWG]["Fp8DotGeneral_0"]
  amaxes = [float(np.abs(batch).max()) for batch in batches]
  np.testing.assert_allclose(state["input_amax_history"][::3], amaxes[::-1], rtol=1e-6)
  np.testing.assert_allclose(state["input_scale"], [reach(amaxes) / 448], rtol=1e-6)
  # All gradients are one.
  top = 448 if name == "E4M3" else 57344
  factor = {"margin": 4, "power of two": 57344 * oracle.next_power_of_two(1 / 57344)}.get(name, 1)
  np.testing.assert_allclose(state["output_grad_scale"], [factor / top], rtol=1e-6)
  if (
    name == "interval"
  ):  # the scale is updated at the first step of training, and then at each third
    assert float(state["input_steps_to_update"][0]) == 0


class Shared(nn.Module):
  """One layer, called on zeros and then on the input."""

  @nn.compact
  def __call__(self, x):
    layer = nn.Dense(8, dot_general_cls=RECIPE.dot_general_cls, name="layer")
    return layer(0 * x) + layer(x)


def test_a_layer_called_twice_has_the_maximum():
  """So does its scale, although the call on zeros alone would keep the old scale."""
  model = Shared()
  variables = jax.jit(model.init)(jax.random.key(0), BATCHES[0])
  tiny = [1e-3 * batch for batch in BATCHES[:2]]
  new = calibrate(model, variables, tiny)
  assert_recorded(new, "layer", "input", [np.abs(x).max() for x in tiny])


class Scanned(nn.Module):
  """Three scanned layers."""

  @nn.compact
  def __call__(self, x):
    scan = nn.scan(
      lambda module, x, _: (module(x), None),
      variable_axes={"params": 0, OWG: 0},
      split_rngs={"params": True},
      length=3,
    )
    layer = nn.Dense(8, use_bias=False, dot_general_cls=RECIPE.dot_general_cls, name="layer")
    return scan(layer, x, None)[0]


def test_scanned_layers_have_their_own(calibrated):
  model = Scanned()
  stack = lambda tree: jax.tree.map(lambda *leaves: jnp.stack(leaves), *tree.values())
  variables = {name: {"layer": stack(tree)} for name, tree in VARIABLES.items()}
  loss = lambda v, x: TINY * jnp.mean(model.apply(v, x) ** 2)
  new = calibrate(model, variables, BATCHES, loss)
  want = {"layer": stack(calibrated[OWG])}
  assert jax.tree.structure(new[OWG]) == jax.tree.structure(want)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), new[OWG], want)


def test_of_batches_on_several_devices(calibrated):
  mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  place = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  new = calibrate(MODEL, VARIABLES, [jax.device_put(batch, place) for batch in BATCHES], loss_fn)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), new[OWG], calibrated[OWG])


class Noisy(nn.Module):
  """A model with mutable variables, dropout, sow and a flag."""

  @nn.compact
  def __call__(self, x, train):
    x = nn.BatchNorm(use_running_average=not train)(x)
    x = nn.Dropout(0.5, deterministic=not train)(x)
    self.sow("intermediates", "x", x)
    return nn.Dense(8, dot_general_cls=RECIPE.dot_general_cls, name="layer")(x), jnp.arange(3)


def test_variables_keys_and_flags_of_the_module():
  model = Noisy()
  variables = jax.jit(model.init, static_argnums=2)(jax.random.key(0), BATCHES[0], False)
  batches = [(batch, True) for batch in BATCHES[:2]]
  new = calibrate(model, variables, batches, rngs={"dropout": jax.random.key(1)})
  jax.tree.map(np.testing.assert_array_equal, new["batch_stats"], variables["batch_stats"])
  assert set(new) == set(variables)
  assert np.count_nonzero(dot(new, "layer")["input_amax_history"]) == 2


@pytest.mark.parametrize("loss", [None, loss_fn], ids=["forward", "loss"])
def test_a_nan_is_never_recorded(loss):
  bad = BATCHES[0].copy()
  bad[1, 1] = np.nan
  message = re.escape("calibrate: 1 of 2 batches gave NaN or an infinite loss")
  with pytest.warns(UserWarning, match=message):
    new = calibrate(MODEL, VARIABLES, [BATCHES[1], bad], loss)
  assert_recorded(new, "layer_0", "input", [np.abs(BATCHES[1]).max()])
  assert_recorded(new, "layer_0", "kernel", [np.abs(KERNELS[0]).max()])


def test_compiles_once_for_each_shape_and_leaves_no_trace():
  """Compiling the loss before or after calibration gives another program."""
  traces = []

  @jax.jit
  def compiled(variables, batch):
    traces.append(batch.shape)
    return loss_fn(variables, batch)

  before = compiled(VARIABLES, BATCHES[0])
  traces.clear()
  new = calibrate(MODEL, VARIABLES, [*BATCHES, BATCHES[0][:2], BATCHES[1][:2]], compiled)
  assert traces == [(4, 8), (2, 8), (2, 8)]  # the last call finalizes the scales
  assert float(dot(new, "layer_2")["output_grad_amax_history"][2]) > 0
  assert float(compiled(VARIABLES, BATCHES[0])) == float(before)
  exact = TINY * np.mean(np.float64(Layers(None).apply(VARIABLES, BATCHES[0])) ** 2)
  assert abs(float(before) - exact) > 1e-4 * exact  # it computes in FP8


def test_without_state_it_returns_statistics(capfd):
  model = Layers(fp8.Float8CurrentScaling())
  variables = {"params": VARIABLES["params"]}
  found = fp8.calibrate(model, variables, BATCHES[:2])  # with its progress bar
  assert capfd.readouterr().out == ""
  amax = found.scalars()["layer_0/input/amax"]
  assert amax == max(np.abs(batch).max() for batch in BATCHES[:2])
  loss = lambda v, x: jnp.mean(model.apply(v, x) ** 2)
  found = calibrate(model, fp8.add_metrics(model, variables, BATCHES[0]), BATCHES[:2], loss)
  assert found.scalars()["layer_0/output_grad/sqnr"] > 20
  assert found.scalars()["layer_0/input/amax"] == amax


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1", "params 0, state 1"])
def test_stacks_along_any_axis(name):
  """Stacks along other axes give the same result as along the first axis."""
  want, got = (lifts.written(each, fp8.DelayedScaling(amax_history_len=3)) for each in ("0", name))
  first = lifts.trained(want, steps=0)
  axis = {"1": 1, "-1": -1}.get(name, 0)
  variables = lifts.trained(got, steps=0)
  moved = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, axis), first["params"])
  variables, first = (
    fp8.add_metrics(model, each, lifts.X)
    for model, each in ((got, {**variables, "params": moved}), (want, first))
  )
  loss = lambda model: lambda variables, x: jnp.mean(jnp.square(model.apply(variables, x)))
  tables = (
    str(fp8.stats(fp8.calibrate(model, each, [lifts.X, 2 * lifts.X], loss(model), progress=False)))
    for model, each in ((got, variables), (want, first))
  )
  assert next(tables) == next(tables)
