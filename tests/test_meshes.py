"""Ten training steps on a mesh of eight devices equal those on one device, bit for bit.

FP8 rounding amplifies small differences: if two programs sum a product in different orders, an
element may fall on the other side of a tie, and the runs diverge. All sums here are therefore exact
in any order. Inputs are integers, and kernels are multiples of 1/4. The loss is a sum of distances,
so its gradient is -1, 0 or 1. The optimizer steps by the sign of the gradient times 1/4. Scales are
powers of two. Rounding an integer to FP8 then gives an integer, and ``test_no_sum_was_rounded``
checks that all sums stay below 2**24. Both parameters and state are compared for equality.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_fp8 as fp8

OWG = fp8.OVERWRITE_WITH_GRADIENT
STEPS, BATCH, EXPERTS, WIDTH, HIDDEN, UNIT = 10, 16, 8, 16, 32, 0.25
RECIPE = fp8.DelayedScaling(amax_history_len=12, power_of_two=True)
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def on_grid(key, shape, dtype=jnp.float32):
  return UNIT * jax.random.randint(key, shape, -3, 4).astype(dtype)


def dense(features, out_sharding=None, **options):
  cls = functools.partial(RECIPE.dot_general_cls, out_sharding=out_sharding)
  return nn.Dense(features, use_bias=False, kernel_init=on_grid, dot_general_cls=cls, **options)


class Expert(nn.Module):
  """The layers that one expert applies to its tokens."""

  out_sharding: P | None

  @nn.compact
  def __call__(self, x):
    return dense(WIDTH, self.out_sharding, name="down")(x)


class Model(nn.Module):
  """A layer that mixes tokens along the sequence, then one expert for each position."""

  hidden: P | None = None  # sharding of hidden values, [batch, sequence, features]
  down: P | None = None  # sharding of an expert's result, on a mesh with explicit axes

  @nn.compact
  def __call__(self, x):
    h = nn.relu(dense(HIDDEN, name="up")(x))
    if self.hidden is not None:
      h = jax.lax.with_sharding_constraint(h, self.hidden)
    h = h + jnp.roll(h, 1, axis=1)
    axes = {"params": 0, OWG: 0}
    experts = nn.vmap(
      Expert, variable_axes=axes, split_rngs={"params": True}, in_axes=1, out_axes=1
    )
    return experts(self.down, name="experts")(h)


def data():
  random = np.random.default_rng(0)
  shape = (STEPS, BATCH, EXPERTS, WIDTH)
  x = random.integers(-3, 4, shape) * random.integers(1, 3, (STEPS, 1, 1, 1))
  return x.astype(np.float32), random.integers(-99, 100, shape).astype(np.float32)


def by_sign():
  """An optimizer that steps by one unit against the gradient. Ten steps are exact."""
  sign = optax.stateless(lambda grads, _: jax.tree.map(jnp.sign, grads))
  return optax.chain(sign, optax.scale(-UNIT))


def distance(state, variables, x, y):
  return jnp.sum(jnp.abs(state.apply_fn(variables, x) - y))


def step(state, batch):
  loss, grads = fp8.value_and_grad(lambda v: distance(state, v, *batch))(state.params)
  return state.apply_gradients(grads=grads), loss


def create(model):
  variables = quickly(Model().init)(jax.random.key(0), data()[0][0])
  return fp8.TrainState.create(apply_fn=model.apply, params=variables, tx=by_sign())


def train(state, batches, step=step):
  state, losses = jax.lax.scan(step, state, batches)
  return state.params, losses


@functools.cache
def alone():
  return jax.device_get(quickly(train)(create(Model()), data()))


def mesh(kind):
  return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


ALL = ("data", "model")
# Shardings of x, of the kernels of "up" and of the experts, of the experts' state, and of hidden
# values.
LAYOUTS = {
  "data parallel": (P(ALL), P(), P(), P(), None),
  "FSDP": (P(ALL), P(ALL), P(None, ALL), P(), None),
  "tensor parallel": (P(), P(None, ALL), P(None, ALL), P(), None),
  "FSDP and tensor parallel": (P("data"), P("data", "model"), P(None, "model", "data"), P(), None),
  "expert parallel": (P(ALL), P(), P(ALL), P(ALL), None),
  "sequence parallel": (P("data"), P(None, "model"), P(None, "model"), P(), P("data", "model")),
}


def specs(variables, up, experts, state):
  """Returns the PartitionSpec of each leaf of the variables."""

  def one(path, _):
    collection, layer = path[0].key, path[1].key
    if collection == OWG:
      return state if layer == "experts" else P()
    return up if layer == "up" else experts

  return jax.tree_util.tree_map_with_path(one, variables)


def placed(state, mesh, up, experts, of_state):
  sharding = lambda spec: NamedSharding(mesh, spec)
  params = jax.tree.map(sharding, specs(state.params, up, experts, of_state))
  return state.replace(params=jax.device_put(state.params, params)), params


def equal(got, want):
  (got, got_losses), (want, want_losses) = jax.device_get(got), want
  jax.tree.map(np.testing.assert_array_equal, got[OWG], want[OWG])
  jax.tree.map(np.testing.assert_array_equal, got["params"], want["params"])
  np.testing.assert_array_equal(got_losses, want_losses)


# The parts of "FSDP and tensor parallel" on their own.
SLOW = ("FSDP", "tensor parallel")


@pytest.mark.parametrize(
  "layout", [pytest.param(k, marks=pytest.mark.slow if k in SLOW else ()) for k in LAYOUTS]
)
def test_jit_with_shardings(layout):
  x, up, experts, of_state, hidden = LAYOUTS[layout]
  with jax.set_mesh(auto := mesh(AxisType.Auto)):
    state, params = placed(create(Model(hidden)), auto, up, experts, of_state)
    batches = jax.device_put(data(), NamedSharding(auto, P(None, *x)))
    out = params, NamedSharding(auto, P())
    equal(quickly(train, out_shardings=out)(state, batches), alone())


def test_explicit_axes():
  """Like "FSDP and tensor parallel", with the shardings in the types."""
  x, up, experts, of_state, _ = LAYOUTS["FSDP and tensor parallel"]
  with jax.set_mesh(explicit := mesh(AxisType.Explicit)):
    state, params = placed(create(Model(down=P("data"))), explicit, up, experts, of_state)
    batches = jax.device_put(data(), NamedSharding(explicit, P(None, *x)))
    got = quickly(train)(state, batches)
    equal(got, alone())
    same = lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert all(jax.tree.leaves(jax.tree.map(same, got[0], params)))


@pytest.mark.parametrize("check_vma", [True, False], ids=["check_vma", "unchecked"])
def test_shard_map(check_vma):
  """Maps the whole step. Without checks, the step sums the parameters' gradients itself."""

  def mapped(state, batch):
    local = lambda v: distance(state, v, *batch)
    loss, grads = fp8.value_and_grad(local)(state.params)
    loss = jax.lax.psum(loss, ALL)
    if not check_vma:
      grads = {**grads, "params": jax.lax.psum(grads["params"], ALL)}
    return state.apply_gradients(grads=grads), loss

  run = jax.shard_map(
    functools.partial(train, step=mapped),
    mesh=mesh(AxisType.Auto),
    in_specs=(P(), P(None, ALL)),
    out_specs=P(),
    check_vma=check_vma,
  )
  equal(quickly(run)(create(Model()), data()), alone())


def test_no_sum_was_rounded():
  """The histories hold the amaxes of all ten steps, which bound every sum of every product."""
  variables, losses = alone()
  layers = {
    "up": (variables[OWG]["up"], WIDTH, HIDDEN, 1.0),
    "experts": (variables[OWG]["experts"]["down"], HIDDEN, WIDTH, UNIT),
  }
  for state, contracted, features, unit in layers.values():
    state = state["Fp8DotGeneral_0"]
    amax = {r: state[f"{r}_amax_history"].max() for r in ("input", "kernel", "output_grad")}
    # In units of the product. FP8 rounds up by at most one eighth.
    assert contracted * amax["input"] / unit * amax["kernel"] / UNIT * 1.25 < 2**24
    assert features * amax["output_grad"] / UNIT * amax["kernel"] / UNIT * 1.25 < 2**24
    assert BATCH * EXPERTS * amax["input"] / unit * amax["output_grad"] / UNIT * 1.25 < 2**24
  assert len({float(v) for v in losses}) == STEPS
  assert np.all(losses[-3:] < losses[0])
  scales = variables[OWG]["experts"]["down"]["Fp8DotGeneral_0"]["input_scale"]
  assert scales.shape == (EXPERTS, 1)
