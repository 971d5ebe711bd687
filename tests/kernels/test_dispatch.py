"""Which of a kernel and its plain twin runs."""

import jax
import jax.numpy as jnp
import numpy as np

from flax_fp8.kernels import dispatch


def twice(x):
  return {"twice": 2 * x}


def doubled(x):
  return {"twice": x + x}


def choose(x):
  return dispatch.kernel_or_plain(twice, doubled, x)


def test_a_kernel_runs_on_cuda_alone():
  x = jnp.arange(3.0)
  for run in (choose, jax.jit(choose), jax.checkpoint(choose)):
    np.testing.assert_array_equal(run(x)["twice"], [0, 2, 4])
  lower = lambda *platforms: jax.jit(choose).trace(x).lower(lowering_platforms=platforms).as_text()
  assert "multiply" in lower("cuda")
  assert "multiply" not in lower("cpu")
  both = lower("cpu", "cuda")
  assert "multiply" in both
  assert "add" in both


def test_a_kernel_runs_on_one_device_alone():
  """Or where a shard_map over all of the mesh leaves each device its part."""
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  split = jax.sharding.PartitionSpec("data")
  x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, split))
  lower = lambda run: jax.jit(run).trace(x).lower(lowering_platforms=("cuda",)).as_text()
  assert "multiply" not in lower(choose)
  for check_vma in (True, False):
    mapped = jax.shard_map(choose, mesh=mesh, in_specs=split, out_specs=split, check_vma=check_vma)
    assert "multiply" in lower(mapped)


def test_a_kernel_has_the_derivative_of_plain_jax():
  out, tangent = jax.jvp(choose, (jnp.float32(3),), (jnp.float32(1),))
  assert (out["twice"], tangent["twice"]) == (6, 2)
  square = lambda x: choose(x)["twice"] ** 2
  assert jax.hessian(square)(jnp.float32(3)) == 8
