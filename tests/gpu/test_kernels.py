"""Kernels on the card: the bits of plain JAX, there and on the CPU."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from flax_fp8.kernels import cast, choice, scales
from tests.kernels import test_cast, test_scales

CPU = jax.devices("cpu")[0]
# GEMMs that are chosen by trial may differ from program to program, and so may their bits.
SAME_GEMMS = {"xla_gpu_autotune_level": 0}


def test_kernels_run_here():
  assert choice.available()


def run_on_cpu(fun, *args):
  with jax.default_device(CPU):
    return jax.jit(fun)(*jax.device_put(args, CPU))


@pytest.mark.parametrize("rule", test_scales.RULES.values(), ids=test_scales.RULES)
@pytest.mark.parametrize("length", [1, 2, 16, 1000, 1024])
def test_scales_are_the_bits_of_plain_jax(length, rule):
  given = test_scales.tensors(length)
  plain = scales._plain(test_scales.MAXIMA, rule)
  kernel = functools.partial(scales._by_kernel, float8_maxima=test_scales.MAXIMA, rule=rule)
  got = jax.jit(kernel)(*given)
  chex.assert_trees_all_equal(got, jax.jit(plain)(*given))
  chex.assert_trees_all_close(got, run_on_cpu(plain, *given), rtol=1e-6)


SHAPES = [(32, 48), (64, 64), (16, 4096), (8192, 128), (1024, 3072)]


@pytest.mark.parametrize("special", [[], test_cast.SPECIAL], ids=["finite", "special"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("float8", test_cast.FORMATS.values(), ids=test_cast.FORMATS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_casts_are_the_bits_of_plain_jax(dtype, float8, shape, special):
  x, scale = test_cast.values(shape, dtype, special), jnp.float32(0.37)
  given = (x, scale, 1 / scale, jnp.zeros(4))
  views = test_cast.views(1, 2)
  kernel = functools.partial(cast._by_kernel, float8=float8, split=1, views=views)
  plain = functools.partial(cast._plain, float8=float8)
  got = jax.jit(kernel)(*given)
  for want in (jax.jit(plain)(*given), run_on_cpu(plain, *given)):
    for ours, theirs in zip(got[:2], want[:2], strict=True):
      ours, theirs = np.asarray(ours), np.asarray(theirs)
      is_nan = np.isnan(theirs.astype(np.float32))
      np.testing.assert_array_equal(np.isnan(ours.astype(np.float32)), is_nan)
      np.testing.assert_array_equal(ours.view(np.uint8)[~is_nan], theirs.view(np.uint8)[~is_nan])
    np.testing.assert_array_equal(np.asarray(got[2]), np.asarray(want[2]))


@pytest.mark.parametrize("which", ["auto", "all"])
def test_a_step_has_the_bits_of_plain_jax(which):
  x, kernel, grad = (
    test_cast.values(shape, jnp.bfloat16) / 300 for shape in ((512, 256), (256, 384), (512, 384))
  )
  state = fp8.ops.init_state(fp8.DelayedScaling(amax_history_len=4))
  found = []
  for each in ("off", which):
    with fp8.use_kernels(each):
      step = jax.jit(test_cast.step, compiler_options=SAME_GEMMS)
      out, (dx, dkernel, new) = step(x, kernel, state, grad)
      found.append((out, dx, dkernel, new, step(x, kernel, new, grad)))
  chex.assert_trees_all_equal(found[1], found[0])
