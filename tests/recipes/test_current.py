"""Current scaling compared with the scalar oracle: one scale per tensor, from its own amax."""

import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from flax_fp8.recipes import Role
from tests import oracle
from tests.recipes import cases
from tests.recipes.cases import compiled, normal

FORMATS = (
  pytest.param(fp8.Format.HYBRID, id="HYBRID"),
  pytest.param(fp8.Format.E4M3, id="E4M3"),
  # XLA's older CPU emitters (conftest.py) give wrong results in these formats.
  pytest.param(fp8.Format.HYBRID_FNUZ, id="FNUZ", marks=pytest.mark.slow),
)
# Typical values; a wide range with subnormals and underflow; one value; zeros; extremes.
TENSORS = {
  "normal": normal(0, 9, 11) * 3.7,
  "wide": normal(1, 9, 11) * 2.0 ** np.linspace(-30, 5, 11, dtype=np.float32),
  "one value": np.full((9, 11), 0.1, np.float32),
  "zeros": np.zeros((9, 11), np.float32),
  "tiny": np.sign(normal(2, 9, 11)) * np.abs(normal(3, 9, 11)).clip(0.1) * np.float32(1e-36),
  "huge": normal(3, 9, 11).clip(-1, 1) * np.float32(3e38),
}


@pytest.mark.parametrize("power_of_two", [False, True], ids=["", "power of two"])
@pytest.mark.parametrize("fp8_format", FORMATS)
@pytest.mark.parametrize("role", [Role.INPUT, Role.OUTPUT_GRAD], ids=lambda r: r.value)
def test_equals_the_oracle(role, fp8_format, power_of_two):
  recipe = fp8.Float8CurrentScaling(fp8_format=fp8_format, power_of_two=power_of_two)
  name = recipe.float8(role).name
  for kind, x in TENSORS.items():
    first, second = cases.quantized(recipe, x, role)
    want, scale = oracle.quantize_by_amax(x, name, power_of_two)
    assert first.data.dtype == jnp.dtype(name), kind
    assert first.scale.shape == ()
    np.testing.assert_array_equal(first.scale, scale, kind)
    np.testing.assert_array_equal(np.asarray(first.data, np.float64), want, kind)
    cases.equal(first, second)


def test_largest_value_is_the_formats():
  q, _ = cases.quantized(fp8.Float8CurrentScaling(), TENSORS["normal"], Role.INPUT)
  assert np.abs(np.asarray(q.data, np.float32)).max() == 448


def test_products_are_those_of_the_dequantized_operands():
  """The expected products are in float64, of operands from the oracle."""
  x, w, c = normal(4, 24, 40), normal(5, 40, 12), normal(6, 24, 12)
  recipe = fp8.Float8CurrentScaling()
  names = ("float8_e4m3fn", "float8_e4m3fn", "float8_e5m2")
  dequantized = [
    q * float(scale)
    for q, scale in (oracle.quantize_by_amax(t, n) for t, n in zip((x, w, c), names, strict=True))
  ]
  got = compiled(recipe, x, w, c)[:3]
  magnitudes = cases.exact(*map(np.abs, dequantized))
  for value, want, size in zip(got, cases.exact(*dequantized), magnitudes, strict=True):
    # At most 40 float32 additions, and three roundings of scales.
    assert np.all(np.abs(value - want) <= 43 * np.finfo(np.float32).eps / 2 * size)
