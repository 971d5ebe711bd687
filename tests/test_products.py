"""Products of quantized tensors compared with float64."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flax_fp8 as fp8
from flax_fp8 import _compat, contraction, products
from flax_fp8.explain import deviceless
from flax_fp8.explain.compile import compile_program
from flax_fp8.explain.traffic import KernelClass
from flax_fp8.quantize import QTensor

random = np.random.default_rng(0)
E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


def microscaled(*shape):
  """Makes values and scales of blocks of 32. Magnitudes differ, so a misplaced scale shows."""
  data = jnp.asarray(random.normal(size=shape), jnp.float8_e4m3fn)
  exponents = random.integers(-6, 6, size=(*shape[:-1], shape[-1] // 32))
  return QTensor(data, jnp.asarray(2.0**exponents, jnp.float8_e8m0fnu))


def exact(x):
  scale = np.repeat(np.asarray(x.scale, np.float64), 32, axis=-1)
  return np.asarray(x.data, np.float64) * scale


def product_of(lhs, rhs):
  return products.dot_microscaled(lhs, rhs, jnp.float32)


def in_float64(lhs, rhs):
  return np.einsum("...mk,...nk->...mn", exact(lhs), exact(rhs))


GEMM = contraction.forward_gemm((((1,), (0,)), ((), ())), (16, 32), (32, 48), kernel=1)


def per_tensor(lhs, rhs):
  return products.dot_per_tensor(lhs, rhs, GEMM, jnp.bfloat16, fast_accumulation=False)


def scaled(*shape, n_scales=None):
  """Makes scales that bfloat16 can't represent."""
  scale = random.uniform(0.001, 0.1, [n_scales] if n_scales else []).astype(np.float32)
  data = jnp.asarray(random.normal(size=shape) * 100, jnp.float8_e4m3fn)
  return QTensor(data, jnp.asarray(scale))


def test_dot_per_tensor():
  lhs, rhs = scaled(16, 32), scaled(32, 48)
  whole = [np.asarray(q.data, np.float64) * np.float64(q.scale) for q in (lhs, rhs)]
  got = np.float64(per_tensor(lhs, rhs))
  np.testing.assert_allclose(got, whole[0] @ whole[1], rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("inner", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("scales", [None, 4], ids=["one scale", "scales"])
def test_dot_per_tensor_under_vmap(scales, inner):
  """Each slice of a mapped scale applies to one product only."""
  lhs, rhs = scaled(4, 16, 32, n_scales=scales), scaled(4, 32, 48, n_scales=scales)
  axes = QTensor(0, None if scales is None else 0)
  of = per_tensor
  if inner:
    alone = jax.vmap(per_tensor, (QTensor(0, None), QTensor(None, None)))
    of = lambda lhs, rhs: alone(QTensor(lhs.data[None], lhs.scale), rhs)
  got = jax.jit(jax.vmap(of, (axes, axes)))(lhs, rhs)
  for i in range(4):
    one = [QTensor(q.data[i], q.scale if scales is None else q.scale[i]) for q in (lhs, rhs)]
    np.testing.assert_array_equal(got[i].reshape(16, 48), per_tensor(*one))


def compiled_for_h100(fn, *args):
  pytest.importorskip("jax_plugins.xla_cuda13", reason="the CUDA plugin supports only Linux")
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
  return compile_program(fn, shapes, target="h100", mesh=None, timeout=300).hlo


FP8_GEMM = 'custom_call_target="__cublas$lt$matmul$f8"'


@pytest.fixture(params=[False, True], ids=["triton off", "default flags"])
def triton(request, monkeypatch):
  """Compiles with and without XLA's Triton GEMMs."""
  if request.param and not _compat.NAMES_FP8_ALGORITHM:
    pytest.skip("this JAX can't name the algorithm, so XLA chooses by trial on the GPU")
  options = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": request.param}
  monkeypatch.setattr(deviceless, "OPTIONS", options)


def matrices(lhs, rhs, dims=(((1,), (0,)), ((), ())), dtypes=(E4M3, E4M3)):
  """Makes the shapes of two operands with one scale each, and their GEMM."""
  gemm = contraction.forward_gemm(dims, lhs, rhs, kernel=1)
  scale = jax.ShapeDtypeStruct((), jnp.float32)
  shapes = (jax.ShapeDtypeStruct(*each) for each in zip((lhs, rhs), dtypes, strict=True))
  return (*(QTensor(shape, scale) for shape in shapes), gemm)


def multiply(gemm, dtype=jnp.bfloat16, **options):
  options = {"fast_accumulation": False, **options}
  return lambda lhs, rhs: products.dot_per_tensor(lhs, rhs, gemm, dtype, **options)


LARGE = (2048, 64), (64, 1024)
SIZES = {
  "large": (*LARGE, ()),
  "small": ((256, 512), (512, 128), ()),
  "sixteen rows": ((16, 32), (32, 48), ()),
  "odd": ((33, 35), (35, 37), ()),
  "experts": ((4, 64, 32), (4, 32, 48), ((((2,), (1,)), ((0,), (0,))),)),
  "two contracted axes": ((64, 4, 16), (4, 16, 48), ((((1, 2), (0, 1)), ((), ())),)),
}


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
  ("size", "dtype"),
  [*((size, "bfloat16") for size in SIZES), *((size, "float32") for size in ("large", "odd"))],
)
def test_a_gpu_gets_an_fp8_gemm_whatever_the_flags(size, dtype):
  """The GEMM is FP8 for all flags, and no kernel rounds a scale."""
  lhs, rhs, dims = SIZES[size]
  lhs, rhs, gemm = matrices(lhs, rhs, *dims)
  hlo = compiled_for_h100(multiply(gemm, jnp.dtype(dtype)), lhs, rhs)
  assert hlo.count(FP8_GEMM) == 1
  assert "bf16[]" not in hlo


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("fast", [True, False])
def test_the_program_says_how_sums_are_accumulated(fast):
  lhs, rhs, gemm = matrices(*LARGE)
  hlo = compiled_for_h100(multiply(gemm, fast_accumulation=fast), lhs, rhs)
  if _compat.NAMES_FP8_ALGORITHM:
    name = "ALG_DOT_ANY_F8_ANY_F8_F32" + "_FAST_ACCUM" * fast
    assert re.findall(r"ALG_DOT_ANY_F8\w+", hlo) == [name]
  else:
    found = re.findall(r'"operand_precision":\["(\w+)"', hlo)
    assert found == ["DEFAULT" if fast else "HIGHEST"]


@pytest.mark.usefixtures("triton")
def test_a_large_product_is_written_once_in_bfloat16():
  lhs, rhs, gemm = matrices(*LARGE)
  hlo = compiled_for_h100(multiply(gemm), lhs, rhs)
  assert "bf16[2048,1024]" in hlo
  assert "f32[2048,1024]" not in hlo


def rows(*shape, contracted, power_of_two):
  """Makes an operand with a scale for each of its rows, and small integers: sums are exact."""
  size = [1 if axis == contracted else n for axis, n in enumerate(shape)]
  exponent = random.uniform(-9, -3, size)
  scale = 2.0 ** (np.round(exponent) if power_of_two else exponent)
  return QTensor(jnp.asarray(random.integers(-8, 9, shape), E4M3), jnp.asarray(scale, jnp.float32))


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dot_per_row_of_a_large_product(dtype, power_of_two):
  """Bfloat16 is rounded before it is scaled too, which powers of two do not show."""
  (m, k), (_, n) = LARGE
  lhs = rows(m, k, contracted=1, power_of_two=power_of_two)
  rhs = rows(k, n, contracted=0, power_of_two=power_of_two)
  gemm = contraction.forward_gemm((((1,), (0,)), ((), ())), (m, k), (k, n), kernel=1)
  got = products.dot_per_row(lhs, rhs, gemm, jnp.dtype(dtype), fast_accumulation=False)
  assert got.dtype == dtype
  left, right = (np.asarray(q.data, np.float64) for q in (lhs, rhs))
  want = (left @ right) * np.asarray(lhs.scale, np.float64) * np.asarray(rhs.scale, np.float64)
  if power_of_two:
    np.testing.assert_array_equal(got, jnp.asarray(want, jnp.float32).astype(dtype))
  half_ulp = float(jnp.finfo(dtype).eps) / 2
  scaling = 2 * 2.0**-24  # the product of the scales, and that with the sum
  tolerance = (2 if dtype == "bfloat16" else 1) * half_ulp + scaling + half_ulp**2
  subnormal = float(jnp.finfo(dtype).smallest_subnormal) / 2
  np.testing.assert_allclose(np.float64(got), want, rtol=tolerance, atol=subnormal)


def test_sums_of_a_rowwise_product_do_not_overflow_in_float16():
  (m, k), (_, n) = LARGE
  full = lambda shape, scale: QTensor(jnp.full(shape, 448, E4M3), jnp.full(scale, 2.0**-12))
  gemm = contraction.forward_gemm((((1,), (0,)), ((), ())), (m, k), (k, n), kernel=1)
  lhs, rhs = full((m, k), (m, 1)), full((k, n), (1, n))
  got = products.dot_per_row(lhs, rhs, gemm, jnp.float16, fast_accumulation=False)
  np.testing.assert_array_equal(got, np.float16(448 * 448 * k * 2.0**-24))


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(("size", "written"), [("large", "bf16"), ("small", "f32")])
def test_a_large_rowwise_product_leaves_the_gemm_in_bfloat16(size, written):
  (m, k), (_, n), _ = SIZES[size]
  lhs, rhs, gemm = matrices((m, k), (k, n))
  lhs, rhs = (
    QTensor(q.data, jax.ShapeDtypeStruct(shape, jnp.float32))
    for q, shape in ((lhs, (m, 1)), (rhs, (1, n)))
  )
  how = {"gemm": gemm, "dtype": jnp.bfloat16, "fast_accumulation": False}
  hlo = compiled_for_h100(functools.partial(products.dot_per_row, **how), lhs, rhs)
  (call,) = [line for line in hlo.splitlines() if FP8_GEMM in line]
  assert re.search(r"= \(?(\w+)\[", call)[1] == written


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(("shared", "count"), [(0, 2), (None, 1)])
def test_gemms_of_a_shared_operand_stay_apart(shared, count):
  """If XLA merged them, separate kernels would apply the scales, with extra rounding."""
  lhs, rhs, gemm = matrices(*LARGE)
  both = lambda x, a, b: [multiply(gemm, shared=shared)(x, each) for each in (a, b)]
  hlo = compiled_for_h100(both, lhs, rhs, rhs)
  assert hlo.count(FP8_GEMM) == count
  assert ("bf16[]" in hlo) == (count == 1)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("permutation", [(0, 1), (1, 0)], ids=["as it is", "transposed"])
def test_the_scale_is_exact_where_the_consumer_wants_columns(permutation):
  lhs, rhs, gemm = matrices(*LARGE)
  gemm = dataclasses.replace(gemm, permutation=permutation)
  turned = lambda *operands: jnp.sin(multiply(gemm)(*operands).T).reshape(2, -1)
  hlo = compiled_for_h100(turned, lhs, rhs)
  assert hlo.count(FP8_GEMM) == 1
  assert "bf16[]" not in hlo


def test_a_transposed_product_is_that_of_exchanged_operands():
  lhs, rhs = scaled(4, 16, 32), scaled(4, 32, 8)
  dims = (((2,), (1,)), ((0,), (0,)))
  gemm = contraction.forward_gemm(dims, lhs.data.shape, rhs.data.shape, kernel=1)
  for permutation in ((0, 2, 1), (2, 0, 1)):
    turned = dataclasses.replace(gemm, permutation=permutation)
    got = products._dot_transposed(lhs.data, rhs.data, turned, jnp.float32, False)
    want = products._dot_transposed(lhs.data, rhs.data, gemm, jnp.float32, False)
    np.testing.assert_allclose(got, want.transpose(permutation), rtol=1e-5)


class Layer(nn.Module):
  """One step of a scan."""

  @nn.compact
  def __call__(self, x, _):
    options = {"dtype": jnp.bfloat16, "dot_general_cls": fp8.Fp8DotGeneral, "use_bias": False}
    up = nn.relu(nn.Dense(2048, name="up", **options)(x))
    return x + nn.Dense(1024, name="down", **options)(up), None


@pytest.mark.slow
def test_kernels_are_turned_in_fp8_and_not_the_stack_of_them_in_float32():
  """Otherwise XLA would transpose the stack before the scan and store a second copy."""
  layer = nn.remat(Layer, prevent_cse=False)
  model = fp8.scan(layer, {"params": 0}, split_rngs={"params": True}, length=4)()
  x = jax.ShapeDtypeStruct((2048, 1024), jnp.bfloat16)
  variables = jax.eval_shape(model.init, jax.random.key(0), x, None)
  loss = lambda v, x: jnp.sum(model.apply(v, x, None)[0].astype(jnp.float32) ** 2)
  report = fp8.explain(fp8.value_and_grad(loss), variables, x, target="h100")
  stack = 4 * 4 * 2048 * 1024
  turned = [k for k in report.kernels if k.kind is KernelClass.TRANSPOSE and k.read >= stack]
  assert not turned
  assert report.fp8_gemms == report.total_gemms > 0


REFUSED = {
  "E5M2 by E5M2": ((64, 32), (32, 64), (E5M2, E5M2)),
  "one row": ((1, 32), (32, 64), (E4M3, E4M3)),
  "one column": ((64, 32), (32, 1), (E4M3, E4M3)),
  "nothing": ((64, 0), (0, 64), (E4M3, E4M3)),
}


@pytest.mark.parametrize(("lhs", "rhs", "dtypes"), REFUSED.values(), ids=REFUSED)
def test_products_without_an_fp8_gemm_compile(lhs, rhs, dtypes):
  """XLA rejects an explicit algorithm that it does not support."""
  lhs, rhs, gemm = matrices(lhs, rhs, dtypes=dtypes)
  assert FP8_GEMM not in compiled_for_h100(multiply(gemm), lhs, rhs)


def test_a_gpu_without_fp8_units_multiplies_in_a_wider_type():
  pytest.importorskip("jax_plugins.xla_cuda13", reason="the CUDA plugin supports only Linux")
  lhs, rhs, gemm = matrices(*LARGE)
  report = fp8.explain(multiply(gemm), lhs, rhs, target="a100")
  assert (report.fp8_gemms, report.total_gemms) == (0, 1)


def test_whether_this_jax_can_name_the_algorithm():
  """This test fails as soon as a JAX release supports it again."""
  dot = functools.partial(
    lax.dot, precision=lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32, preferred_element_type=jnp.float32
  )
  x = jax.ShapeDtypeStruct((16, 16), E4M3)
  if _compat.NAMES_FP8_ALGORITHM:
    jax.export.export(jax.jit(dot), platforms=["cuda"])(x, x)
  else:
    with pytest.raises(Exception, match="vhlo"):
      jax.export.export(jax.jit(dot), platforms=["cuda"])(x, x)


@pytest.mark.parametrize(
  "recipe",
  [
    fp8.DelayedScaling(),
    fp8.DelayedScaling(interval=2, first_step="current"),
    fp8.Float8CurrentScaling(),
  ],
  ids=["delayed", "interval", "current"],
)
def test_no_scale_of_a_layer_is_rounded(recipe):
  """A reshape between the two casts of a scale would make XLA keep the rounding."""
  layer = nn.Dense(2048, dtype=jnp.bfloat16, dot_general_cls=recipe.dot_general_cls)
  x = jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16)
  variables = jax.eval_shape(layer.init, jax.random.key(0), x)
  loss = lambda variables, x: jnp.mean(jnp.sin(layer.apply(variables, x).astype(jnp.float32)))
  hlo = compiled_for_h100(fp8.value_and_grad(loss, argnums=(0, 1)), variables, x)
  assert hlo.count(FP8_GEMM) == 3
  assert not re.search(r"= bf16\[1?\]\S* convert\(", hlo)


def test_a_gpu_gets_fp8_gemms_of_experts():
  """The experts have one scale each, or share one."""
  for scales in (None, 4):
    axes = QTensor(0, None if scales is None else 0)
    args = scaled(4, 16, 32, n_scales=scales), scaled(4, 32, 48, n_scales=scales)
    hlo = compiled_for_h100(jax.vmap(per_tensor, (axes, axes)), *args)
    assert hlo.count(FP8_GEMM) == 1, scales


def test_dot_microscaled():
  lhs, rhs = microscaled(2, 5, 96), microscaled(2, 7, 96)
  np.testing.assert_allclose(product_of(lhs, rhs), in_float64(lhs, rhs), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=["lhs", "rhs", "both"])
def test_dot_microscaled_under_vmap(axes):
  """JAX's scaled_matmul supports vmap only over both operands."""
  lhs = microscaled(*[3][: axes[0] == 0], 2, 5, 64)
  rhs = microscaled(*[3][: axes[1] == 0], 2, 7, 64)
  got = jax.vmap(product_of, in_axes=axes)(lhs, rhs)
  np.testing.assert_allclose(got, in_float64(lhs, rhs), rtol=1e-5, atol=1e-4)
  nested = jax.vmap(jax.vmap(product_of, in_axes=axes), in_axes=(0, 0))
  many = [jax.tree.map(lambda x: jnp.stack([x, x]), q) for q in (lhs, rhs)]
  np.testing.assert_array_equal(nested(*many)[1], got)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=["lhs", "rhs", "both"])
def test_dot_microscaled_under_vmap_compiles_for_cuda(axes):
  pytest.importorskip("jax_plugins.xla_cuda13", reason="the CUDA plugin supports only Linux")
  shape = lambda rows, mapped: (*[3][:mapped], 2, rows)
  spec = lambda rows, mapped: QTensor(
    jax.ShapeDtypeStruct((*shape(rows, mapped), 128), jnp.float8_e4m3fn),
    jax.ShapeDtypeStruct((*shape(rows, mapped), 4), jnp.float8_e8m0fnu),
  )
  args = spec(128, axes[0] == 0), spec(256, axes[1] == 0)
  report = fp8.explain(jax.vmap(product_of, in_axes=axes), *args, target="b200")
  assert [gemm.flops for gemm in report.gemms] == [2 * 3 * 2 * 128 * 256 * 128]
