"""MXFP8 compared with the OCP specification and with JAX's own MXFP8, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from flax_fp8 import formats
from flax_fp8.recipes import Role
from flax_fp8.recipes.mxfp8 import microscale
from tests import oracle
from tests.recipes import cases
from tests.recipes.cases import compiled, normal
from tests.test_formats import ALL

M, K, N = 64, 96, 32
sizes = lambda *shape: 2.0 ** np.random.default_rng(9).integers(-9, 9, shape).astype(np.float32)
X, W, C = (
  normal(0, M, K) * sizes(M, K),
  normal(1, K, N) * sizes(K, N),
  normal(2, M, N) * sizes(M, N),
)


class TestScales:
  """E8M0 codes are biased exponents, and 255 is NaN."""

  def codes(self, amax, float8, rounding):
    got = jax.jit(lambda a: microscale(a, float8, rounding))(np.asarray(amax, np.float32))
    assert got.dtype == jnp.uint8
    return got

  @pytest.mark.parametrize("rounding", ["up", "down"])
  @pytest.mark.parametrize("float8", ALL, ids=lambda f: f.name)
  def test_every_exponent_around_every_edge(self, float8, rounding):
    """Powers of two, the mantissa of the format's largest value, and their float32 neighbors."""
    edges = np.array([1.0, 1.5, 1.75, 1.875, 2.0], np.float32)
    edges = np.concatenate([edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, 4)])
    amax = (edges * 2.0 ** np.arange(-125, 127)[:, None]).astype(np.float32).ravel()
    want = [oracle.microscale_exponent(float(a), float8.name, rounding) + 127 for a in amax]
    np.testing.assert_array_equal(self.codes(amax, float8, rounding), want)

  @pytest.mark.parametrize("rounding", ["up", "down"])
  def test_special_values(self, rounding):
    codes = self.codes([0.0, np.nan, np.inf, 2.0**-126], formats.E4M3, rounding)
    np.testing.assert_array_equal(codes, [127, 255, 255, 1])

  def test_the_two_roundings(self):
    """Above 448, the largest value, "up" takes the next scale and "down" saturates."""
    amax = [256.0, 448.0, np.nextafter(np.float32(448), 500), 511.0, 512.0]
    np.testing.assert_array_equal(self.codes(amax, formats.E4M3, "up"), [127, 127, 128, 128, 128])
    np.testing.assert_array_equal(self.codes(amax, formats.E4M3, "down"), [127] * 4 + [128])

  def test_unknown_rounding(self):
    with pytest.raises(ValueError, match=r"MXFP8BlockScaling: scale_rounding must be .*'nearest'"):
      fp8.MXFP8BlockScaling(scale_rounding="nearest")


def blocks(x, name, rounding="up"):
  """Returns values and codes of a matrix with rows cut into blocks of 32."""
  data, codes = np.zeros(x.shape), np.zeros((x.shape[0], -(-x.shape[1] // 32)), np.uint8)
  for i, row in enumerate(x):
    for j in range(codes.shape[1]):
      part = slice(32 * j, 32 * (j + 1))
      data[i, part], codes[i, j] = oracle.quantize_mx(row[part], name, rounding)
  return data, codes


def dequantized(x, name, rounding="up"):
  data, codes = blocks(x, name, rounding)
  return data * np.repeat(2.0 ** (codes.astype(int) - 127), 32, axis=1)[:, : x.shape[1]]


@pytest.mark.parametrize("rounding", ["up", "down"])
@pytest.mark.parametrize("fp8_format", [fp8.Format.E4M3, fp8.Format.HYBRID], ids=["E4M3", "HYBRID"])
@pytest.mark.parametrize("role", Role, ids=lambda r: r.value)
def test_equals_the_oracle(role, fp8_format, rounding):
  """Blocks run along each GEMM's contracted axis. One is short, one is zero, one has a NaN."""
  x = normal(0, 33, 70) * sizes(33, 70)
  x[2, 32:64], x[:32, 40], x[3, 5] = 0, 0, np.inf
  recipe = fp8.MXFP8BlockScaling(fp8_format=fp8_format, scale_rounding=rounding)
  matrices = (x.T, x) if role is Role.KERNEL else (x, x.T)
  for q, matrix in zip(cases.quantized(recipe, x, role), matrices, strict=True):
    data, codes = blocks(matrix, recipe.float8(role).name, rounding)
    assert q.scale.dtype == jnp.float8_e8m0fnu
    np.testing.assert_array_equal(np.asarray(q.scale[0]).view(np.uint8), codes)
    np.testing.assert_array_equal(np.asarray(q.data[0], np.float64)[:, : data.shape[1]], data)


def test_products_are_those_of_the_dequantized_operands():
  take = functools.partial(dequantized, name="float8_e4m3fn")
  pairs = ((take(X), take(W.T).T), (take(C), take(W).T), (take(X.T), take(C.T).T))
  for value, (lhs, rhs) in zip(compiled(fp8.MXFP8BlockScaling(), X, W, C)[:3], pairs, strict=True):
    # At most 96 additions. Scaling is exact.
    tolerance = 96 * np.finfo(np.float32).eps / 2 * (np.abs(lhs) @ np.abs(rhs))
    assert np.all(np.abs(value - lhs @ rhs) <= tolerance)


def documented_product(lhs, rhs, lhs_scales, rhs_scales, dtype):
  """The equivalent program in the docstring of ``jax.nn.scaled_matmul``."""
  widen = lambda x, scales: (
    x.astype(jnp.float32)
    * jnp.repeat(scales.astype(jnp.float32), x.shape[-1] // scales.shape[-1], axis=-1)
  )
  return jnp.einsum("BMK,BNK->BMN", widen(lhs, lhs_scales), widen(rhs, rhs_scales)).astype(dtype)


def evaluate(jaxpr, consts, arguments, operands):
  """Evaluates a jaxpr, with ``jax.nn.scaled_matmul`` replaced by its documented equivalent.

  ``jax.nn.scaled_matmul`` itself needs a GPU. Appends its operands to ``operands``.
  """
  values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
  read = lambda v: v.val if hasattr(v, "val") else values[v]
  for eqn in jaxpr.eqns:
    inputs = [read(v) for v in eqn.invars]
    if eqn.primitive.name == "scaled_matmul_wrapper":
      operands.append(tuple(inputs))
      out = [documented_product(*inputs, eqn.params["preferred_element_type"])]
    elif eqn.primitive.name in ("jit", "pjit"):
      inner = eqn.params["jaxpr"]
      out = evaluate(inner.jaxpr, inner.consts, inputs, operands)
    else:
      out = eqn.primitive.bind(*inputs, **eqn.params)
      out = out if eqn.primitive.multiple_results else [out]
    values.update(zip(eqn.outvars, out, strict=True))
  return [read(v) for v in jaxpr.outvars]


def by_jax(x, w, c):
  """Runs ``jax.nn.scaled_dot_general``. Returns output, gradients, and its GEMMs' operands."""
  configs = [jax.nn.get_scaled_dot_general_config("mxfp8")] * 3

  def run(x, w, c):
    multiply = lambda x, w: jax.nn.scaled_dot_general(x, w, cases.DIMS, jnp.float32, configs)
    out, vjp = jax.vjp(multiply, x, w)
    return (out, *vjp(c))

  traced = jax.make_jaxpr(run)(x, w, c)

  @jax.jit
  def evaluated(*arguments):
    operands = []
    return evaluate(traced.jaxpr, traced.consts, arguments, operands), operands

  return evaluated(x, w, c)


class TestAgainstJax:
  """Equal to ``jax.nn.scaled_dot_general`` with its configuration "mxfp8"."""

  def test_operands(self):
    """Values and scales of all three GEMMs are equal bit for bit."""
    _, theirs = by_jax(X, W, C)
    recipe = fp8.MXFP8BlockScaling()
    ours = [cases.quantized(recipe, t, role) for t, role in zip((X, W, C), Role, strict=True)]
    (x, x_wgrad), (w, w_dgrad), (c, c_wgrad) = ours
    gemms = ((x, w), (c, w_dgrad), (c_wgrad, x_wgrad))
    assert len(theirs) == 3
    bits = lambda t: np.asarray(t).view(np.uint8)
    for (lhs, rhs), (a, b, a_scale, b_scale) in zip(gemms, theirs, strict=True):
      pairs = ((lhs.data, a), (rhs.data, b), (lhs.scale, a_scale), (rhs.scale, b_scale))
      for mine, their in pairs:
        assert mine.dtype == their.dtype
        np.testing.assert_array_equal(bits(mine), bits(their))

  def test_products(self):
    """Output and both gradients are equal bit for bit, since all sums are exact."""
    x, w, c = (cases.integers(i, *s) for i, s in enumerate(((M, K), (K, N), (M, N))))
    (*theirs,), _ = by_jax(x * 1.5, w * 0.1875, c)
    ours = compiled(fp8.MXFP8BlockScaling(), x * 1.5, w * 0.1875, c)[:3]
    for mine, their in zip(ours, theirs, strict=True):
      np.testing.assert_array_equal(mine, their)

  def test_a_block_of_zeros(self):
    """The scale is 1 here and 2**-127 in JAX, which gives NaN on a CPU without subnormals."""
    x = X.copy()
    x[5, 32:64] = 0
    _, ((data, _, scale, _), *_) = by_jax(x, W, C)
    ours, _ = cases.quantized(fp8.MXFP8BlockScaling(), x, Role.INPUT)
    mine, their = (np.array(t[0], np.float32) for t in (ours.data, data))
    assert not np.any(mine[5, 32:64])
    their[5, 32:64] = 0
    np.testing.assert_array_equal(mine, their)
    codes = [np.asarray(s)[0, 5, 1:2].view(np.uint8)[0] for s in (ours.scale, scale)]
    assert codes == [127, 0]

  @pytest.mark.skipif(not hasattr(jax.lax, "scaled_dot"), reason="JAX 0.8 has no lax.scaled_dot")
  def test_scaled_dot(self):
    """``jax.lax.scaled_dot`` of the same data and scales gives the same product."""
    x, w = cases.integers(0, M, K) * 1.5, cases.integers(1, K, N)
    recipe = fp8.MXFP8BlockScaling()
    (lhs, _), (rhs, _) = (
      cases.quantized(recipe, t, role) for t, role in ((x, Role.INPUT), (w, Role.KERNEL))
    )
    out = jax.lax.scaled_dot(
      lhs.data,
      rhs.data,
      lhs_scale=lhs.scale,
      rhs_scale=rhs.scale,
      dimension_numbers=(((2,), (2,)), ((0,), (0,))),
      preferred_element_type=jnp.float32,
    )
    np.testing.assert_array_equal(out[0], cases.compiled(recipe, x, w, np.ones((M, N)))[0])


def test_the_largest_of_float32_stay_finite():
  """Rounded up, they would overflow to infinity, and infinity times zero is NaN."""
  x = np.zeros((32, 32), np.float32)
  x[0, 0], x[1, 1] = np.finfo(np.float32).max, -3.4e38
  w = np.zeros((32, 32), np.float32)
  w[0, 0] = w[1, 2] = 0.5
  out = compiled(fp8.MXFP8BlockScaling(), x, w, normal(5, 32, 32))[0]
  np.testing.assert_allclose(out, x @ w, rtol=2.0**-4)
