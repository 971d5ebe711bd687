"""Straight-through second derivatives, compared with those of the float32 model."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from flax_fp8 import ops, straight_through

OWG = fp8.OVERWRITE_WITH_GRADIENT
X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 32)), jnp.float32)
RECIPES = {
  "delayed": fp8.DelayedScaling(amax_history_len=2),
  "current": fp8.Float8CurrentScaling(),
  "rowwise": fp8.Float8RowwiseScaling(),
  "block": fp8.Float8BlockScaling(),
  "mxfp8": fp8.MXFP8BlockScaling(),
  "dgrad kept": fp8.Float8CurrentScaling(high_precision=("dgrad",)),
}


class Step(nn.Module):
  """A layer that is the step of a scan."""

  cls: object

  @nn.compact
  def __call__(self, x, _):
    return jnp.tanh(nn.Dense(32, dot_general_cls=self.cls)(x)), None


class Model(nn.Module):
  """Two layers. If ``cls`` is None, this is the model without FP8."""

  cls: object
  lift: str = "none"

  @nn.compact
  def __call__(self, x):
    step = nn.remat(Step) if "remat" in self.lift else Step
    if "scan" in self.lift:
      scanned = fp8.scan(step, {"params": 0}, split_rngs={"params": True}, length=2)
      return scanned(self.cls)(x, None)[0]
    for _ in range(2):
      x, _ = step(self.cls)(x, None)
    return x


@functools.cache
def pair(name, lift):
  """Makes an FP8 model and one without FP8, with equal parameters and state after one step."""
  ours, plain = Model(RECIPES[name].dot_general_cls, lift), Model(None, lift)
  variables = jax.jit(ours.init)(jax.random.key(0), X)
  if OWG in variables:
    step = jax.jit(fp8.grad(lambda v: jnp.sum(ours.apply(v, X) ** 2)))
    for _ in range(2):
      variables = {**variables, OWG: step(variables)[OWG]}
  return ours, plain, variables


def penalty(model, state, scale=1.0):
  """Computes a gradient penalty: the squared norm of the input's gradient."""

  def of_params(params):
    loss = lambda x: scale * jnp.sum(model.apply({"params": params, **state}, x) ** 2)
    return jnp.sum(jax.grad(loss)(X) ** 2) / scale**2

  return jax.grad(of_params)


def curvature(model, state):
  """Computes a Hessian-vector product, forward over reverse."""

  def of_params(params):
    loss = lambda params: jnp.sum(model.apply({"params": params, **state}, X) ** 2)
    return jax.jvp(jax.grad(loss), (params,), (jax.tree.map(jnp.cos, params),))[1]

  return of_params


def error(got, want):
  got, want = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(t)]) for t in (got, want))
  return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


CASES = [
  *((penalty, *case) for case in (
    ("delayed", "none"), ("delayed", "scan"), ("delayed", "scan, remat"), ("current", "none"),
    ("current", "scan, remat"), ("rowwise", "scan"), ("block", "none"), ("mxfp8", "none"),
    ("dgrad kept", "none"),
  )),
  *((curvature, *case) for case in (
    ("delayed", "none"), ("delayed", "scan, remat"), ("rowwise", "scan"), ("block", "none"),
    ("mxfp8", "none"),
  )),
]  # fmt: skip


@functools.cache
def of_plain(second, lift):
  """The second derivative of the plain model: its parameters are the same with every recipe."""
  _, plain, variables = pair("current", lift)
  return jax.jit(second(plain, {}))(variables["params"])


@pytest.mark.parametrize(("second", "name", "lift"), CASES)
def test_within_fp8_of_the_plain_model(second, name, lift):
  ours, _, variables = pair(name, lift)
  params, state = variables["params"], {OWG: variables[OWG]} if OWG in variables else {}
  got = jax.jit(second(ours, state))(params)
  assert 1e-3 < error(got, of_plain(second, lift)) < 0.2  # above zero: it is FP8


@pytest.mark.parametrize("name", ["current", "rowwise", "block", "mxfp8"])
def test_at_every_loss_scale(name):
  ours, _, variables = pair(name, "none")
  at = jax.jit(lambda params, scale: penalty(ours, {}, scale)(params))
  for scale in (1e-6, 1e6):
    got = at(variables["params"], jnp.float32(scale))
    assert error(got, of_plain(penalty, "none")) < 0.2, scale


@pytest.mark.parametrize("name", ["current", "block", "mxfp8"])
def test_nothing_in_nothing_out(name):
  recipe = RECIPES[name]
  state = ops.init_state(recipe)
  dot = lambda x, w: ops.dot_general(x, w, (((1,), (0,)), ((), ())), recipe=recipe, state=state)
  square = lambda x, w: jnp.sum(jax.grad(lambda x, w: jnp.sum(jnp.sin(dot(x, w))))(x, w) ** 2)
  sizes = (0, 32, 8), (4, 0, 8), (4, 32, 0)
  inputs = [(jnp.ones((m, k)), jnp.ones((k, n))) for m, k, n in sizes]
  found = jax.jit(lambda inputs: [jax.grad(square, (0, 1))(*each) for each in inputs])(inputs)
  for (m, k, n), grads in zip(sizes, found, strict=True):
    assert [grad.shape for grad in grads] == [(m, k), (k, n)]
    assert not any(np.any(grad) for grad in grads)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_the_dtype_of_the_computation(dtype):
  """Compiles forward over reverse to a GEMM that a CPU supports."""
  ours = nn.Dense(32, dtype=dtype, dot_general_cls=RECIPES["current"].dot_general_cls)
  plain = nn.Dense(32, dtype=dtype)
  params = plain.init(jax.random.key(0), X)

  def product(model):
    loss = lambda p: jnp.mean(model.apply(p, X).astype(jnp.float32) ** 3)
    return jax.jit(lambda p: jax.jvp(jax.grad(loss), (p,), (jax.tree.map(jnp.cos, p),))[1])

  assert error(product(ours)(params), product(plain)(params)) < 0.2


def test_clipping_has_the_derivative_of_the_tensor():
  """This includes the amax, where a clip has the derivative 1/2."""
  layer = nn.Dense(1, use_bias=False, dot_general_cls=RECIPES["current"].dot_general_cls)
  params = {"params": {"kernel": jnp.ones((1, 1))}}
  square = lambda x: jnp.sum(layer.apply(params, x) ** 2)
  assert jax.grad(lambda x: jnp.sum(jax.grad(square)(x)))(jnp.ones((1, 1)))[0, 0] == 2


def test_state_has_no_derivative_but_its_new_value():
  """A penalty alone records no state. With a loss, the new state comes from the loss only."""
  ours, _, variables = pair("delayed", "none")
  loss = lambda v: jnp.sum(ours.apply(v, X) ** 2)
  both = lambda v: loss(v) + jnp.sum(jax.grad(lambda x: jnp.sum(ours.apply(v, x)))(X) ** 2)
  alone = jax.jit(fp8.grad(lambda v: both(v) - loss(v)))
  np.testing.assert_array_equal(
    *(jnp.concatenate(jax.tree.leaves(jax.jit(fp8.grad(f))(variables)[OWG])) for f in (loss, both))
  )
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(alone(variables)))


@pytest.mark.parametrize("name", ["current", "rowwise", "block", "mxfp8"])
def test_on_a_mesh_with_explicit_axes(name):
  mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
  recipe, kernel = RECIPES[name], 0.1 * jnp.asarray(np.random.default_rng(1).normal(size=(32, 32)))
  dims = (((2,), (0,)), ((), ()))
  state = ops.init_state(recipe)

  def second(dot):
    loss = lambda x, w: jnp.sum(jnp.sin(dot(x, w)))
    return jax.jit(jax.grad(lambda x, w: jnp.sum(jax.grad(loss)(x, w) ** 2), (0, 1)))

  with jax.set_mesh(mesh):
    x = jax.device_put(X.reshape(8, 2, 32), jax.sharding.PartitionSpec("data"))
    w = jax.device_put(jnp.asarray(kernel, jnp.float32), jax.sharding.PartitionSpec())
    got = second(lambda x, w: ops.dot_general(x, w, dims, recipe=recipe, state=state))(x, w)
    want = second(lambda x, w: jax.lax.dot_general(x, w, dims))(x, w)
  assert error(jax.device_get(got), jax.device_get(want)) < 0.2


def test_forward_mode_is_refused():
  ours, _, variables = pair("current", "none")
  with pytest.raises(TypeError, match=r"forward-mode"):
    jax.jvp(lambda x: ours.apply(variables, x), (X,), (X,))


def test_the_dtype_is_one_byte_in_memory():
  dtype = straight_through.QuantizedDType(np.dtype(jnp.float8_e5m2), np.dtype("float32"))
  assert (dtype.name, dtype.itemsize) == ("float8_e5m2_of_float32", 1)
  x = jax.lax.convert_element_type(jnp.ones(3, jnp.float8_e5m2), dtype)
  assert jnp.issubdtype(x.dtype, straight_through.quantized)
  assert jax.lax.convert_element_type(x, jnp.float8_e5m2).dtype == jnp.float8_e5m2
  with pytest.raises(ValueError, match=r"float8_e5m2_of_float32"):
    jax.lax.convert_element_type(x, jnp.float32)
