"""Block scaling compared with the scalar oracle, as DeepSeek-V3's report defines it.

Section 3.3.2: 1×128 blocks of activations along the axis that a GEMM sums over, 128×128 blocks of
weights, and float32 partial sums after each 128 terms.
"""

import numpy as np
import pytest

import flax_fp8 as fp8
from flax_fp8.recipes import Role
from tests import oracle
from tests.recipes import cases
from tests.recipes.cases import K, M, N, compiled, normal

NAME = "float8_e4m3fn"
sizes = lambda *shape: 2.0 ** np.random.default_rng(9).integers(-9, 9, shape).astype(np.float32)
X, W, C = (
  normal(0, M, K) * sizes(M, K),
  normal(1, K, N) * sizes(K, N),
  normal(2, M, N) * sizes(M, N),
)
X[:, :128][5], W[128:, 128:] = 0, 0  # a strip and a tile of zeros


def cut(x, rows, columns, power_of_two=True):
  """Quantizes block by block. Returns the values, and the scale of each value."""
  data, scale = np.zeros(x.shape), np.zeros(x.shape, np.float32)
  for i in range(0, x.shape[0], rows):
    for j in range(0, x.shape[1], columns):
      block = np.s_[i : i + rows, j : j + columns]
      data[block], scale[block] = oracle.quantize_by_amax(x[block], NAME, power_of_two)
  return data, scale


def flat(q, rows, size):
  """Returns values, and the scale of each, of data ``[1, rows, K]`` without padding.

  Scales are ``[1, K / 128, rows]`` or ``[1, K / 128, blocks of 128 rows]``.
  """
  data, scale = np.asarray(q.data, np.float64)[0], np.asarray(q.scale)[0].T
  scale = np.repeat(scale, 128 if len(scale) < rows else 1, axis=0)[:rows]
  assert not np.any(data[:, size:])
  return data[:, :size], np.repeat(scale, 128, axis=1)[:, :size]


@pytest.mark.parametrize("power_of_two", [True, False], ids=["power of two", ""])
@pytest.mark.parametrize("role", [Role.INPUT, Role.OUTPUT_GRAD], ids=lambda r: r.value)
def test_strips(role, power_of_two):
  """Each GEMM has its own quantized tensor: along features, then along tokens."""
  x = X if role is Role.INPUT else C
  recipe = fp8.Float8BlockScaling(power_of_two=power_of_two)
  for q, matrix in zip(cases.quantized(recipe, x, role), (x, x.T), strict=True):
    cases.equal(flat(q, *matrix.shape), cut(matrix, 1, 128, power_of_two))


@pytest.mark.parametrize("power_of_two", [True, False], ids=["power of two", ""])
def test_tiles(power_of_two):
  """The kernel is quantized once. dgrad takes the transpose of fprop's operand."""
  recipe = fp8.Float8BlockScaling(power_of_two=power_of_two)
  fprop, dgrad = cases.quantized(recipe, W, Role.KERNEL)
  data, scale = cut(W, 128, 128, power_of_two)
  cases.equal(flat(fprop, N, K), (data.T, scale.T))
  cases.equal(flat(dgrad, K, N), (data, scale))


def test_products_are_those_of_the_dequantized_operands():
  dequantized = lambda x, *block: np.multiply(*cut(x, *block))
  kernel = dequantized(W, 128, 128)
  pairs = (
    (dequantized(X, 1, 128), kernel),
    (dequantized(C, 1, 128), kernel.T),
    (dequantized(X, 128, 1).T, dequantized(C, 128, 1)),
  )
  for value, (lhs, rhs) in zip(compiled(fp8.Float8BlockScaling(), X, W, C)[:3], pairs, strict=True):
    # At most 128 additions per block and one more. Scaling is exact.
    tolerance = 129 * np.finfo(np.float32).eps / 2 * (np.abs(lhs) @ np.abs(rhs))
    assert np.all(np.abs(value - lhs @ rhs) <= tolerance)


def test_blocks_are_added_in_float32():
  """Each block's sum is rounded to float32, scaled and added. It is not one long sum."""
  x, w = np.zeros((1, 256), np.float32), np.zeros((256, 1), np.float32)
  x[0, 0], x[0, 128:] = 2.0**24, 1
  w[0], w[128:] = 1, 1
  # One float32 sum would lose each 1 after 2**24.
  got = compiled(fp8.Float8BlockScaling(), x, w, np.ones((1, 1), np.float32))[0]
  assert float(got[0, 0]) == 2.0**24 + 128
