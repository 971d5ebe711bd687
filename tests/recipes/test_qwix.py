"""Quantized values and scales compared with Qwix, Google's quantization library for JAX.

Rounding differs in two places. Qwix divides by a scale, ``x / (amax / max)``, and this package
multiplies by its reciprocal, ``x * (max / amax)``. Each has two float32 roundings, so FP8 values
differ only if the quotient is a tie to within these roundings. The scale here is the reciprocal of
this reciprocal. With power-of-two scales, as in MXFP8, nothing is rounded and all values are equal.
"""

import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from flax_fp8.recipes import Role
from tests import oracle
from tests.recipes import cases
from tests.recipes.cases import normal

qwix = pytest.importorskip("qwix", reason="Qwix is in the test extra; this Python lacks it")

SHAPE = 64, 96
X = normal(0, *SHAPE) * 2.0 ** np.random.default_rng(9).integers(-6, 6, SHAPE).astype(np.float32)
EPSILON = np.finfo(np.float32).eps
SCALES = 1.5 * EPSILON  # two roundings here, one in Qwix


def assert_near(ours, theirs, name):
  """Asserts equal values. Neighbors are allowed if the quotient is a tie in float32."""
  scale = np.asarray(theirs.scale)
  np.testing.assert_allclose(np.broadcast_to(ours.scale, scale.shape), scale, rtol=SCALES)
  mine, their = (np.asarray(t, np.float64) for t in (ours.data, theirs.qvalue))
  values = np.array(oracle.magnitudes(name))
  for quotient, one, other in zip(
    *(t[mine != their] for t in (X / scale, mine, their)), strict=True
  ):
    low, high = sorted(map(abs, (one, other)))
    assert np.searchsorted(values, high) - np.searchsorted(values, low) == 1
    assert abs(abs(quotient) - (low + high) / 2) <= 2 * EPSILON * high
  assert np.mean(mine != their) <= 1e-4


@pytest.mark.parametrize("role", [Role.INPUT, Role.OUTPUT_GRAD], ids=lambda r: r.value)
def test_current(role):
  """One scale per tensor: ``absmax`` over all axes."""
  recipe = fp8.Float8CurrentScaling()
  name = recipe.float8(role).name
  ours, _ = cases.quantized(recipe, X, role)
  assert_near(ours, qwix.quantize(jnp.asarray(X), name), name)


@pytest.mark.parametrize("role", Role, ids=lambda r: r.value)
def test_rowwise(role):
  """``absmax`` for each channel that the GEMM keeps."""
  kept = (1, 0) if role is Role.KERNEL else (0, 1)
  for ours, axis in zip(cases.quantized(fp8.Float8RowwiseScaling(), X, role), kept, strict=True):
    theirs = qwix.quantize(jnp.asarray(X), "float8_e4m3fn", channelwise_axes=(axis,))
    assert_near(ours, theirs, "float8_e4m3fn")


def test_block():
  """Tiles of 1×128 and 128×128. Qwix does not round scales to powers of two."""
  x = jnp.asarray(normal(3, 256, 384))
  recipe = fp8.Float8BlockScaling(power_of_two=False)
  strips, _ = cases.quantized(recipe, x, Role.INPUT)
  theirs = qwix.quantize(x, "float8_e4m3fn", channelwise_axes=(0,), tiled_axes={1: 128})
  np.testing.assert_allclose(strips.scale[0].T, theirs.scale, rtol=SCALES)
  ours = np.asarray(strips.data[0], np.float32)
  assert np.mean(ours != np.asarray(theirs.qvalue, np.float32)) <= 1e-4
  _, tiles = cases.quantized(recipe, x, Role.KERNEL)
  theirs = qwix.quantize(x, "float8_e4m3fn", tiled_axes={0: 128, 1: 128})
  np.testing.assert_allclose(tiles.scale[0].T, theirs.scale, rtol=SCALES)


def test_mxfp8():
  """Tiles of 32: values and scales are equal bit for bit."""
  ours, _ = cases.quantized(fp8.MXFP8BlockScaling(), X, Role.INPUT)
  theirs = qwix.quantize(jnp.asarray(X), "mxfp8", channelwise_axes=(0,), tiled_axes={1: 32})
  np.testing.assert_array_equal(
    np.asarray(ours.data[0]).view(np.uint8), np.asarray(theirs.qvalue).view(np.uint8)
  )
  np.testing.assert_array_equal(
    np.asarray(ours.scale[0], np.float32), np.asarray(theirs.scale, np.float32)
  )
