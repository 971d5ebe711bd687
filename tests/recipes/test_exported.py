"""Every recipe in a program that ``jax.export`` exports for any batch size."""

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from tests.recipes.cases import ONE_OF_EACH_CLASS, RECIPES

WIDTH = 16
X = np.random.default_rng(0).normal(size=(32, WIDTH)).astype(np.float32)
KEY = jax.random.key(0)


def exported(run, variables, batch):
  """Returns the exported program, serialized and restored if it has only plain types."""
  shape = jax.ShapeDtypeStruct((*jax.export.symbolic_shape(batch), WIDTH), jnp.float32)
  program = jax.export.export(jax.jit(run))(variables, shape)
  return jax.export.deserialize(program.serialize())


QUICK = ("delayed",)
cases = [
  pytest.param(
    name, batch, marks=() if name in QUICK else (pytest.mark.slow, pytest.mark.exhaustive)
  )
  for name in ONE_OF_EACH_CLASS
  for batch in (("b", "32*b") if name == "delayed" else ("b",))
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "batch"), cases)
def test_any_batch_size(name, batch):
  layer = nn.Dense(WIDTH, dot_general_cls=RECIPES[name].dot_general_cls, dtype=jnp.bfloat16)
  variables = layer.init(KEY, X)
  loss = lambda variables, x: jnp.sum(jnp.square(layer.apply(variables, x).astype(jnp.float32)))
  served, frozen = fp8.freeze_for_inference(layer, variables, X)
  for run, given in ((fp8.grad(loss), variables), (served.apply, frozen)):
    got, want = exported(run, given, batch).call(given, X), jax.jit(run)(given, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-7, atol=1e-6), got, want)
