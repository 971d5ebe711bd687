"""Scales by a kernel: the bits of plain JAX, one kernel for several tensors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from flax_fp8 import formats
from flax_fp8.explain.traffic import KernelClass
from flax_fp8.kernels import scales
from flax_fp8.kernels.scales import Rule

RULES = {
  "max": Rule(),
  "power_of_two": Rule(power_of_two=True, margin=1),
  "most_recent": Rule(algo="most_recent", margin=-2.5),
}
MAXIMA = (448.0, 57344.0, 448.0, 57344.0, 448.0, 448.0, 448.0)


def tensors(length):
  """Scales and histories: ordinary, huge, tiny, empty, and with what is not finite."""
  random = np.random.default_rng(length)
  histories = [np.abs(random.normal(size=length)).astype(np.float32) for _ in MAXIMA]
  histories[1] *= np.float32(1e30)
  histories[2] *= np.float32(1e-36)
  histories[3][:] = 0
  histories[4][length // 2] = np.inf
  histories[5][0] = np.nan
  histories[6][-1] = -np.nan
  return tuple(random.uniform(0.1, 3, (len(MAXIMA), 1)).astype(np.float32)), tuple(histories)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("length", [1, 2, 5, 16])
def test_the_kernel_gives_the_bits_of_plain_jax(length, rule):
  kernel = functools.partial(scales._by_kernel, float8_maxima=MAXIMA, rule=rule, interpret=True)
  got, want = (jax.jit(f)(*tensors(length)) for f in (kernel, scales._plain(MAXIMA, rule)))
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert all(np.isfinite(scale) for pair in want for scale in pair)


def test_a_history_that_is_not_finite_keeps_the_scale():
  history = jnp.array([1.0, np.inf])
  assert float(scales.next_scale(jnp.ones(1) * 3, history, 448.0, Rule())[0][0]) == 3.0


@pytest.mark.parametrize("length", [16, 1000])
@pytest.mark.parametrize("target", ["h100", "b200"])
def test_is_one_kernel(described, target, length):
  del described  # skips where nothing can be compiled for a GPU
  scale, history = (jax.ShapeDtypeStruct((n,), jnp.float32) for n in (1, length))
  find = lambda *given: scales.next_scales(*given, (448.0, 57344.0), Rule())
  report = fp8.explain(find, (scale, scale), (history, history), target=target)
  (kernel,) = report.kernels
  assert (kernel.kind, kernel.read) == (KernelClass.ELEMENTWISE, 2 * (4 + 4 * length))
  assert not report.doubts


def test_where_the_tensor_cores_have_no_fp8_it_is_plain_jax(described):
  del described
  scale, history = (jax.ShapeDtypeStruct((n,), jnp.float32) for n in (1, 16))
  find = lambda *given: scales.next_scales(*given, (448.0,), Rule())
  assert len(fp8.explain(find, (scale,), (history,), target="a100").kernels) > 1


def test_mapped_state_is_plain_jax(described):
  """A kernel for each expert would be slower than XLA's for all of them."""
  del described
  scale, history = (jax.ShapeDtypeStruct((4, n), jnp.float32) for n in (1, 16))
  find = jax.vmap(lambda *given: scales.next_scales(*given, (formats.E4M3.max,), Rule()))
  report = fp8.explain(find, (scale,), (history,), target="h100")
  assert not any(kernel.name.startswith("pallas") for kernel in report.kernels)
