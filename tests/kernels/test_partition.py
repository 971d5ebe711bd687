"""Kernels give the same results on several devices, with the collectives that they need."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_fp8.explain.compile import compile_program
from flax_fp8.explain.deviceless import compile_with_text
from flax_fp8.explain.target import GpuTarget
from tests.kernels.toys import Gemm, Quantizer, Wrong, call, gemm

DP = {"data": 8}
TP = {"data": 2, "tp": 4}
ROOT = Path(__file__).parents[2]


def seeds(count, quick):
  marks = lambda seed: () if seed < quick else (pytest.mark.slow, pytest.mark.exhaustive)
  return [pytest.param(seed, marks=marks(seed)) for seed in range(count)]


def mesh_of(sizes, devices=None):
  devices = np.array(jax.devices() if devices is None else devices)
  shape = tuple(sizes.values())
  return Mesh(devices[: np.prod(shape)].reshape(shape), tuple(sizes))


def array(shape, seed):
  return np.random.default_rng(seed).integers(-4, 5, shape).astype("float32")


def arguments(m=256, n=512, k=1024, batch=1, rows=False):
  chunks = -(-k // 128)
  shapes = (
    (batch, m, k),
    (batch, n, k),
    (batch, chunks, m),
    (batch, chunks, n if rows else n // 128),
  )
  return [array(shape, seed) for seed, shape in enumerate(shapes)]


def specs(m=None, n=None, k=None):
  return P(None, m, k), P(None, n, k), P(None, k, m), P(None, k, n)


def put(mesh, args, spec):
  return [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(args, spec, strict=True)]


def collectives(hlo):
  kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
  return sorted(re.findall(rf"= .*?\b({kinds})(?:-start)?\(", hlo))


FSDP = (P(None, "data"), P(None, None, "data"), P(None, None, "data"), P(None, "data"))
CASES = {
  "data parallel": (DP, specs(m="data"), P(None, "data"), []),
  "FSDP": (DP, FSDP, P(None, "data"), ["all-gather"]),
  "weight gradient": (DP, specs(k="data"), P(None), ["all-reduce"]),
  "weight gradient, FSDP": (DP, specs(k="data"), P(None, "data"), ["reduce-scatter"]),
  "column parallel": (TP, specs(m="data", n="tp"), P(None, "data", "tp"), []),
  "row parallel": (TP, specs(m="data", k="tp"), P(None, "data"), ["all-reduce"]),
  "sequence": (TP, specs(m="data", k="tp"), P(None, ("data", "tp")), ["reduce-scatter"]),
  "3 by 2": ({"data": 3, "tp": 2}, specs(m="data", k="tp"), P(None, "data"), ["all-reduce"]),
}


@pytest.mark.parametrize(("sizes", "given", "wanted", "expected"), CASES.values(), ids=CASES)
def test_gemm(sizes, given, wanted, expected):
  mesh, args = mesh_of(sizes), arguments(m=384)
  fn = jax.jit(gemm, out_shardings=NamedSharding(mesh, wanted))
  compiled = fn.lower(*put(mesh, args, given)).compile()
  np.testing.assert_array_equal(compiled(*put(mesh, args, given)), *Gemm().run(*args))
  found = [kind for kind in collectives(compiled.as_text()) if kind != "all-gather"]
  assert found == [kind for kind in expected if kind != "all-gather"]


@pytest.mark.parametrize(
  "spec", [P(None, None, ("tp", "data")), P(None, "tp", "data"), P("tp", "data")], ids=str
)
@pytest.mark.parametrize("shape", [(4, 96, 200), (4, 256, 1024), (4, 192, 1024)], ids=str)
def test_quantizer(shape, spec):
  mesh, x = mesh_of(TP), array(shape, 0)
  results = jax.jit(lambda x: tuple(call(Quantizer(), x)))(*put(mesh, [x], [spec]))
  for result, expected in zip(results, Quantizer().run(x), strict=True):
    np.testing.assert_array_equal(result, expected)


def random_spec(rng, shape, sizes, lead=()):
  dims = [list(lead), *([] for _ in shape[1:])]
  for name in rng.permutation(list(sizes)):
    dim = dims[index := rng.integers(len(shape))]
    if shape[index] % np.prod([sizes.get(axis, 1) for axis in (*dim, name)]) == 0:
      dim.append(str(name))
  return P(*(tuple(dim) or None for dim in dims))


@pytest.mark.parametrize("seed", seeds(12, quick=3))
def test_gemm_with_random_shardings(seed):
  rng = np.random.default_rng(seed)
  sizes = [{"x": 2, "y": 2, "z": 2}, TP, {"x": 3, "y": 2}][seed % 3]
  m, n, k = rng.choice([96, 256]), rng.choice([128, 768]), rng.choice([128, 384, 1024])
  args = arguments(m, n, k, batch=6, rows=bool(seed % 2))
  (expected,) = Gemm().run(*args)
  mesh = mesh_of(sizes)
  given = [random_spec(rng, x.shape, sizes) for x in args]
  wanted = NamedSharding(mesh, random_spec(rng, expected.shape, sizes))
  result = jax.jit(gemm, out_shardings=wanted)(*put(mesh, args, given))
  np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("manual", ["x", "y", "z", "xz", "yz"])
@pytest.mark.parametrize("seed", seeds(3, quick=1))
def test_partially_manual(manual, seed):
  rng = np.random.default_rng(seed)
  sizes = dict.fromkeys("xyz", 2)
  mesh, args, lead = mesh_of(sizes), arguments(batch=8), tuple(manual)
  automatic = {name: 2 for name in sizes if name not in manual}
  given = [random_spec(rng, x.shape, automatic, lead) for x in args]
  mapped = jax.shard_map(
    gemm, mesh=mesh, in_specs=P(lead), out_specs=P(lead), axis_names=set(lead), check_vma=False
  )
  result = jax.jit(mapped)(*put(mesh, args, given))
  np.testing.assert_array_equal(result, *Gemm().run(*args))


def test_explicit_mesh():
  mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
  args = arguments()
  with jax.set_mesh(mesh):
    fn = jax.jit(jax.sharding.auto_axes(gemm, out_sharding=P(None, "x", "y")))
    result = fn(*put(mesh, args, specs(m="x", k="y")))
  np.testing.assert_array_equal(result, *Gemm().run(*args))


@jax.custom_vjp
def linear(x, w):
  return product(x, w)


def product(a, b):
  scale = lambda x: jnp.ones((1, x.shape[1] // 128, x.shape[0]), "float32")
  return gemm(a[None], b[None], scale(a), scale(b))[0]


linear.defvjp(
  lambda x, w: (product(x, w), (x, w)),
  lambda saved, dy: (product(dy, saved[1].T), product(dy.T, saved[0].T)),
)


def loss(weights, x):
  body = jax.checkpoint(lambda x, w: (jnp.tanh(linear(x, w)), None))
  return jnp.square(jax.lax.scan(body, x, weights)[0]).mean()


def test_training_in_a_scan_scatters_the_gradient():
  mesh = mesh_of(DP)
  weights, x = array((3, 1024, 1024), 0) / 64, array((1024, 1024), 1)
  sharded = put(mesh, [weights, x], [P(None, "data"), P("data")])
  step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, sharded[0].sharding))
  compiled = step.lower(*sharded).compile()
  expected, result = jax.jit(jax.value_and_grad(loss))(weights, x), compiled(*sharded)
  jax.tree.map(
    lambda *pair: np.testing.assert_allclose(*pair, rtol=1e-4, atol=1e-6), result, expected
  )
  found = collectives(compiled.as_text())
  assert found.count("reduce-scatter") == 1
  assert found.count("all-reduce") == 1  # the loss


def test_a_wrong_rule_is_an_error():
  (x,) = put(mesh_of(DP), [array((8,), 0)], [P("data")])
  with pytest.raises(Exception, match="Wrong: results of shards must be shards of the result"):
    jax.jit(lambda x: call(Wrong(), x)[0])(x)


@pytest.mark.parametrize(
  ("sizes", "given", "wanted", "expected"),
  [case for name, case in CASES.items() if name != "3 by 2"],
  ids=[name for name in CASES if name != "3 by 2"],
)
def test_collectives_on_gpus(sizes, given, wanted, expected):
  pytest.importorskip("jax_plugins.xla_cuda13", reason="the CUDA plugin supports only Linux")
  description = GpuTarget.named("h100").description
  topology = topologies.get_topology_desc("", "cuda", target_config=description, topology="1x1x8")
  mesh = mesh_of(sizes, topology.devices)
  structs = [
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    for x, spec in zip(arguments(m=1024, n=1024), given, strict=True)
  ]
  traced = jax.jit(gemm, out_shardings=NamedSharding(mesh, wanted)).trace(*structs)
  _, hlo = compile_with_text(traced.lower(lowering_platforms=("cuda",)))
  assert collectives(hlo) == expected


@pytest.mark.child
def test_explain_compiles_for_a_mesh_without_devices(monkeypatch):
  monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the kernels of this test
  mesh = AbstractMesh(tuple(TP.values()), tuple(TP), axis_types=(AxisType.Auto,) * 2)
  structs = [
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    for x, spec in zip(arguments(), specs(m="data", k="tp"), strict=True)
  ]
  program = compile_program(gemm, tuple(structs), target="h100", mesh=mesh, timeout=100)
  assert collectives(program.hlo) == ["all-reduce"]
  assert "flax_fp8_partitioned" not in program.hlo
