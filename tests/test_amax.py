"""The axes and devices that the amax is reduced over, under nested transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flax_fp8.amax import amax, largest_magnitude
from tests.transformations import mesh

X = np.random.default_rng(1).normal(size=(4, 3, 5, 2)).astype(np.float32)
A = np.abs(X)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_is_the_largest_magnitude(dtype):
  x = jnp.asarray(X, dtype)
  got = amax(x, ())
  assert got.dtype == jnp.float32
  assert got.shape == ()
  assert float(got) == float(np.abs(np.asarray(x, np.float32)).max())


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_of_nothing_is_zero(shape):
  assert float(amax(jnp.zeros(shape), ())) == 0.0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_show(value):
  assert not np.isfinite(amax(jnp.array([1.0, value]), ()))


@pytest.mark.parametrize(
  "dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__
)
@pytest.mark.parametrize("place", [0, 2048, 4095])
def test_a_nan_shows_among_many_values(place, dtype):
  """For this size, XLA's CPU compiler drops NaN from a float maximum, or returns -inf."""
  x = np.random.default_rng(0).normal(size=4096)
  x[place] = np.nan
  assert np.isnan(jax.jit(amax)(jnp.asarray(x, dtype), ()))
  rows = largest_magnitude(jnp.asarray(x, dtype).reshape(2, 2048), (1,))
  np.testing.assert_array_equal(np.isnan(rows[:, 0]), [place < 2048, place >= 2048])


# For each vmap, outermost first: whether the state is mapped. Then the axes that are reduced.
NESTED = {
  ("shared", "shared"): (0, 1, 2, 3),
  ("mapped", "shared"): (1, 2, 3),
  ("shared", "mapped"): (0, 2, 3),
  ("mapped", "mapped"): (2, 3),
}


@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("how", NESTED, ids="-".join)
def test_nested_vmap(how, run):
  outer, inner = (0 if h == "mapped" else None for h in how)
  shape = tuple(n for n, axis in zip((4, 3), (outer, inner), strict=True) if axis is not None)
  state = {"amax_history": jnp.zeros((*shape, 7)), "scale": jnp.zeros((*shape, 1))}
  f = jax.vmap(jax.vmap(amax, in_axes=(0, inner)), in_axes=(0, outer))
  got = run(f)(X, state)
  want = np.broadcast_to(A.max(axis=NESTED[how], keepdims=True)[:, :, 0, 0], (4, 3))
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_mapping_any_axis_over_mapped_state(axis):
  got = jax.vmap(amax, in_axes=(axis, 1))(X, jnp.zeros((6, X.shape[axis])))
  np.testing.assert_array_equal(got, np.moveaxis(A, axis, 0).reshape(X.shape[axis], -1).max(1))


def test_one_tensor_for_many_states():
  got = jax.vmap(amax, in_axes=(None, 0))(X, jnp.zeros((6, 2)))
  np.testing.assert_array_equal(got, np.full(6, A.max()))


def test_an_unmapped_result_stays_unmapped():
  """Otherwise autodiff would sum the cotangents over the mapped axis."""
  inner = lambda x: amax(x, jnp.zeros(2))
  jaxpr = jax.make_jaxpr(jax.vmap(inner, out_axes=None))(X)
  assert jaxpr.out_avals[0].shape == ()


@pytest.mark.parametrize("check_vma", [True, False])
def test_sharded_tensor_replicated_state(check_vma):
  f = lambda x, s: amax(x, s)
  run = jax.shard_map(f, mesh=mesh(), in_specs=(P("data"), P()), out_specs=P(), check_vma=check_vma)
  assert float(jax.jit(run)(X, jnp.zeros(2))) == A.max()


def test_sharded_tensor_sharded_state():
  f = lambda x, s: amax(x, s)[None]
  run = jax.shard_map(f, mesh=mesh(), in_specs=(P("data"), P("data")), out_specs=P("data"))
  np.testing.assert_array_equal(jax.jit(run)(X, jnp.zeros(4)), A.max(axis=(1, 2, 3)))
