"""Rowwise scaling compared with the scalar oracle."""

import numpy as np
import pytest

import flax_fp8 as fp8
from flax_fp8.recipes import Role
from tests import oracle
from tests.recipes import cases
from tests.recipes.cases import compiled, normal

# The axes that each tensor's two GEMMs contract.
CONTRACTED = {Role.INPUT: (1, 0), Role.KERNEL: (0, 1), Role.OUTPUT_GRAD: (1, 0)}
# Rows and columns of very different magnitudes, and a row and a column of zeros.
X = normal(0, 7, 9) * 2.0 ** np.linspace(-12, 12, 7, dtype=np.float32)[:, None]
X = X * 2.0 ** np.linspace(9, -9, 9, dtype=np.float32)
X[3], X[:, 4] = 0, 0


def by_row(x, contracted, name, power_of_two):
  """Returns values and scales, row by row along the contracted axis."""
  lines = [
    oracle.quantize_by_amax(line, name, power_of_two) for line in np.moveaxis(x, contracted, 1)
  ]
  data = np.moveaxis(np.stack([line for line, _ in lines]), 1, contracted)
  return data, np.expand_dims([scale for _, scale in lines], contracted)


@pytest.mark.parametrize("power_of_two", [False, True], ids=["", "power of two"])
@pytest.mark.parametrize("fp8_format", [fp8.Format.HYBRID, fp8.Format.E4M3], ids=["HYBRID", "E4M3"])
@pytest.mark.parametrize("role", Role, ids=lambda r: r.value)
def test_equals_the_oracle(role, fp8_format, power_of_two):
  recipe = fp8.Float8RowwiseScaling(fp8_format=fp8_format, power_of_two=power_of_two)
  pair = cases.quantized(recipe, X, role)
  for q, contracted in zip(pair, CONTRACTED[role], strict=True):
    data, scale = by_row(X, contracted, recipe.float8(role).name, power_of_two)
    np.testing.assert_array_equal(q.scale, scale)
    np.testing.assert_array_equal(np.asarray(q.data, np.float64), data)


def test_products_are_those_of_the_dequantized_operands():
  """Each GEMM has its own quantized operands."""
  x, w, c = normal(4, 24, 40), normal(5, 40, 12), normal(6, 24, 12)
  dequantized = lambda t, contracted: np.multiply(*by_row(t, contracted, "float8_e4m3fn", False))
  pairs = (
    (dequantized(x, 1), dequantized(w, 0)),
    (dequantized(c, 1), dequantized(w, 1).T),
    (dequantized(x, 0).T, dequantized(c, 0)),
  )
  got = compiled(fp8.Float8RowwiseScaling(), x, w, c)[:3]
  for value, (lhs, rhs) in zip(got, pairs, strict=True):
    # At most 40 float32 additions, and three roundings of scales.
    tolerance = 43 * np.finfo(np.float32).eps / 2 * (np.abs(lhs) @ np.abs(rhs))
    assert np.all(np.abs(value - lhs @ rhs) <= tolerance)
