"""Kernels inside of JAX's transformations, and where they are used."""

import functools
import itertools
import pickle
import subprocess
import sys
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_fp8 as fp8
from flax_fp8.formats import E4M3
from flax_fp8.kernels.block_gemm import BlockScaledGemm
from flax_fp8.kernels.block_quantize import BlockQuantize
from flax_fp8.kernels.call import call
from tests.explain.programs import Stack, mean_square, shapes, spec

GEMM = BlockScaledGemm(out_dtype="float32")
STRIPS, TILES = (
  BlockQuantize(format=E4M3.name, tiles=tiles, power_of_two=True) for tiles in (False, True)
)
BLOCK = fp8.Float8BlockScaling()
K, N = 256, 130
IS_ONE_GPU_KERNEL = pytest.mark.skipif(
  jax.__version_info__ < (0, 10, 2), reason="the kernels need JAX 0.10.2"
)


def integers(seed, *shape):
  """Makes small integers, whose sums of products are exact in any order."""
  return np.random.default_rng(seed).integers(-7, 8, shape).astype(np.float32)


def operands(batch, m, groups):
  scale = lambda seed, *shape: 2.0 ** integers(seed, *shape)
  sizes = (batch, m, K), (batch, N, K)
  data = [jnp.asarray(integers(seed, *size), E4M3.dtype) for seed, size in enumerate(sizes)]
  return *data, scale(2, batch, K // 128, m), scale(3, batch, K // 128, groups)


def uses_kernels(fun, *args):
  return "kernel=Block" in str(jax.make_jaxpr(fun)(*args))


SUBSETS = [mapped for mapped in itertools.product([False, True], repeat=4) if any(mapped)]
EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive)
QUICK = [(True, False, True, False), (False, True, True, False), (True,) * 4]
NAMES = "a", "b", "a_scale", "b_scale"
MAPPED = [
  pytest.param(
    mapped,
    id=" ".join(itertools.compress(NAMES, mapped)),
    marks=() if mapped in QUICK else EXHAUSTIVE,
  )
  for mapped in SUBSETS
]


@pytest.mark.parametrize("groups", [2, N], ids=["by blocks", "by rows"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("mapped", MAPPED)
def test_mapped_products_are_those_of_a_loop(mapped, batch, groups):
  """The mapped axis is the last of the operand, so it has to be moved."""
  args, size = operands(batch, 5, groups), 3
  rolled = lambda x: [jnp.roll(x.astype(jnp.float32), i, 1).astype(x.dtype) for i in range(size)]
  args = [jnp.stack(rolled(x), -1) if own else x for x, own in zip(args, mapped, strict=True)]
  product = functools.partial(call, GEMM)
  (got,) = jax.vmap(product, tuple(-1 if own else None for own in mapped))(*args)
  one = lambda i: [x[..., i] if own else x for x, own in zip(args, mapped, strict=True)]
  np.testing.assert_array_equal(got, [product(*one(i))[0] for i in range(size)])


@pytest.mark.parametrize("quantizer", [STRIPS, TILES], ids=["strips", "tiles"])
def test_mapped_matrices_are_quantized_as_in_a_loop(quantizer):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 130, 20, 4)), jnp.bfloat16)
  quantize = functools.partial(call, quantizer)
  got = jax.vmap(jax.vmap(quantize, in_axes=-1))(x)
  for i, j in np.ndindex(3, 4):
    want = quantize(x[i, ..., j])
    jax.tree.map(np.testing.assert_array_equal, tuple(out[i, j] for out in got), want)


@pytest.mark.parametrize(
  ("size", "m", "n", "k"), [(0, 5, 4, 128), (3, 0, 4, 128), (3, 5, 0, 128), (3, 5, 4, 0)], ids=str
)
def test_mapped_products_of_empty_matrices(size, m, n, k):
  zeros = lambda *shape: jnp.zeros(shape, E4M3.dtype)
  ones = lambda *shape: jnp.ones(shape)
  args = zeros(size, 1, m, k), zeros(1, n, k), ones(size, 1, k // 128, m), ones(1, k // 128, n)
  (out,) = jax.vmap(functools.partial(call, GEMM), (0, None, 0, None))(*args)
  np.testing.assert_array_equal(out, np.zeros((size, 1, m, n)))


def test_no_matrices_are_quantized():
  got = jax.vmap(functools.partial(call, STRIPS))(jnp.ones((0, 1, 8, 20), jnp.bfloat16))
  want = STRIPS.plain(jnp.ones((1, 8, 20), jnp.bfloat16))
  assert [out.shape for out in got] == [(0, *out.shape) for out in want]


def test_off_applies_inside_of_compiled_functions():
  """``jax.jit`` traces again if the selection changes, and remembers both programs."""
  traced = []

  @jax.jit
  def quantize(x):
    traced.append(None)
    return call(STRIPS, x)

  x = jnp.ones((1, 8, 128), jnp.bfloat16)
  for which, count in (("auto", 1), ("off", 2), ("all", 3), ("auto", 3), ("off", 3)):
    with fp8.use_kernels(which):
      out = quantize(x)
      assert uses_kernels(quantize, x) == (which != "off")
    assert len(traced) == count
    jax.tree.map(np.testing.assert_array_equal, out, STRIPS.plain(x))


def test_unknown_selection():
  with pytest.raises(ValueError, match=r"use_kernels: which must be one of .*'auto'"):
    fp8.use_kernels("none")


def test_eager_calls():
  args = operands(1, 5, 2)
  want = GEMM.plain(*args)
  for got in (call(GEMM, *args), jax.jit(functools.partial(call, GEMM))(*args)):
    jax.tree.map(np.testing.assert_array_equal, got, want)
  with jax.disable_jit():
    jax.tree.map(np.testing.assert_array_equal, call(GEMM, *args), want)


def layer_loss(params, x):
  layer = nn.Dense(16, dot_general_cls=BLOCK.dot_general_cls)
  return jnp.sum(layer.apply(params, x) ** 2)


def layer_arguments():
  x = jnp.asarray(integers(0, 24, 16)) / 8
  return {"params": {"kernel": jnp.asarray(integers(1, 16, 16)) / 8, "bias": jnp.ones(16)}}, x


def test_gradients_in_transformations():
  """Scan, remat and jit give the gradients of an unrolled, eager model."""
  params, x = layer_arguments()
  layer = nn.Dense(16, dot_general_cls=BLOCK.dot_general_cls)

  def unrolled(params, x):
    for _ in range(2):
      x = layer.apply(params, x) / 8
    return jnp.sum(x)

  def scanned(wrap, params, x):
    step = wrap(lambda x, _: (layer.apply(params, x) / 8, None))
    return jnp.sum(jax.lax.scan(step, x, None, length=2)[0])

  want = jax.grad(unrolled)(params, x)
  for wrap in (lambda step: step, jax.checkpoint):
    got = jax.jit(jax.grad(functools.partial(scanned, wrap)))(params, x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, want)


def test_debug_nans():
  """A step on finite numbers has no NaN in between, and a NaN in the input is found."""
  params, x = layer_arguments()
  with jax.debug_nans(True):
    jax.block_until_ready(jax.grad(layer_loss)(params, x))
    with pytest.raises(FloatingPointError, match="invalid value"):
      jax.block_until_ready(jax.grad(layer_loss)(params, x.at[3, 3].set(jnp.nan)))


@pytest.mark.parametrize("kernel", [GEMM, STRIPS, TILES], ids=repr)
def test_kernels_are_values(kernel):
  """They are parameters of an equation: printed, compared, hashed and pickled."""
  again = pickle.loads(pickle.dumps(kernel))
  assert again == kernel
  assert hash(again) == hash(kernel)


def test_printed_equation():
  printed = str(jax.make_jaxpr(functools.partial(call, TILES))(jnp.ones((1, 8, 128), jnp.bfloat16)))
  assert f"kernel={TILES!r}" in printed


SCRIPT = """
import sys
import flax.linen as nn, jax, jax.numpy as jnp
import flax_fp8 as fp8
before = "jax.experimental.pallas" in sys.modules
layer = nn.Dense(8, dot_general_cls=fp8.Float8BlockScaling().dot_general_cls)
x = jnp.ones((4, 16), jnp.bfloat16)
jax.jit(jax.grad(lambda params: layer.apply(params, x).sum()))(layer.init(jax.random.key(0), x))
print(before, "jax.experimental.pallas" in sys.modules)
"""


@pytest.mark.slow
def test_programs_for_a_cpu_never_import_pallas():
  out = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
  before, after = out.stdout.split()
  if before == "True":
    pytest.skip("flax or jax imports Pallas itself")
  assert after == "False"


M = 512
LAYER = nn.Dense(256, use_bias=False, dtype=jnp.bfloat16, dot_general_cls=BLOCK.dot_general_cls)


def experts():
  """Four layers at once, each with its kernel and its tokens."""
  x = spec(4, M, K)
  init = lambda x: LAYER.init(jax.random.key(0), x)
  loss = lambda params, x: jnp.mean(jax.vmap(LAYER.apply)(params, x).astype(jnp.float32) ** 2)
  return jax.grad(loss, (0, 1)), (jax.eval_shape(jax.vmap(init), x), x)


def scan_of_remat():
  """Three blocks of two layers, recomputed in the backward pass."""
  model, x = Stack(BLOCK.dot_general_cls), spec(M, K)
  return jax.grad(mean_square(model)), (shapes(model, x), x)


def microbatches():
  """Two of them; kernels are quantized once."""
  x = spec(2, M, K)
  step = lambda params, x: fp8.accumulate_gradients(mean_square(LAYER), params, x)
  return step, (shapes(LAYER, spec(M, K)), x)


def devices():
  """Data parallelism over eight devices, each with the whole kernel."""
  mesh = AbstractMesh((8,), ("data",), axis_types=(AxisType.Auto,))
  whole, parted = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
  gradient = lambda *args: jax.lax.pmean(jax.grad(mean_square(LAYER))(*args), "data")
  step = jax.shard_map(gradient, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
  params = shapes(LAYER, spec(M, K))
  params = jax.tree.map(lambda x: spec(*x.shape, dtype=x.dtype, sharding=whole), params)
  return step, (params, spec(8 * M, K, sharding=parted))


def on_batches(*rows):
  return {(role, batch): times for role, batch, times in rows}


# Role, matrices of one call, and times in a step.
COMPILED = {
  experts: on_batches(("fprop", 4, 1), ("dgrad", 4, 1), ("wgrad", 4, 1)),
  scan_of_remat: on_batches(
    ("fprop", 1, 6), ("fprop again", 1, 3), ("dgrad", 1, 6), ("wgrad", 1, 6)
  ),
  microbatches: on_batches(("fprop", 1, 2), ("wgrad", 1, 2)),
  devices: on_batches(("fprop", 1, 1), ("wgrad", 1, 1)),
}


@IS_ONE_GPU_KERNEL
@pytest.mark.parametrize(
  "make",
  [pytest.param(make, marks=() if make is devices else pytest.mark.slow) for make in COMPILED],
  ids=[make.__name__ for make in COMPILED],
)
def test_each_gemm_is_one_kernel_on_an_h100(make):
  fun, args = make()
  report, found = fp8.explain(fun, *args, target="h100"), Counter()
  for gemm in report.gemms:
    assert (gemm.kernel, gemm.notes) == ("Mosaic GPU", ())
    found[gemm.role.value, gemm.extent.batch] += gemm.times
  assert found == COMPILED[make]
  assert report.doubts == ()
