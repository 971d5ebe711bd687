"""The layout that XLA keeps to: on one device, and left to it where it shards a program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_fp8.layout import in_rows

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
  """It would gather the array."""
  assert "LayoutConstraint" not in lowered(in_rows, SHARDED)


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_a_shard_map_there_is_one(check_vma):
  specs = {"in_specs": P("data"), "out_specs": P("data")}
  mapped = jax.shard_map(in_rows, mesh=MESH, check_vma=check_vma, **specs)
  assert "LayoutConstraint" in lowered(mapped, SHARDED)
