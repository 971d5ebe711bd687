"""The cast by a kernel: the bits of plain JAX, in both layouts, whatever the tensor."""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import flax_fp8 as fp8
from flax_fp8 import formats
from flax_fp8.contraction import View
from flax_fp8.explain.traffic import KernelClass
from flax_fp8.kernels import cast
from tests.kernels.interpreted import interpreted
from tests.transformations import mesh

__all__ = ["interpreted"]  # a fixture
FORMATS = {"E4M3": formats.E4M3, "E5M2": formats.E5M2}
SPECIAL = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, 1e4, -1e4, 6e4, 2**-9, 2**-10]


def view(batch, kept, contracting):
  return View(batch=batch, kept=kept, contracting=contracting)


def views(split, ndim):
  """How the two GEMMs of an input see it: the first contracts its last axes."""
  first, last = tuple(range(split)), tuple(range(split, ndim))
  return view((), first, last), view((), last, first)


def values(shape, dtype, special=()):
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32) * 300
  x.reshape(-1)[: len(special)] = special
  return jnp.asarray(x, dtype)


@pytest.mark.parametrize("special", [[], SPECIAL], ids=["finite", "special"])
@pytest.mark.parametrize("float8", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_kernel_gives_the_bits_of_plain_jax(dtype, float8, special):
  x, scale = values((32, 48), dtype, special), jnp.float32(0.37)
  given = (x, scale, 1 / scale, jnp.zeros(4))
  kernel = functools.partial(
    cast._by_kernel, float8=float8, split=1, views=views(1, 2), interpret=True
  )
  got = jax.jit(kernel)(*given)
  want = jax.jit(functools.partial(cast._plain, float8=float8))(*given)
  as_bits = lambda data: np.asarray(jax.lax.bitcast_convert_type(data, jnp.uint8))
  for ours, theirs in zip(got[:2], want[:2], strict=True):
    is_nan = np.isnan(np.asarray(theirs, np.float32))
    np.testing.assert_array_equal(np.isnan(np.asarray(ours, np.float32)), is_nan)
    np.testing.assert_array_equal(as_bits(ours)[~is_nan], as_bits(theirs)[~is_nan])
  np.testing.assert_array_equal(got[2], want[2])


SPLITS = {
  "input": ((64, 32), views(1, 2), 1),
  "kernel": ((64, 32), views(1, 2)[::-1], 1),
  "tokens in two axes": ((4, 16, 32), views(2, 3), 2),
  "heads": ((32, 4, 16), views(1, 3)[::-1], 1),
  "a batch": ((4, 16, 32), (view((0,), (1,), (2,)), view((0,), (2,), (1,))), None),
  "an axis between": ((16, 4, 16), (view((), (1,), (0, 2)), view((), (0, 2), (1,))), None),
  "no tiles": ((64, 40), views(1, 2), None),
  "no elements": ((0, 64), views(1, 2), None),
  "a vector": ((64,), (view((), (), (0,)), view((), (0,), ())), None),
}


@pytest.mark.parametrize(("shape", "views", "split"), SPLITS.values(), ids=SPLITS)
def test_which_tensors_are_matrices(shape, views, split):
  assert cast._split(jnp.zeros(shape), views) == split


class Model(nn.Module):
  """Layers with one input, and several axes."""

  dtype: object

  @nn.compact
  def __call__(self, x):
    kinds = {"dtype": self.dtype, "param_dtype": self.dtype}
    recipe = fp8.DelayedScaling(amax_history_len=3)
    dense = functools.partial(nn.DenseGeneral, dot_general_cls=recipe.dot_general_cls, **kinds)
    y = dense((2, 32), name="q")(x) * nn.silu(dense((2, 32), name="k")(x))
    return dense(64, axis=(-2, -1), name="out")(y)


def train(dtype, which, steps=3):
  """Loss, state and gradients of some steps, with state on its way."""
  model, x = Model(dtype), values((2, 32, 64), dtype) / 300
  variables = model.init(jax.random.key(0), x)

  def step(variables, x):
    loss = lambda v: jnp.mean(jnp.square(model.apply(v, x).astype(jnp.float32)))
    value, grads = fp8.value_and_grad(loss)(variables)
    new = {**variables, fp8.OVERWRITE_WITH_GRADIENT: grads[fp8.OVERWRITE_WITH_GRADIENT]}
    return value, grads["params"], new

  seen = []
  with fp8.use_kernels(which):
    for _ in range(steps):
      value, grads, variables = jax.jit(step)(variables, x)
      seen.append((value, grads, variables))
  return seen


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_a_model_trains_to_the_same_bits(interpreted, dtype):
  del interpreted
  plain = train(dtype, "off")
  for which in ("auto", "all"):
    chex.assert_trees_all_equal(train(dtype, which), plain)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("axes", [(0, None), (0, 0)], ids=["shared state", "own state"])
def test_mapped_tensors_are_plain_jax(axes):
  x, state = values((3, 32, 64), jnp.float32), jnp.zeros((3, 4))
  run = lambda x, state: cast.cast_for_both(
    x, jnp.float32(2), jnp.float32(0.5), state, formats.E4M3, views(1, 2), None, opaque=True
  )
  given = (x, state if axes[1] == 0 else state[0])
  text = str(jax.make_jaxpr(jax.vmap(run, axes))(*given))
  assert "pallas_call" not in text
  *_, seen = jax.vmap(run, axes)(*given)
  largest = np.abs(np.asarray(x)).max(axis=(1, 2))
  np.testing.assert_array_equal(seen, largest if axes[1] == 0 else [largest.max()] * 3)


def dense(x, kernel, state):
  """A layer as ``nn.Dense`` calls it; its kernel is read from memory."""
  recipe = fp8.DelayedScaling(amax_history_len=4)
  dims = (((1,), (0,)), ((), ()))
  return fp8.ops.dot_general(x, kernel, dims, recipe=recipe, state=state, kernel_is_stored=True)


def step(x, kernel, state, grad, layer=dense):
  out, pull_back = jax.vjp(layer, x, kernel, state)
  return out, pull_back(grad)


def arguments(n, sharding=lambda spec: None):
  describe = lambda spec, dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(spec))
  fresh = jax.eval_shape(lambda: fp8.ops.init_state(fp8.DelayedScaling(amax_history_len=4)))
  state = jax.tree.map(lambda leaf: describe(P(), leaf.dtype, *leaf.shape), fresh)
  return (
    describe(P("data"), jnp.bfloat16, n, n),
    describe(P(), jnp.bfloat16, n, n),
    state,
    describe(P("data"), jnp.bfloat16, n, n),
  )


def casts(report):
  """Kernels of ours that cast, by what each moves."""
  found = [kernel for kernel in report.kernels if kernel.name.startswith("pallas")]
  return [k for k in found if k.kind is KernelClass.QUANTIZE]


@pytest.mark.parametrize(("which", "count"), [("off", 0), ("auto", 1), ("all", 3)])
def test_what_is_cast_by_the_kernel(described, which, count):
  del described
  with fp8.use_kernels(which):
    report = fp8.explain(step, *arguments(512), target="h100")
  assert [kernel.bytes for kernel in casts(report)] == [4 * 512**2 + 4 * 64 + 4] * count
  assert report.fp8_gemms == 3
  assert len(report.kernels) <= (14 if count else 18)
  layouts = [k for k in report.kernels if k.kind is KernelClass.TRANSPOSE]
  assert len(layouts) == 3 - count


def test_on_several_devices_the_compiler_shards_plain_jax(described):
  del described
  gpus = AbstractMesh((8,), ("data",))
  shardings = lambda spec: NamedSharding(gpus, spec)
  with fp8.use_kernels("all"):
    report = fp8.explain(step, *arguments(512, shardings), target="h100")
  assert not casts(report)
  assert report.fp8_gemms == 3


def over(mesh, check_vma):
  """A step whose layer is mapped over the devices of a mesh."""
  split, whole = P("data"), P()
  layer = jax.shard_map(
    dense, mesh=mesh, in_specs=(split, whole, whole), out_specs=split, check_vma=check_vma
  )
  return functools.partial(step, layer=layer)


@pytest.mark.parametrize("check_vma", [True, False])
def test_in_a_shard_map_each_device_runs_the_kernel(described, check_vma):
  gpu = described("h100")
  known = {"device_kind": gpu.device_kind, "num_cores": None, "platform": "gpu"}
  kind = jax.sharding.AbstractDevice
  names = [field.name for field in dataclasses.fields(kind)]  # of which releases have two
  device = kind(**{name: known[name] for name in names})
  gpus = AbstractMesh((8,), ("data",), abstract_device=device)
  with fp8.use_kernels("all"):
    given = arguments(512, lambda spec: NamedSharding(gpus, spec))
    report = fp8.explain(over(gpus, check_vma), *given, target="h100")
  assert len(casts(report)) == 3
  assert report.fp8_gemms == 3


@pytest.mark.usefixtures("interpreted")
def test_in_a_shard_map_the_kernels_give_the_bits_of_one_device():
  """Float32, and integers, so that sums over devices are exact."""
  x, kernel = (jnp.round(values((n, 64), jnp.float32) / 100) for n in (128, 64))
  state = fp8.ops.init_state(fp8.DelayedScaling(amax_history_len=4))
  with fp8.use_kernels("off"):
    want = jax.jit(step)(x, kernel, state, x)
  with fp8.use_kernels("all"):  # Pallas' interpreter does not know a checked shard_map
    got = jax.jit(over(mesh(), check_vma=False))(x, kernel, state, x)
  chex.assert_trees_all_equal(got, want)
