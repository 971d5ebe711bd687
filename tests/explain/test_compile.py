"""Compilation for the attached device, with the CPU as device."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import io_callback
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_fp8 as fp8
from flax_fp8.explain import compile as compiling
from flax_fp8.explain.explain import read_program
from tests.explain.programs import MESH, spec


def test_memory_counts_donated_bytes_once():
  assert compiling.Memory(argument=10, output=5, alias=4, temp=2).total == 13


def test_the_program_of_an_attached_device():
  """Uses a CPU, where only the names of kernels differ."""
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


def print_it(x, **options):
  jax.debug.print("{}", x.sum(), **options)
  return x


def call_back(x, **options):
  jax.debug.callback(lambda total: None, x.sum(), **options)
  return x


def through_io(x, **options):
  return io_callback(lambda x: x, x, jax.lax.stop_gradient(x), **options)


def through_pure(x):
  return jax.pure_callback(lambda x: x, x, jax.lax.stop_gradient(x))


CALLBACKS = {
  "jax.debug.print": print_it,
  "jax.debug.callback": call_back,
  "io_callback": through_io,
  "pure_callback": through_pure,
}


class Layer(nn.Module):
  """An FP8 layer that passes its result to every kind of callback."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(64, use_bias=False, dot_general_cls=fp8.Fp8DotGeneral, dtype=x.dtype)(x)
    return sum((call(x) for call in CALLBACKS.values()), start=x)


def in_scan(call):
  """Runs three iterations in a jitted loop."""

  @jax.jit
  def fn(x, w):
    return jax.lax.scan(lambda x, _: (x @ w + call(x), None), x, length=3)[0]

  return fn, (spec(64, 64), spec(64, 64))


class TestHostCallbacks:
  """Host callbacks are compiled as for GPUs, and never called."""

  @pytest.mark.parametrize("name", CALLBACKS)
  def test_in_a_loop(self, described, name):
    fn, args = in_scan(CALLBACKS[name])
    report = fp8.explain(fn, *args, target="h100")
    assert [gemm.times for gemm in report.gemms] == [3]
    assert report.doubts == ("a Python callback, times 3: its time on the host is not counted",)

  def test_in_a_module_under_grad(self, described):
    model, x = Layer(), spec(32, 64)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    loss = lambda variables, x: jnp.var(model.apply(variables, x).astype(jnp.float32))
    report = fp8.explain(jax.grad(loss), variables, x, target="h100")
    assert (report.fp8_gemms, report.total_gemms) == (2, 2)
    assert report.doubts == ("a Python callback, times 4: its time on the host is not counted",)

  @pytest.mark.child
  def test_in_the_compilers_own_process(self, described):
    fn = lambda x: through_pure(print_it(x)) @ call_back(through_io(x))
    assert fp8.explain(fn, spec(64, 64), target="h100").total_gemms == 1

  @pytest.mark.parametrize(
    ("name", "devices"),
    [("jax.debug.print", 1), ("jax.debug.callback", 8), ("io_callback", 1)],
    ids=str,
  )
  def test_ordered_ones_are_refused(self, described, name, devices):
    sharding = NamedSharding(MESH, P("data")) if devices > 1 else None
    fn = lambda x: CALLBACKS[name](x, ordered=True)
    with pytest.raises(ValueError, match=r"must be unordered .* Pass ordered=False"):
      fp8.explain(fn, spec(64, 64, sharding=sharding), target="h100")

  @pytest.mark.parametrize("name", ["io_callback", "pure_callback"])
  def test_an_abstract_mesh_has_no_device_for_them(self, described, name):
    x = spec(64, 64, sharding=NamedSharding(MESH, P("data")))
    with pytest.raises(
      ValueError,
      match=r"pure_callback need a mesh with devices; .* Pass a jax\.sharding\.Mesh",
    ):
      fp8.explain(CALLBACKS[name], x, target="h100")


def test_a_lowering_that_needs_ptxas_names_its_package():
  def fn(x):
    raise RuntimeError("UNAVAILABLE: No PTX compilation provider is available. Details: none")

  with pytest.raises(
    RuntimeError, match=r"needs ptxas and libdevice.*pip install nvidia-cuda-nvcc"
  ):
    fp8.explain(fn, spec(4), target="h100")
