"""Checksums depend on every bit of a leaf, but not on its sharding."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_fp8.training.checksums import checksums, damaged

X = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)


def place(x, rows, columns, spec):
  devices = np.array(jax.devices()[: rows * columns]).reshape(rows, columns)
  return jax.device_put(x, NamedSharding(Mesh(devices, ("a", "b")), PartitionSpec(*spec)))


PLACED = {
  "numpy": lambda x: x,
  "one device": jnp.asarray,
  "rows": lambda x: place(x, 4, 1, ("a",)),
  "columns": lambda x: place(x, 1, 4, (None, "b")),
  "both": lambda x: place(x, 2, 2, ("a", "b")),
  "both of one axis": lambda x: place(x, 2, 2, (None, ("b", "a"))),
  "replicated": lambda x: place(x, 2, 2, ()),
}


@pytest.mark.parametrize("written", PLACED.values(), ids=PLACED)
def test_the_mesh_of_the_reader_is_its_own(written):
  sums = json.loads(json.dumps(checksums({"x": written(X)})))
  for read in PLACED.values():
    assert damaged({"x": read(X)}, sums) == []
    assert damaged({"x": read(np.roll(X, 1))}, sums) == ["x"]


def test_each_bit_counts():
  sums = checksums({"x": place(X, 2, 2, ("a", "b"))})
  bits = np.unpackbits(X.view(np.uint8).ravel())
  for i in range(bits.size):
    bits[i] ^= 1
    assert damaged({"x": np.packbits(bits).view(np.float32).reshape(X.shape)}, sums) == ["x"]
    bits[i] ^= 1


def test_leaves_of_all_kinds():
  dtypes = (jnp.bfloat16, jnp.float8_e4m3fn, jnp.int4, bool, jnp.complex64)
  arrays = {str(jnp.dtype(dtype)): jnp.ones(3).astype(dtype) for dtype in dtypes}
  others = {"int": 3, "float": 0.1, "str": "text", "numpy": np.float32(2), "scalar": jnp.ones(())}
  leaves = {**arrays, **others, "keys": jax.random.split(jax.random.key(0), 4)}
  sums = checksums(leaves)
  assert damaged(leaves, sums) == []
  other = {"int": 4, "float": 0.2, "str": "test", "numpy": np.float32(1), "scalar": jnp.zeros(())}
  wrong = {name: jnp.zeros_like(leaf) for name, leaf in arrays.items()} | other
  wrong["keys"] = jax.random.split(jax.random.key(1), 4)
  assert sorted(damaged(wrong, sums)) == sorted(leaves)


def test_a_key_is_not_its_data():
  key = jax.random.key(0, impl="rbg")
  data = jax.random.key_data(key)
  sums = checksums({"key": key})
  assert damaged({"key": data}, sums) == ["key"]
  assert damaged({"key": jax.random.wrap_key_data(data, impl="unsafe_rbg")}, sums) == ["key"]
