"""Casts on the card: the bits of the CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_fp8 import formats
from flax_fp8.quantize import quantize

FORMATS = {"E4M3": formats.E4M3, "E5M2": formats.E5M2}
SPECIAL = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, 1e4, -1e4, 6e4, 2**-9, 2**-10]


def values(shape, dtype, special):
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32) * 300
  x.reshape(-1)[: len(special)] = special
  return jnp.asarray(x, dtype)


@pytest.mark.parametrize("special", [[], SPECIAL], ids=["finite", "special"])
@pytest.mark.parametrize("shape", [(64, 64), (16, 4096), (8192, 128)], ids=str)
@pytest.mark.parametrize("float8", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_casts_are_the_bits_of_the_cpu(dtype, float8, shape, special):
  scale = jnp.float32(0.37)
  given = values(shape, dtype, special), scale, 1 / scale
  cast = functools.partial(_cast, float8=float8)
  got, want = (
    np.asarray(jax.jit(cast)(*jax.device_put(given, jax.devices(backend)[0])))
    for backend in ("gpu", "cpu")
  )
  is_nan = np.isnan(want.astype(np.float32))
  np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), is_nan)
  np.testing.assert_array_equal(got.view(np.uint8)[~is_nan], want.view(np.uint8)[~is_nan])


def _cast(x, scale, inverse, *, float8):
  return quantize(x, scale, float8, inverse, None, stale=True).data
