"""The saturating cast and the arithmetic of scales, compared with the scalar oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_fp8 import formats, quantize
from tests import oracle
from tests.test_formats import ALL

F32_MAX = float(np.finfo(np.float32).max)


def hard_values(name: str) -> np.ndarray:
  """Makes every value, every midpoint, their float32 neighbors, and values out of range."""
  values = np.array(oracle.magnitudes(name))
  points = np.concatenate(
    [values, (values[1:] + values[:-1]) / 2, [values[-1] * 1.04, 1e30, F32_MAX]]
  )
  points = np.concatenate([points, [values[1] / 4, 1e-30, 2.0**-126, np.inf]]).astype(np.float32)
  with np.errstate(over="ignore"):
    near = [np.nextafter(points, np.float32(end)) for end in (0, np.inf)]
  all_points = np.concatenate([points, *near])
  return np.concatenate([all_points, -all_points, [np.nan]]).astype(np.float32)


# XLA's older CPU emitters (conftest.py) give wrong results in these formats.
CASTS = [
  pytest.param(fmt, marks=[pytest.mark.slow] if fmt.name.endswith("fnuz") else [], id=fmt.name)
  for fmt in ALL
]


@pytest.mark.parametrize("fmt", CASTS)
class TestSaturatingCast:
  @pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
  def test_equals_the_oracle(self, fmt, run):
    x = hard_values(fmt.name)
    got = run(lambda x: quantize.saturating_cast(x, fmt))(x)
    want = [oracle.round_scalar(float(v), fmt.name) for v in x]
    assert got.dtype == fmt.dtype
    np.testing.assert_array_equal(np.asarray(got, np.float64), want)

  @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
  def test_every_16_bit_value(self, fmt, dtype):
    x = np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype))
    got = jax.jit(lambda x: quantize.saturating_cast(x, fmt))(x)
    want = oracle.quantize(x.astype(np.float32), 1.0, fmt.name)
    np.testing.assert_array_equal(np.asarray(got, np.float64), want)


@pytest.mark.slow
def test_fnuz_zero_has_no_sign():
  got = quantize.saturating_cast(jnp.array([-1e-9]), formats.E4M3_FNUZ)
  assert np.asarray(got).view(np.uint8)[0] == 0


@pytest.mark.parametrize("scale", [2.0**-110, 1e-3, 1.0, 7.3, 2.0**100])
@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)
def test_quantize_and_dequantize_equal_the_oracle(fmt, scale):
  x = np.random.default_rng(0).normal(size=200).astype(np.float32) * np.float32(scale) * 9
  q = quantize.quantize(jnp.asarray(x), jnp.float32(scale), fmt)
  np.testing.assert_array_equal(np.asarray(q.data, np.float64), oracle.quantize(x, scale, fmt.name))
  back = quantize.dequantize(q.data, q.scale, jnp.float32)
  np.testing.assert_array_equal(back, oracle.qdq(x, np.float32(scale), fmt.name).astype(np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)
@pytest.mark.parametrize("given", ["scale", "inverse", "key"])
def test_an_infinity_becomes_nan_and_overflow_saturates(given, fmt, dtype):
  """A finite value may have an infinite quotient, which counts as overflow."""
  x = jnp.array([np.inf, -np.inf, np.nan, 60000.0, -60000.0, 0.0], dtype)
  scale = jnp.float32(2.0**-126)
  options = {"inverse": {"inverse": 1 / scale}, "key": {"key": jax.random.key(0)}}.get(given, {})
  got = quantize.quantize(x, scale, fmt, **options, stale=True).data
  want = [np.nan, np.nan, np.nan, fmt.max, -fmt.max, 0.0]
  np.testing.assert_array_equal(np.asarray(got, np.float32), want)


class TestScaleFromAmax:
  def scale(self, amax, fmt=formats.E4M3, fallback=3.0, **options):
    arrays = jnp.float32(amax), jnp.float32(fallback)
    scale, inverse = jax.jit(lambda a, f: quantize.scale_from_amax(a, f, fmt.max, **options))(
      *arrays
    )
    assert float(inverse) == pytest.approx(1 / float(scale), rel=3e-7)
    return float(scale)

  @pytest.mark.parametrize("margin", [0, 1, -2, 0.5])
  @pytest.mark.parametrize("amax", [1e-30, 0.1, 1.0, 447.0, 1e30])
  def test_equals_float64(self, amax, margin):
    want = float(np.float32(amax)) / 448.0 * 2.0**margin
    assert self.scale(amax, margin=margin) == pytest.approx(want, rel=3e-7)

  @pytest.mark.parametrize("amax", [0.0, np.nan, np.inf])
  def test_falls_back(self, amax):
    assert self.scale(amax) == 3.0

  @pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)
  @pytest.mark.parametrize("amax", [1e-45, 2.0**-149, 1e-40, 2.0**-126, 1e-36, 1e38, F32_MAX])
  @pytest.mark.parametrize("margin", [0, 64, -64])
  def test_is_never_zero_or_infinite(self, amax, fmt, margin):
    scale = self.scale(amax, fmt, margin=margin)
    assert (
      2.0**-126 <= scale <= 2.0**126 or scale == 3.0
    )  # XLA's CPU code may read a subnormal as zero
    quotient = jnp.float32(min(amax, F32_MAX)) / jnp.float32(scale)
    assert np.isfinite(quotient)

  @pytest.mark.parametrize(
    "amax",
    [
      *(pytest.param(subnormal, marks=pytest.mark.slow) for subnormal in (1e-40, 3e-39)),
      *(0.3, 1.0, 448.0, 448.0001, 1e30, F32_MAX),
    ],
  )
  def test_power_of_two_is_the_next_one_up(self, amax):
    exact, rounded = self.scale(amax), self.scale(amax, power_of_two=True)
    mantissa, _ = np.frexp(rounded)
    assert mantissa == 0.5
    assert exact <= rounded < 2 * exact

  @pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)
  @pytest.mark.parametrize("margin", [0, 1, -2])
  def test_power_of_two_is_exact(self, fmt, margin):
    """Also at the format's largest value times a power of two, and at its neighbors."""
    limit = fmt.max / 2.0**margin
    whole = (np.float32(limit) * np.exp2(np.arange(-90, 91))).astype(np.float32)
    above = np.nextafter(whole, np.float32(np.inf))
    amax = np.concatenate([whole, np.nextafter(whole, np.float32(0)), above])
    want = np.concatenate([whole, whole, 2 * whole]) / limit
    scale, inverse = quantize.scale_from_amax(
      jnp.asarray(amax), jnp.ones_like(amax), fmt.max, margin, power_of_two=True
    )
    np.testing.assert_array_equal(scale, want)
    np.testing.assert_array_equal(inverse, 1 / want)


@pytest.mark.parametrize(
  ("lhs", "rhs"), [(2.0**-70, 2.0**-75), (2.0**-126, 2.0**3), (2.0**80, 2.0**70), (2.0**120, 1.5)]
)
@pytest.mark.parametrize("out", [0.0, -3.5 * 2.0**17, 2.0**-9])
def test_products_are_scaled_even_where_float32_cannot_hold_both_scales(lhs, rhs, out):
  scale = jax.jit(lambda *args: quantize.dequantize_product(*args, jnp.float32))
  want = np.float64(out) * lhs * rhs
  if abs(want) < F32_MAX and (want == 0 or abs(want) >= 2.0**-126):
    assert float(scale(jnp.float32(out), jnp.float32(lhs), jnp.float32(rhs))) == want


def test_product_of_scales_does_not_overflow():
  big = jnp.float32(2.0**120)
  assert float(quantize.product(big, big)) == F32_MAX
  assert float(quantize.product(jnp.float32(3), jnp.float32(0.5))) == 1.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rounding_in_place_changes_no_value(dtype):
  info = jnp.finfo(dtype)
  values = [0.0, -0.0, 1.0, float(info.max), float(info.tiny), np.inf, -np.inf, np.nan, 1 / 3]
  x = jnp.asarray(values, dtype)
  got = jax.jit(quantize.round_in_place)(x)
  assert got.dtype == x.dtype
  np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(x, np.float32))
