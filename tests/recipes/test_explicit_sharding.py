"""Every recipe on a mesh with explicit axes, where the type of an array includes its sharding.

The operands are integers with exact sums of products, so the sharded program must equal the program
on a single device bit for bit.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_fp8 as fp8
from flax_fp8 import ops
from flax_fp8.ops import calibration
from flax_fp8.ops.metrics import init_metrics
from tests.recipes import cases
from tests.recipes.cases import DIMS, RECIPES

# The mesh divides these sizes evenly, but not always their blocks.
M, K, N = 16, 160, 12
X, W, C = cases.integers(1, M, K), cases.integers(2, K, N), cases.integers(3, M, N)
OUTSIDE = jnp.asarray(W)  # created outside of the mesh
EXPERTS = (((2,), (1,)), ((0,), (0,)))


@functools.cache
def mesh():
  return jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


@pytest.fixture(autouse=True)
def in_mesh():
  with jax.set_mesh(mesh()):
    yield


def place(x, spec):
  return jax.device_put(x, NamedSharding(mesh(), spec))


def step(recipe, x, w, c, state, dims=DIMS, out=None):
  """Computes the output, both gradients and the new state."""
  apply = lambda x, w, state: ops.dot_general(
    x, w, dims, recipe=recipe, state=state, key=cases.KEY, out_sharding=out
  )
  out, vjp = jax.vjp(apply, x, w, state)
  return (out, *vjp(jax.sharding.reshard(c, jax.typeof(out).sharding)))


run = cases.quickly(step, static_argnums=0, static_argnames=("dims", "out"))


@functools.cache
def alone(name):
  """Computes the same on one device."""
  with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))):
    return jax.device_get(cases.compiled_quickly(RECIPES[name], X, W, C))


def agree(got, want, like):
  """Asserts equal values, gradients sharded like their operands, and replicated state."""
  cases.equal(jax.device_get(got), want)
  for grad, operand in zip(got[1:3], like, strict=True):
    assert jax.typeof(grad).sharding == jax.typeof(operand).sharding
  assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(got[3]))


LAYOUTS = {  # shardings of x and w, and the required out_sharding, as for lax.dot_general
  "data parallel": (P("data"), P(), None),
  "FSDP, rows": (P("data"), P("data"), None),
  "FSDP, columns": (P("data"), P(None, "data"), P("data")),
  "tensor parallel, columns": (P("data"), P(None, "model"), None),
  "tensor parallel, rows": (P("data", "model"), P("model"), P("data")),
  "reduce-scattered": (P("data", "model"), P("model"), P("data", "model")),
  "FSDP and tensor parallel": (P("data"), P("data", "model"), None),
}


OF_EACH_CLASS = [
  (layout, name)
  for name in cases.ONE_OF_EACH_CLASS
  for layout in ("tensor parallel, rows", "FSDP and tensor parallel")
]
OF_ONE = [(layout, "delayed") for layout in LAYOUTS]
QUICK = ("FSDP, columns", "tensor parallel, rows")


def marked(layout, name):
  return pytest.param(layout, name, marks=() if layout in QUICK else pytest.mark.slow)


@pytest.mark.parametrize(
  ("layout", "name"), [marked(*case) for case in sorted({*OF_EACH_CLASS, *OF_ONE})]
)
def test_layouts(name, layout):
  """``out_sharding`` is required where ``lax.dot_general`` requires it. Results shard equally."""
  x_spec, w_spec, out = LAYOUTS[layout]
  recipe, x, w = RECIPES[name], place(X, x_spec), place(W, w_spec)
  got = run(recipe, x, w, C, ops.init_state(recipe), out=out)
  agree(got, alone(name), (x, w))
  plain = jax.eval_shape(lambda x, w: jax.lax.dot_general(x, w, DIMS, out_sharding=out), x, w)
  assert jax.typeof(got[0]).sharding == plain.sharding


@pytest.mark.slow
def test_without_jit():
  x_spec, w_spec, out = LAYOUTS["tensor parallel, rows"]
  recipe, x, w = RECIPES["delayed"], place(X, x_spec), place(W, w_spec)
  agree(step(recipe, x, w, C, ops.init_state(recipe), out=out), alone("delayed"), (x, w))


XS, WS, CS = (cases.integers(i, 4, *shape) for i, shape in enumerate([(8, 64), (64, 8), (8, 8)]))
BATCHED = (((2,), (1,)), ((0,), (0,)))


def experts(recipe, state_axis):
  """Runs experts with ``jax.vmap``, with one shared state or one state each."""

  def run(x, w, c, state):
    apply = lambda x, w, state: ops.dot_general(x, w, DIMS, recipe=recipe, state=state)
    out, vjp = jax.vjp(jax.vmap(apply, in_axes=(0, 0, state_axis)), x, w, state)
    return (out, *vjp(jax.sharding.reshard(c, jax.typeof(out).sharding)))

  return cases.quickly(run)


@pytest.mark.parametrize("state_axis", [None, 0], ids=["shared", "each"])
def test_vmap_over_sharded_experts(state_axis):
  """State per expert is sharded with its expert. Shared state records all experts."""
  recipe, by_expert = RECIPES["delayed"], P("data")
  x, w, c = (place(t, by_expert) for t in (XS, WS, CS))
  state = ops.init_state(recipe)
  if state_axis == 0:
    state = jax.tree.map(lambda leaf: place(jnp.stack([leaf] * 4), by_expert), state)
  out, dx, dw, new = experts(recipe, state_axis)(x, w, c, state)
  np.testing.assert_array_equal(out, XS @ WS)
  np.testing.assert_array_equal(dx, CS @ WS.transpose(0, 2, 1))
  np.testing.assert_array_equal(dw, XS.transpose(0, 2, 1) @ CS)
  for t in (out, dx, dw, *(jax.tree.leaves(new) if state_axis == 0 else ())):
    assert jax.typeof(t).sharding == jax.typeof(x).sharding or t.ndim < 3
  for role, seen in (("input", XS), ("kernel", WS), ("output_grad", CS)):
    largest = np.abs(seen).max(axis=None if state_axis is None else (1, 2))
    history = new[role]["amax_history"]
    np.testing.assert_array_equal(history[..., 0], largest)
    sharded = "data" in jax.tree.leaves(tuple(jax.typeof(history).sharding.spec))
    assert sharded == (state_axis == 0)


@pytest.mark.parametrize("name", ["delayed", "block", "stochastic"])
def test_einsum_with_experts(name):
  """Experts are a batch label over "data". The features of one expert are over "model"."""
  recipe = RECIPES[name]
  x, w = place(XS, P("data")), place(WS, P("data", None, "model"))

  @cases.quickly
  def run(x, w):
    apply = lambda x, w: ops.einsum(
      "ebk,ekn->ebn", x, w, recipe=recipe, state=ops.init_state(recipe), key=cases.KEY
    )
    out, vjp = jax.vjp(apply, x, w)
    return (out, *vjp(jax.sharding.reshard(jnp.ones(CS.shape), jax.typeof(out).sharding)))

  out, dx, dw = run(x, w)
  bound = 2.0**-3  # rounding of E4M3, and of E5M2 in products with the gradient; ones are exact
  want = (
    XS @ WS,
    np.ones(CS.shape) @ WS.transpose(0, 2, 1),
    XS.transpose(0, 2, 1) @ np.ones(CS.shape),
  )
  for got, exact in zip((out, dx, dw), want, strict=True):
    assert np.linalg.norm(got - exact) <= bound * np.linalg.norm(exact)
  assert jax.typeof(out).sharding.spec == P("data", None, "model")
  assert jax.typeof(dx).sharding == jax.typeof(x).sharding
  assert jax.typeof(dw).sharding == jax.typeof(w).sharding


def test_metrics_and_calibration():
  """Both cover the whole tensor."""
  recipe = RECIPES["delayed"]
  fresh = {role: leaves | init_metrics() for role, leaves in ops.init_state(recipe).items()}
  x, w = place(X, P("data", "model")), place(W, P("model"))
  with calibration.calibrating(calibration.Calibration(percentile=50.0)):
    new = run(recipe, x, w, C, fresh, out=P("data"))[3]
  for role, tensor in (("input", X), ("kernel", W), ("output_grad", C)):
    middle = np.percentile(np.abs(tensor), 50)
    assert float(new[role]["amax"][0]) == middle
    assert float(new[role]["amax_history"][0]) == middle
    assert float(new[role]["saturated"][0]) == 0


def test_a_layer_is_told_by_its_field():
  """Sets ``out_sharding`` of the module, or of ``lax.dot_general`` in a layer to convert."""
  x, spec = place(X, P("data", "model")), P("data")
  ours = functools.partial(fp8.Fp8DotGeneral, out_sharding=spec)
  layer = nn.Dense(N, use_bias=False, dot_general_cls=ours)
  variables = cases.quickly(layer.init)(jax.random.key(0), x)
  variables["params"]["kernel"] = place(W, P("model"))
  np.testing.assert_array_equal(cases.quickly(layer.apply)(variables, x), X @ W)
  plain = functools.partial(jax.lax.dot_general, out_sharding=spec)
  layer = nn.Dense(N, use_bias=False, dot_general=plain)
  converted = fp8.fp8_linear_layers(layer, fp8.Fp8Config(multiple_of=1))
  np.testing.assert_array_equal(cases.quickly(converted.apply)(variables, x), X @ W)


def test_an_ambiguous_product_is_refused():
  x, w = place(X, P(None, "model")), place(W, P("model"))
  apply = functools.partial(ops.dot_general, recipe=RECIPES["current"], state={})
  with pytest.raises(
    ValueError, match=r"must be unambiguous; got lhs .*16,160@model.*out_sharding"
  ):
    apply(x, w, DIMS)
  with pytest.raises(ValueError, match=r"out_sharding must be a PartitionSpec.*got .*'data'"):
    apply(x, w, DIMS, out_sharding="data")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "jit"), [("delayed", True), ("delayed", False), ("rowwise", False)]
)
def test_parameters_that_know_no_mesh(name, jit):
  recipe = RECIPES[name]
  loss = lambda w, x: jnp.sum(
    ops.dot_general(x, w, DIMS, recipe=recipe, state=ops.init_state(recipe)) * C.sum()
  )
  want = np.asarray(jax.grad(loss)(place(W, P()), place(X, P())))
  grad = jax.jit(jax.grad(loss)) if jit else jax.grad(loss)
  np.testing.assert_array_equal(grad(OUTSIDE, place(X, P("data"))), want)


@pytest.mark.parametrize("shared", ["x", "w", "neither"])
@pytest.mark.parametrize("name", ["delayed", "delayed, first step", "delayed, interval"])
def test_experts_with_states_of_their_own_on_a_mesh_axis(name, shared):
  recipe, copies = RECIPES[name], 2
  stack = lambda leaf: place(jnp.stack([leaf] * copies), P("data"))
  state = jax.tree.map(stack, ops.init_state(recipe))
  x, w = X if shared == "x" else stack(X), W if shared == "w" else stack(W)
  axes = tuple(None if shared == each else 0 for each in "xw")

  def run(x, w, state):
    apply = lambda x, w, state: ops.dot_general(x, w, DIMS, recipe=recipe, state=state)
    out, vjp = jax.vjp(jax.vmap(apply, (*axes, 0)), x, w, state)
    return out, vjp(jax.sharding.reshard(jnp.stack([C] * copies), jax.typeof(out).sharding))[2]

  out, new = jax.device_get(cases.quickly(run)(x, w, state))
  want_out, _, _, want_new = alone(name)
  for index in range(copies):
    cases.equal(
      jax.tree.map(lambda leaf, index=index: leaf[index], (out, new)), (want_out, want_new)
    )
