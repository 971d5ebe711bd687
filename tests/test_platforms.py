"""Selection by platform, and the layout constraint for XLA on one device."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_fp8 import _compat
from flax_fp8.platforms import by_platform, in_rows

X = jnp.arange(6.0).reshape(2, 3)


def test_it_is_the_identity():
  np.testing.assert_array_equal(in_rows(X), X)
  np.testing.assert_array_equal(jax.jit(in_rows)(X), X)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_under_vmap(axis):
  x = jnp.arange(24.0).reshape(2, 3, 4)
  got = jax.vmap(lambda x: in_rows(x) * 2, in_axes=axis)(x)
  np.testing.assert_array_equal(got, 2 * np.moveaxis(x, axis, 0))


def test_derivatives():
  f = lambda x: (in_rows(x) ** 2).sum()
  np.testing.assert_array_equal(jax.grad(f)(X), 2 * X)
  np.testing.assert_array_equal(jax.jvp(f, (X,), (X,))[1], 2 * (X * X).sum())


def lowered(fun, *shapes):
  return jax.jit(fun).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def test_one_device_of_cuda_has_a_constraint():
  shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
  assert "LayoutConstraint" in lowered(in_rows, shape)
  assert "LayoutConstraint" not in jax.jit(in_rows).lower(shape).as_text()


MESH = AbstractMesh((8,), ("data",))
SHARDED = jax.ShapeDtypeStruct((16, 3), jnp.float32, sharding=NamedSharding(MESH, P("data")))


def test_where_xla_shards_there_is_none():
  """XLA would gather the array."""
  assert "LayoutConstraint" not in lowered(in_rows, SHARDED)


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_a_shard_map_there_is_one(check_vma):
  specs = {"in_specs": P("data"), "out_specs": P("data")}
  mapped = jax.shard_map(in_rows, mesh=MESH, check_vma=check_vma, **specs)
  assert "LayoutConstraint" in lowered(mapped, SHARDED)


def test_each_platform_computes_its_own_in_a_program_for_both():
  """A CPU rejects the code that is meant for CUDA only."""
  dims = (((1,), (0,)), ((), ()))
  named = jax.lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32
  plain = lambda x, y: jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)
  other = lambda x, y: jax.lax.dot_general(x, y, dims, named, jnp.float32)
  if not _compat.NAMES_FP8_ALGORITHM:
    other = lambda x, y: 2 * plain(x, y)
  fun = jax.jit(lambda x, y: by_platform(x, y, cuda=other, default=plain))
  x = jnp.arange(16.0).reshape(4, 4).astype(jnp.float8_e4m3fn)
  exported = jax.export.export(fun, platforms=("cpu", "cuda"))(x, x)
  np.testing.assert_array_equal(exported.call(x, x), plain(x, x))
  np.testing.assert_array_equal(fun(x, x), plain(x, x))
  np.testing.assert_array_equal(by_platform(x, x, cuda=other, default=plain), plain(x, x))


def double(x):
  return by_platform(x, cuda=lambda x: 3 * x, default=lambda x: 2 * x)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_choice_under_vmap(axis):
  got = jax.jit(jax.vmap(double, in_axes=axis, out_axes=axis))(X)
  np.testing.assert_array_equal(got, 2 * X)
  pair = lambda x, y: by_platform(x, y, cuda=jnp.subtract, default=jnp.add)
  got = jax.vmap(pair, in_axes=(0, None))(X, X[0])
  np.testing.assert_array_equal(got, X + X[:1])


def test_a_choice_has_the_derivative_of_the_default():
  np.testing.assert_array_equal(jax.grad(lambda x: double(x).sum())(X), 2 * jnp.ones_like(X))


def test_what_is_exported_has_no_constraint():
  """JAX would not serialize it."""
  shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
  exported = jax.export.export(jax.jit(in_rows), platforms=["cuda"])(shape)
  assert "LayoutConstraint" not in exported.mlir_module()
