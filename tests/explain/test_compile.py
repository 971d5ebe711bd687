"""The attached device's program, on the device that every machine has."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_fp8.explain import compile as compiling
from flax_fp8.explain.explain import read_program


def test_memory_counts_donated_bytes_once():
  assert compiling.Memory(argument=10, output=5, alias=4, temp=2).total == 13


def test_the_program_of_an_attached_device():
  """A CPU stands in: only the kernels' names differ."""
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
  x = jax.device_put(jnp.ones((64, 32)), NamedSharding(mesh, P("data")))
  fn = jax.jit(lambda x, w: jnp.tanh(x @ w))
  program = compiling.compile_for(jax.devices()[0], fn, (x, jnp.ones((32, 16))))
  assert (program.devices, program.described, program.target) == (4, False, None)
  assert program.memory.argument == 4 * (16 * 32 + 32 * 16)
  report = read_program(program, "attached")
  assert report.seconds is None
  assert "attached on cpu (attached; 4 devices)" in str(report)
  assert "| (no module) | fprop | 16 x 16 x 32 | f32 f32 f32 |" in report.to_markdown()
