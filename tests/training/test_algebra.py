"""The FP8 state of a split batch equals that of the whole batch, bit for bit.

The maximum does not depend on order and number of parts. Sums do, if they are rounded. So inputs,
kernels and cotangents are small multiples of powers of two, and scales are powers of two. Then
every product of FP8 values and every partial sum is exact in float32. State that is summed,
averaged, taken from the last part or shifted twice gives other bits.
"""

import dataclasses
import functools

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_fp8 as fp8

OWG = fp8.OVERWRITE_WITH_GRADIENT
RECIPE = fp8.DelayedScaling(amax_history_len=3, power_of_two=True, margin=1)
EXAMPLES, WIDTH, HIDDEN = 24, 4, 8


class Model(nn.Module):
  """A layer that is called once, and a layer that is called twice."""

  @nn.compact
  def __call__(self, x):
    cls = RECIPE.dot_general_cls
    once, twice = (nn.Dense(HIDDEN, use_bias=False, dot_general_cls=cls) for _ in range(2))
    return twice(nn.relu(twice(nn.relu(once(x)))))


model = Model()


@dataclasses.dataclass(frozen=True)
class Split:
  """How a batch is split. The rest of the batch axis is the examples of one call.

  Attributes:
    loop: "accumulate", or a "scan" or "unrolled" loop inside the loss.
    microbatches: iterations of the loop.
    mapped: size of a vmap axis.
    devices: number of devices in the mesh.
    mesh: "shardings" of jit, or a "checked" or "unchecked" shard_map around or inside the loop.
  """

  loop: str = "accumulate"
  microbatches: int = 1
  mapped: int = 1
  devices: int = 1
  mesh: str = "shardings"


WHOLE = Split()


@functools.cache
def jax_maps_sums_over_devices():
  """Whether JAX can map ``psum`` inside a checked shard_map: 0.8 raises."""
  mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
  mapped = jax.vmap(lambda x: jax.lax.psum(x, "data"))
  try:
    jax.eval_shape(jax.shard_map(mapped, mesh=mesh, in_specs=P("data"), out_specs=P()), jnp.ones(1))
  except TypeError:
    return False
  return True


@st.composite
def splits(draw):
  """Draws an even split of the batch."""
  whole, sizes = EXAMPLES, {}
  # Draw devices first: at most eight, and more than one in half of the draws.
  for name in ("devices", "microbatches", "mapped"):
    largest = len(jax.devices()) if name == "devices" else whole
    divisors = [n for n in range(1, largest + 1) if whole % n == 0]
    sizes[name] = draw(st.sampled_from(divisors))
    whole //= sizes[name]
  loop = draw(st.sampled_from(["accumulate", "scan", "unrolled"]))
  hypothesis.assume(loop != "unrolled" or sizes["microbatches"] <= 4)  # compiles slowly
  mesh = draw(st.sampled_from(["shardings", "checked", "unchecked"]))
  hypothesis.assume(mesh != "checked" or sizes["mapped"] == 1 or jax_maps_sums_over_devices())
  return Split(loop, mesh=mesh, **sizes)


def loss_of_part(mapped, variables, part):
  """Sums the outputs over examples, weighted by cotangents."""
  x, weights = part

  def one(x, weights):
    return jnp.sum(model.apply(variables, x) * weights)

  if mapped == 1:
    return one(x, weights)
  cut = lambda leaf: leaf.reshape(mapped, -1, *leaf.shape[1:])
  return jnp.sum(jax.vmap(one)(cut(x), cut(weights)))


def gradients(split, variables, batch):
  """Computes the gradients of a batch ``[microbatches, n, ...]`` in the loop of ``split``."""
  part = functools.partial(loss_of_part, split.mapped)
  if split.loop == "accumulate":
    return fp8.accumulate_gradients(part, variables, batch, reduction="sum")[1]

  def scanned(variables):
    step = lambda total, microbatch: (total + part(variables, microbatch), None)
    return jax.lax.scan(step, jnp.sum(batch[0] * 0), batch)[0]

  def unrolled(variables):
    return sum(part(variables, (batch[0][i], batch[1][i])) for i in range(split.microbatches))

  return fp8.grad({"scan": scanned, "unrolled": unrolled}[split.loop])(variables)


@functools.lru_cache(maxsize=16)
def program(split):
  """Compiles the gradients of a batch ``[examples, ...]`` for one split."""
  mesh = jax.make_mesh((split.devices,), ("data",), axis_types=(AxisType.Auto,))

  def local(variables, batch):
    grads = gradients(split, variables, batch)
    if split.mesh == "unchecked":
      grads = {**grads, "params": jax.lax.psum(grads["params"], "data")}
    return grads

  def whole(variables, batch):
    batch = jax.tree.map(lambda a: a.reshape(split.microbatches, -1, *a.shape[1:]), batch)
    spec = P(None, "data")
    if split.mesh == "shardings":
      batch = jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, spec))
      return gradients(split, variables, batch)
    checked = split.mesh == "checked"
    specs = {"in_specs": (P(), spec), "out_specs": P()}
    return jax.shard_map(local, mesh=mesh, check_vma=checked, **specs)(variables, batch)

  return jax.jit(whole)


def grid(random, shape, largest, step):
  """Draws multiples of a power of two, which give exact sums of products."""
  return np.float32(step) * random.integers(-largest, largest + 1, shape).astype(np.float32)


def draw_variables(random):
  """Draws parameters and state, with scales that may or may not fit their tensors."""
  fresh = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, WIDTH)))

  def leaf(path, like):
    if path[-1].key == "kernel":
      return grid(random, like.shape, 3, 0.5)
    powers = np.exp2(random.integers(-3, 7, like.shape)).astype(np.float32)
    unseen = path[-1].key.endswith("history") & (random.random(like.shape) < 0.3)
    return np.where(unseen, np.float32(0), powers)

  return jax.tree_util.tree_map_with_path(leaf, fresh)


def check(split, seed):
  """Compares a split and reordered batch with the whole batch."""
  random = np.random.default_rng(seed)
  variables = draw_variables(random)
  x, weights = (
    grid(random, (EXAMPLES, n), k, step) for n, k, step in ((WIDTH, 7, 0.25), (HIDDEN, 3, 0.5))
  )
  want = program(WHOLE)(variables, (x, weights))
  order = random.permutation(EXAMPLES)
  got = program(split)(variables, (x[order], weights[order]))
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))
  # The state takes one step, with the amaxes of the largest example.
  old, new = (t[OWG]["Dense_0"]["Fp8DotGeneral_0"]["input_amax_history"] for t in (variables, got))
  np.testing.assert_array_equal(new, [np.abs(x).max(), old[2], old[0]])


any_case = hypothesis.given(splits(), st.integers(0, 2**32 - 1))


@hypothesis.settings(max_examples=3, deadline=None)
@any_case
def test_however_the_batch_is_split(split, seed):
  check(split, seed)


@pytest.mark.slow
@hypothesis.settings(max_examples=16, deadline=None)
@any_case
def test_however_the_batch_is_split_at_length(split, seed):
  check(split, seed)
