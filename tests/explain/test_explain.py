"""Reports of real programs against known counts, and ``assert_fp8`` on them."""

import contextlib
import dataclasses
import functools
import json
import re
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_fp8 as fp8
from flax_fp8.explain.compile import compile_program
from flax_fp8.explain.explain import read_program
from tests.explain import programs
from tests.explain.programs import BF16, CASES, spec

OURS, FLAX, PLAIN = fp8.Fp8DotGeneral, nn.Fp8DirectDotGeneralOp, None
LIBRARIES = {"ours": OURS, "flax": FLAX, "bf16": PLAIN}
SMALL = sorted(CASES.keys() - {"transformer"})


def counted(report):
  rows = Counter()
  for gemm in report.gemms:
    extent = gemm.extent
    sizes = sorted((extent.m, extent.n))
    rows[gemm.path, gemm.role.value, extent.batch, *sizes, extent.k] += gemm.times
  return rows


@functools.cache
def explained(name, library="ours", target="h100"):
  """Explains a case once, for all tests that look at it."""
  case = CASES[name](LIBRARIES[library])
  return fp8.explain(case.fn, *case.args, target=target)


# Another card compiles the same program in the same way: one of each kind of program is enough.
ON_B200 = ("dense", "moe")


@pytest.mark.parametrize(
  ("name", "target"), [*((name, "h100") for name in SMALL), *((name, "b200") for name in ON_B200)]
)
def test_gemms_are_those_counted_by_hand(name, target):
  case = CASES[name](OURS)
  report = explained(name, target=target)
  assert counted(report) == case.rows
  assert report.fp8_gemms == report.total_gemms == sum(case.rows.values())
  flops = sum(2 * batch * m * n * k * times for (*_, batch, m, n, k), times in case.rows.items())
  assert sum(gemm.flops for gemm in report.gemms) == flops
  types = {gemm.role.value: {gemm.lhs, gemm.rhs} for gemm in report.gemms}
  gradient = {"f8e5m2", "f8e4m3fn"}
  forward = {"f8e4m3fn"}
  expected = {"fprop": forward, "fprop again": forward, "dgrad": gradient, "wgrad": gradient}
  assert types == {role: expected[role] for role in types}
  assert report.doubts == ()


@pytest.mark.parametrize(
  ("name", "library"),
  [*((name, "bf16") for name in SMALL), ("dense", "flax"), ("moe", "flax")],
)
def test_gemms_of_every_library(name, library):
  case = CASES[name](LIBRARIES[library])
  report = explained(name, library)
  assert counted(report) == case.rows
  assert report.fp8_gemms == (0 if library == "bf16" else report.total_gemms)
  assert set(report.refusals) == ({"FP8 was not asked for"} if library == "bf16" else set())
  assert report.doubts == ()


@pytest.mark.slow
def test_the_train_step_of_the_benchmark():
  case = programs.transformer(OURS, remat=True)
  report = fp8.explain(case.fn, *case.args, target="h200")
  assert counted(report) == case.rows
  high = {gemm.path for gemm in report.gemms if not gemm.is_fp8}
  assert high == {"Transformer/layers", "Transformer/head"}  # the attention products, and the head
  assert report.memory.alias > 0.9 * report.memory.output  # the state is donated
  assert report.doubts == ()


def test_fsdp_gathers_the_weights_in_fp8():
  report = explained("fsdp")
  gathered = {each.dtype: each.bytes for each in report.collectives if each.kind == "all-gather"}
  # One byte per element, and each kernel once: the backward pass reuses the gathered kernels.
  assert gathered == {"f8e4m3fn": 128 * 512 + 512 * 256}
  assert {each.group for each in report.collectives} == {8}
  assert report.devices == 8
  plain = explained("fsdp", "bf16")
  gathered = {each.dtype: each.bytes for each in plain.collectives if each.kind == "all-gather"}
  assert gathered == {"bf16": 2 * (128 * 512 + 512 * 256)}


def test_a_mesh_that_is_larger_than_the_machine():
  mesh = AbstractMesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

  def fn(x, w):
    return jax.lax.with_sharding_constraint(x @ w, P("data", "model"))

  x = spec(256, 128, sharding=NamedSharding(mesh, P("data")))
  w = spec(128, 512, sharding=NamedSharding(mesh, P(None, "model")))
  report = fp8.explain(fn, x, w, target="h200", mesh=mesh)
  (gemm,) = report.gemms
  assert report.devices == 8
  assert (gemm.extent.m, gemm.extent.n, gemm.extent.k) == (128, 128, 128)


def test_sharded_arrays_determine_the_mesh():
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
  x = jax.device_put(jnp.ones((256, 128), BF16), NamedSharding(mesh, P("data")))
  w = jax.device_put(jnp.ones((128, 128), BF16), NamedSharding(mesh, P()))
  report = fp8.explain(jnp.matmul, x, w, target="h100")
  assert report.devices == 4
  assert report.gemms[0].extent.m == 64


def over_a_mesh(way):
  """Explains ``x @ w`` on a 2 x 2 mesh, given to the function in one of several ways."""
  mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  x, w = jnp.ones((128, 64), BF16), jnp.ones((64, 256), BF16)
  specs, out = (P("data"), P(None, "model")), P("data", "model")
  fn, options = lambda x, w: jax.lax.with_sharding_constraint(x @ w, out), {}
  if way == "shard_map":
    fn = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=specs, out_specs=out)
  elif way == "in_shardings":
    fn = jax.jit(jnp.matmul, in_shardings=[NamedSharding(mesh, each) for each in specs])
  elif way == "given":
    options = {"mesh": mesh}
  with jax.set_mesh(mesh) if way == "in_force" else contextlib.nullcontext():
    return fp8.explain(fn, x, w, target="h100", **options)


@pytest.mark.parametrize(
  "way",
  # An active mesh belongs to this process. The compiler process does not see it.
  [pytest.param("in_force", marks=pytest.mark.child), "given", "shard_map", "in_shardings"],
)
def test_every_way_to_name_a_mesh(way):
  report = over_a_mesh(way)
  (gemm,) = report.gemms
  assert (report.devices, gemm.extent.m, gemm.extent.n, gemm.extent.k) == (4, 64, 128, 64)


@pytest.mark.filterwarnings("ignore:.*Pallas Triton:DeprecationWarning")
def test_a_pallas_kernel_is_unknown():
  def double(x, out):
    out[...] = x[...] * 2

  def fn(x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    params = triton.CompilerParams(num_warps=4)
    return pl.pallas_call(double, out_shape=shape, compiler_params=params)(x)

  report = fp8.explain(fn, spec(128), target="h100")
  (kernel,) = report.kernels
  assert (kernel.read, kernel.written) == (256, 256)
  (doubt,) = report.doubts
  assert re.search("triton, times 1: what it computes is unknown", doubt)


@pytest.mark.slow
def test_unread_lines_are_reported():
  case = CASES["mlp"](OURS)
  program = compile_program(case.fn, case.args, target="h100", mesh=None, timeout=600)
  whole = read_program(program, "whole")
  lines = program.hlo.splitlines()
  first = next(i for i, line in enumerate(lines) if "__cublas$lt$matmul$f8" in line)
  lines[first] = lines[first].replace(" custom-call(", " custom-call of a new kind ")
  text = "\n".join(lines)
  report = read_program(dataclasses.replace(program, hlo=text), "damaged")
  assert (whole.total_gemms, report.total_gemms) == (5, 4)
  assert any("1 lines of the optimized program could not be read" in d for d in report.doubts)
  assert any(d.startswith("unread, times 1") for d in report.doubts)
  assert report.launches == whole.launches


def test_a_loop_of_unknown_length_is_a_doubt():
  def fn(x, n):
    return jax.lax.while_loop(lambda c: c[1] < n, lambda c: (c[0] @ c[0], c[1] + 1), (x, 0))[0]

  report = fp8.explain(fn, spec(64, 64), spec(dtype=jnp.int32), target="h100")
  assert [gemm.times for gemm in report.gemms] == [1]
  (doubt,) = report.doubts
  assert re.fullmatch(r"loop of unknown length, counted once: \d kernels, the first \S+", doubt)
  assert doubt in " ".join(str(report).split())


def test_options_of_a_jitted_function_stay():
  @jax.jit
  def step(key, x):
    return x + jax.random.normal(key, x.shape, x.dtype)

  report = fp8.explain(step, jax.random.key(0), jnp.ones((64, 64), BF16), target="h100")
  assert report.name == "step"
  power = jax.jit(lambda x, n: x**n, static_argnums=1, donate_argnums=0)
  report = fp8.explain(power, spec(64, 64), 3, target="h100", name="cube")
  assert report.name == "cube"
  assert report.memory.alias == 2 * 64 * 64


def test_the_calling_process_does_not_change():
  before = jax.devices()
  fp8.explain(lambda x: x + 1, spec(64), target="h100")
  assert jax.devices() == before
  assert jax.default_backend() == "cpu"


ERRORS = {
  "no_gpu": ({"target": None}, ValueError, "target=None needs an attached GPU; got"),
  "unknown": ({"target": "h999"}, ValueError, "the name must be one of .*'h200'.*; got 'h999'"),
  "mesh": ({"mesh": 8}, TypeError, "mesh must be a jax.sharding.Mesh or AbstractMesh; got 8"),
  "target": ({"target": 7}, TypeError, "target must be a name, a GpuTarget or None; got 7"),
}


@pytest.mark.parametrize(("options", "error", "match"), ERRORS.values(), ids=ERRORS)
def test_errors(options, error, match):
  with pytest.raises(error, match=match):
    fp8.explain(lambda x: x, spec(4), **{"target": "h100", **options})


def test_fp32_max_grad_arguments_are_refused():
  with pytest.raises(TypeError, match=r"results must be arrays that jax\.export takes; .*fp32_max"):
    fp8.explain(lambda x: x, jnp.ones(4).astype(fp8.fp32_max_grad), target="h100")


def test_the_users_own_error_comes_through():
  def broken(x):
    raise KeyError("mine")

  with pytest.raises(KeyError, match="mine"):
    fp8.explain(broken, spec(4), target="h100")


def test_assert_fp8_passes_and_returns_the_report():
  case = CASES["dense"](OURS)
  assert fp8.assert_fp8(case.fn, *case.args, target="h100").fp8_gemms == 3


def test_assert_fp8_fails_on_a_bf16_model():
  case = CASES["mlp"](PLAIN)
  with pytest.raises(AssertionError, match="got 5 that are not") as caught:
    fp8.assert_fp8(case.fn, *case.args, target="h100")
  assert re.search(r"MLP/down dgrad, 1024x512x256 by .*: FP8 was not asked for", str(caught.value))


class Headed(nn.Module):
  """An FP8 layer and a head in BF16."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(256, dtype=BF16, dot_general_cls=OURS, name="body")(x)
    return nn.Dense(128, dtype=BF16, name="head")(x)


def test_assert_fp8_excludes_by_pattern():
  model, x = Headed(), spec(512, 128)
  args = (programs.shapes(model, x), x)
  loss = jax.grad(programs.mean_square(model))
  assert fp8.assert_fp8(loss, *args, target="h100", exclude=["*/head"]).fp8_gemms == 2
  with pytest.raises(AssertionError, match=r"got 3 that are not(.|\n)*Headed/head wgrad"):
    fp8.assert_fp8(loss, *args, target="h100")


def test_assert_fp8_refuses_unmatched_patterns():
  case = CASES["mlp"](PLAIN)
  with pytest.raises(ValueError, match=r"got 'MLP/dwon'. The nearest are \['MLP/down', 'MLP/up'\]"):
    fp8.assert_fp8(case.fn, *case.args, target="h100", exclude=["MLP/dwon"])
  with pytest.raises(TypeError, match="must be a sequence of patterns; got exclude='MLP/up'"):
    fp8.assert_fp8(case.fn, *case.args, target="h100", exclude="MLP/up")
  with pytest.raises(AssertionError, match="must have FP8 GEMMs; got no GEMM at all"):
    fp8.assert_fp8(lambda x: x + 1, spec(4), target="h100")


def test_report_in_every_form():
  ours, plain = (
    dataclasses.replace(explained("mlp", library), name=library) for library in ("ours", "bf16")
  )
  text = str(ours)
  assert all(len(line) <= 100 for line in text.splitlines())
  assert "ours on H100 (described, not attached; 1 device): 5 of 5 GEMMs are FP8" in text
  assert "MLP/down/Fp8DotGeneral_0" in text
  found = json.loads(json.dumps(ours.to_dict()))
  assert (found["fp8_gemms"], found["gemms"], len(found["gemm_rows"])) == (5, 5, 5)
  assert found["memory"]["total"] == ours.memory.total
  assert sum(each["bytes"] for each in found["classes"].values()) == sum(
    kernel.bytes for kernel in ours.kernels
  )
  assert "| MLP/down/Fp8DotGeneral_0 | dgrad | 1024 x 512 x 256 | e5m2 e4m3" in ours.to_markdown()
  against = ours.compare(plain)
  rows = {label: (one, other) for label, one, other in against.rows()}
  assert rows["FP8 GEMMs"] == (5, 0)
  assert rows["GEMMs"] == (5, 5)
  assert rows["kernels"][0] > rows["kernels"][1]
  assert "MiB in quantize" in str(against)
  assert "| FP8 GEMMs | 5 | 0 |  |" in against.to_markdown()
  assert json.loads(json.dumps(against.to_dict()))["GEMMs"]["ratio"] == 1


class Loops(nn.Module):
  """Two modules with equal loops, which XLA compiles once and copies."""

  @nn.compact
  def __call__(self, x):
    for name in ("first", "second"):
      x = Loop(name=name)(x)
    return x


class Loop(nn.Module):
  @nn.compact
  def __call__(self, x):
    kernels = self.param("kernels", nn.initializers.ones, (3, 64, 64), BF16)
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]


def test_equal_loops_are_told_apart():
  x = spec(32, 64)
  variables = jax.eval_shape(Loops().init, jax.random.key(0), x)
  report = fp8.explain(Loops().apply, variables, x, target="h100")
  assert {gemm.path: gemm.times for gemm in report.gemms} == {"Loops/first": 3, "Loops/second": 3}
