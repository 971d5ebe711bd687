"""Kernels that are parameters are kept as they are, quantised again: the same bits, less memory."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from flax_fp8.explain.traffic import KernelClass
from flax_fp8.linen import dot_general as linen_dot_general

RECIPES = {
  "delayed": fp8.DelayedScaling(amax_history_len=3),
  "delayed, first step current": fp8.DelayedScaling(amax_history_len=3, first_step="current"),
  "current": fp8.Float8CurrentScaling(),
  "rowwise": fp8.Float8RowwiseScaling(),
}
X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 32)), jnp.float16)


class Block(nn.Module):
  """Layers of float32 parameters that compute in float16, as a step of a scan."""

  cls: object

  @nn.compact
  def __call__(self, x, _):
    layer = functools.partial(nn.DenseGeneral, dtype=jnp.float16, dot_general_cls=self.cls)
    y = nn.relu(layer((2, 16), name="up")(x))
    return x + layer(32, axis=(-2, -1), name="down")(y), None


class Model(nn.Module):
  """Two blocks."""

  cls: object
  lift: str

  @nn.compact
  def __call__(self, x):
    block = nn.remat(Block, prevent_cse=False) if "remat" in self.lift else Block
    if "scan" in self.lift:
      scanned = fp8.scan(block, {"params": 0}, split_rngs={"params": True}, length=2)
      return scanned(self.cls)(x, None)[0]
    for _ in range(2):
      x, _ = block(self.cls)(x, None)
    return x


def loss(model, variables, x):
  return jnp.mean(jnp.square(model.apply(variables, x).astype(jnp.float32)))


def train(model, steps=3):
  """Losses and gradients of some steps, with state on its way."""
  variables, seen = model.init(jax.random.key(0), X), []
  step = jax.jit(fp8.value_and_grad(functools.partial(loss, model)))
  for n in range(steps):
    value, grads = step(variables, X * (n + 1))
    state = grads.get(fp8.OVERWRITE_WITH_GRADIENT)
    variables = {**variables, **({} if state is None else {fp8.OVERWRITE_WITH_GRADIENT: state})}
    seen.append((value, grads))
  return seen


def kept_in_fp8(monkeypatch):
  monkeypatch.setattr(linen_dot_general, "stored_kernel", lambda module, kernel: None)


@pytest.mark.parametrize(
  ("recipe", "lift"),
  [
    ("delayed", "scan"),
    pytest.param("delayed", "none", marks=pytest.mark.slow),
    pytest.param("delayed", "scan, remat", marks=pytest.mark.slow),
    pytest.param("delayed, first step current", "scan", marks=pytest.mark.slow),
    pytest.param("current", "scan, remat", marks=pytest.mark.slow),
    pytest.param("rowwise", "scan", marks=pytest.mark.slow),
  ],
)
def test_same_bits_as_kept_in_fp8(monkeypatch, recipe, lift):
  model = Model(RECIPES[recipe].dot_general_cls, lift)
  found = train(model)
  kept_in_fp8(monkeypatch)
  chex.assert_trees_all_equal(found, train(model))


def found_by(monkeypatch, model, *args):
  """What ``stored_kernel`` finds in each call of a model, by dtype; None where nothing."""
  seen, find = [], linen_dot_general.stored_kernel

  def record(module, kernel):
    seen.append(find(module, kernel))
    return seen[-1]

  monkeypatch.setattr(linen_dot_general, "stored_kernel", record)
  variables = model.init(jax.random.key(0), *args)
  seen.clear()
  model.apply(variables, *args)
  return [None if kernel is None else kernel.dtype.name for kernel in seen]


class Halved(nn.Dense):
  """A layer that does more to its kernel than cast it."""

  def param(self, name, *args, **kwargs):
    value = super().param(name, *args, **kwargs)
    return value / 2 if name == "kernel" else value


CLS = RECIPES["delayed"].dot_general_cls
ATTENTION = {"num_heads": 2, "qkv_dot_general_cls": CLS, "out_dot_general_cls": CLS}
LAYERS = {
  "same dtype": (nn.Dense(32, dot_general_cls=CLS), ["float32"]),
  "cast": (nn.Dense(32, dtype=jnp.bfloat16, dot_general_cls=CLS), ["float32"]),
  "boxed": (
    nn.Dense(
      32,
      dtype=jnp.bfloat16,
      dot_general_cls=CLS,
      kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model")),
    ),
    ["float32"],
  ),
  "converted": (
    fp8.fp8_linear_layers(nn.Sequential([nn.Dense(32, dtype=jnp.bfloat16)] * 2)),
    ["float32"] * 2,
  ),
  "attention": (
    nn.MultiHeadDotProductAttention(dtype=jnp.bfloat16, **ATTENTION),
    ["float32"] * 4,
  ),
  "fused": (fp8.Fp8SwiGLU(32, dtype=jnp.bfloat16), ["float32"] * 2),
  "fused, scaled": (
    fp8.Fp8SwiGLU(32, dtype=jnp.bfloat16, kernel_scales="separate"),
    [None, "float32"],
  ),
  "a subclass": (Halved(32, dtype=jnp.bfloat16, dot_general_cls=CLS), [None]),
  "another cast": (
    nn.Dense(
      32,
      dtype=jnp.bfloat16,
      dot_general_cls=CLS,
      promote_dtype=lambda *args, dtype: [x if x is None else x.astype(dtype) for x in args],
    ),
    [None],
  ),
}


@pytest.mark.parametrize(("layer", "dtypes"), LAYERS.values(), ids=LAYERS)
def test_which_kernels_are_stored(monkeypatch, layer, dtypes):
  assert found_by(monkeypatch, layer, jnp.ones((2, 32))) == dtypes


def test_a_scan_keeps_no_kernel_in_fp8(monkeypatch):
  model = Model(CLS, "scan")
  variables = jax.eval_shape(model.init, jax.random.key(0), X)

  def is_kept():
    step = fp8.value_and_grad(functools.partial(loss, model))
    return "f8_e4m3fn[2,32,2,16]" in str(jax.make_jaxpr(lambda v: step(v, X))(variables))

  assert not is_kept()
  kept_in_fp8(monkeypatch)
  assert is_kept()


def test_inference_reads_a_kernel_once(described):
  """Without a backward pass nothing is observed: what is cast is laid out in the same pass."""
  del described
  layer = nn.Dense(2048, use_bias=False, dtype=jnp.bfloat16, dot_general_cls=CLS)
  x = jax.ShapeDtypeStruct((1024, 2048), jnp.bfloat16)
  variables = jax.eval_shape(layer.init, jax.random.key(0), x)
  report = fp8.explain(layer.apply, variables, x, target="h100")
  assert report.fp8_gemms == report.total_gemms == 1
  moved = sum(kernel.bytes for kernel in report.kernels if kernel.kind is not KernelClass.FP8_GEMM)
  assert moved == pytest.approx(1024 * 2048 * (2 + 1) + 2048 * 2048 * (4 + 1), rel=1e-3)
