"""The state of layers with boxed parameters is boxed, and every function accepts the boxes.

Each function must give the same result with boxes as without, and keep the boxes.
"""

import functools

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import flax_fp8 as fp8
from flax_fp8.linen import boxes
from tests.recipes import cases

OWG = fp8.OVERWRITE_WITH_GRADIENT
RECIPE = fp8.DelayedScaling(amax_history_len=4)
EXPERTS, WIDTH = 4, 8
X = jnp.asarray(cases.normal(0, EXPERTS, 2, WIDTH))
KEY = jax.random.key(0)
EXPERT = {nn.PARTITION_NAME: "expert"}


class Layer(nn.Module):
  """A dense layer; boxed by ``box``, in FP8 unless ``cls`` is None."""

  box: str | None
  cls: object = RECIPE.dot_general_cls

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.lecun_normal()
    names = ("embed", "mlp") if self.box == "logical" else (None, "model")
    wrap = {"logical": nn.with_logical_partitioning, "mesh": nn.with_partitioning, None: None}
    init = wrap[self.box](init, names) if self.box else init
    return nn.Dense(WIDTH, kernel_init=init, dot_general_cls=self.cls, name="dense")(x)


class Model(nn.Module):
  """A layer used twice, then an expert for each row of the input."""

  box: str | None = "mesh"
  cls: object = RECIPE.dot_general_cls

  @nn.compact
  def __call__(self, x):
    shared = Layer(self.box, self.cls, name="shared")
    x = shared(jnp.sin(shared(x)))
    experts = fp8.vmap(Layer, {"params": 0}, {"params": True}, metadata_params=EXPERT)
    return experts(self.box, self.cls, name="experts")(x)


def initialized(model):
  return cases.quickly(model.init)(KEY, X)


@pytest.fixture(scope="module")
def variables():
  return initialized(Model())


def loss(model, variables):
  return jnp.sum(jnp.sin(model.apply(variables, X)))


def same(got, want):
  """Checks that ``got`` is boxed and equals ``want`` without boxes."""
  assert boxes.has_boxes(got[OWG])
  cases.equal(boxes.unbox(got), want)


def test_only_boxed_layers_have_boxed_state(variables):
  assert not boxes.has_boxes(initialized(Model(None)))
  cases.equal(boxes.unbox(variables), initialized(Model(None)))
  for leaf in jax.tree.leaves(variables[OWG]["shared"], is_leaf=boxes.is_box):
    assert type(leaf) is nn.Partitioned
    assert leaf.names == (None,)
  for leaf in jax.tree.leaves(variables[OWG]["experts"], is_leaf=boxes.is_box):
    assert leaf.names == ("expert", None)
  assert nn.get_partition_spec(variables)[OWG] == jax.tree.map(
    lambda leaf: P(*leaf.names), variables[OWG], is_leaf=boxes.is_box
  )


def mesh():
  return jax.make_mesh((4, 2), ("expert", "model"), axis_types=(AxisType.Auto,) * 2)


RULES = (("embed", None), ("mlp", "model"), ("expert", "expert"))


@pytest.mark.parametrize("box", [pytest.param("mesh", marks=pytest.mark.slow), "logical"])
def test_existing_sharding_code_needs_no_special_case(box):
  """Shapes, shardings from the boxes, and init and step under jit work as for any Flax model."""
  model = Model(box)
  shapes = jax.eval_shape(model.init, KEY, X)
  with jax.set_mesh(mesh()), nn.logical_axis_rules(RULES):
    if box == "mesh":
      shardings = nn.get_sharding(shapes, mesh())
    else:
      shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(shapes), mesh(), RULES)
    start = cases.quickly(model.init, out_shardings=shardings)(KEY, X)
    state = fp8.TrainState.create(apply_fn=model.apply, params=start, tx=optax.sgd(0.5))

    @functools.partial(cases.quickly, out_shardings=shardings)
    def step(state):
      return state.apply_gradients(grads=fp8.grad(lambda v: loss(model, v))(state.params)).params

    new = step(state)
  # Start from the same values, because random numbers may depend on the sharding.
  alone = jax.device_get(boxes.unbox(start))
  want = cases.quickly(jax.grad(lambda v: loss(Model(None), v)))(alone)
  got = jax.device_get(boxes.unbox(new))
  # Another order of summation may flip the rounding of single elements.
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), got[OWG], want[OWG])
  for leaf in jax.tree.leaves(new[OWG]["experts"]):
    assert leaf.sharding.spec[0] == "expert"
    assert leaf.addressable_shards[0].data.shape[0] == EXPERTS // 4
  for leaf in jax.tree.leaves(new[OWG]["shared"]):
    assert leaf.sharding.is_fully_replicated


def test_training(variables):
  """Casts, gradients and updates. The state of a layer used twice gets the larger amax."""
  plain = boxes.unbox(variables)
  grads = cases.quickly(fp8.grad(functools.partial(loss, Model())))(variables)
  expected = cases.quickly(fp8.grad(functools.partial(loss, Model(None))))(plain)
  same(grads, expected)
  by_jax = jax.grad(lambda v: loss(Model(), fp8.as_max_grad(v)))
  same(cases.quickly(by_jax)(variables), expected)
  overwrite, rest = fp8.partition_for_grad_overwrite(grads)
  new = fp8.apply_updates(variables, rest, overwrite)
  wanted = fp8.partition_for_grad_overwrite(expected)
  same(new, fp8.apply_updates(plain, wanted[1], wanted[0]))
  assert jax.tree.structure(new) == jax.tree.structure(variables)
  create = functools.partial(fp8.TrainState.create, apply_fn=Model().apply, tx=optax.sgd(1.0))
  stepped = create(params=variables).apply_gradients(grads=grads).params
  same(stepped, create(params=plain).apply_gradients(grads=expected).params)


def test_upgrade_downgrade_and_metrics(variables):
  x = jax.ShapeDtypeStruct(X.shape, X.dtype)
  bare = initialized(Model(cls=None))
  plain = boxes.unbox(bare)
  upgraded = fp8.upgrade_variables(Model(), bare, x)
  same(upgraded, fp8.upgrade_variables(Model(), plain, x))
  assert jax.tree.structure(upgraded) == jax.tree.structure(variables)
  shorter = Model(cls=fp8.DelayedScaling(amax_history_len=2).dot_general_cls)
  seen = jax.tree.map(lambda leaf: leaf + 1, variables)
  same(
    fp8.upgrade_variables(shorter, seen, x), fp8.upgrade_variables(shorter, boxes.unbox(seen), x)
  )
  cases.equal(fp8.downgrade_variables(upgraded), bare)
  measured = fp8.add_metrics(Model(), variables, x)
  same(measured, fp8.add_metrics(Model(), boxes.unbox(variables), x))
  cases.equal(fp8.drop_metrics(measured), variables)


def test_diagnostics(variables):
  plain = boxes.unbox(variables)
  calibrated = fp8.calibrate(Model(), variables, [X], progress=False)
  same(calibrated, fp8.calibrate(Model(None), plain, [X], progress=False))
  # Compare the text, because missing measurements are NaN.
  assert repr(fp8.stats(calibrated)) == repr(fp8.stats(boxes.unbox(calibrated)))
  assert len(fp8.stats(calibrated).rows) == 3 * (1 + EXPERTS)


def test_checkpoint(variables, tmp_path):
  fp8.save_checkpoint(tmp_path, variables)
  target = jax.tree.map(jnp.zeros_like, variables)
  cases.equal(fp8.restore_checkpoint(tmp_path, target).tree, variables)


def test_inference(variables):
  served, frozen = fp8.freeze_for_inference(Model(), variables, X)
  plain = boxes.unbox(variables)
  _, expected = fp8.freeze_for_inference(Model(None), plain, X)
  cases.equal(boxes.unbox(flax.core.unfreeze(frozen)), flax.core.unfreeze(expected))
  apply = cases.quickly(served.apply)
  cases.equal(apply(frozen, X), cases.quickly(Model(None).apply)(plain, X))


def test_converted_module(variables):
  """A converted module stores its state among the parameters while it runs."""
  convert = functools.partial(
    fp8.fp8_linear_layers, config=fp8.Fp8Config(recipe=RECIPE, multiple_of=1)
  )
  converted, plain = convert(Model(cls=None)), convert(Model(None, cls=None))
  made = initialized(converted)
  assert jax.tree.structure(made) == jax.tree.structure(variables)
  same(made, initialized(plain))
  grads = cases.quickly(fp8.grad(functools.partial(loss, converted)))(made)
  same(grads, cases.quickly(fp8.grad(functools.partial(loss, plain)))(boxes.unbox(made)))
