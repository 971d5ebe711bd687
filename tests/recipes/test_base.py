"""The recipe interface supports scales that are not per tensor, and recipes without state.

A recipe defined here, with one scale per row along each GEMM's contraction, works in contractions,
modules and transformations.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import flax_fp8 as fp8
from flax_fp8 import formats, ops
from flax_fp8.products import scaled_matrices
from flax_fp8.quantize import QTensor
from flax_fp8.recipes import Needs, Recipe, Role

DIMS = (((1,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class PerRow(Recipe):
  """One scale for all values that a GEMM sums together, without state."""

  needs = Needs(fp8.Format.HYBRID)

  def init_state(self, role):
    return {}

  def quantize(self, x, state, role, views, key=None, *, observed=True):
    float8 = formats.E5M2 if role is Role.OUTPUT_GRAD else formats.E4M3
    return tuple(self.by_row(x, view.contracting, float8) for view in views), state

  def by_row(self, x, axes, float8):
    scale = jnp.max(jnp.abs(x), axis=axes, keepdims=True) / float8.max
    return QTensor((x / scale).astype(float8.dtype), scale)

  def in_matrices(self, q, view):
    return scaled_matrices(q, view)

  def contract(self, lhs, rhs, gemm, kind, dtype):
    multiply = lambda x, y: lax.dot_general(
      x, y, gemm.dimension_numbers, preferred_element_type=jnp.float32
    )
    out = multiply(lhs.data, rhs.data) * multiply(lhs.scale, rhs.scale)
    return lax.transpose(out, gemm.permutation).astype(dtype)


def outlier_rows():
  """Makes rows with magnitudes that differ by 2**20. One scale would flush most rows to zero."""
  random = np.random.default_rng(0)
  x = random.normal(size=(8, 32)) * 2.0 ** np.linspace(-10, 10, 8)[:, None]
  w = random.normal(size=(32, 16)) * 2.0 ** np.linspace(10, -10, 16)
  return jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)


def test_a_scale_for_each_gemm():
  x, w = outlier_rows()
  f = lambda x, w: ops.dot_general(x, w, DIMS, recipe=PerRow(), state={r.value: {} for r in Role})
  out, vjp = jax.vjp(f, x, w)
  g = jnp.ones_like(out)
  want, want_vjp = jax.vjp(lambda x, w: x @ w, x, w)
  for got, exact, axis in zip((out, *vjp(g)), (want, *want_vjp(g)), (1, 1, 0), strict=True):
    error = jnp.linalg.norm(got - exact, axis=axis) / jnp.linalg.norm(exact, axis=axis)
    assert float(jnp.max(error)) < formats.E5M2.epsilon


@pytest.mark.parametrize("wrap", [lambda m: m, nn.remat], ids=["plain", "remat"])
def test_without_state_there_are_no_variables(wrap):
  x, _ = outlier_rows()
  layer = wrap(nn.Dense)(4, dot_general_cls=PerRow().dot_general_cls)
  variables = layer.init(jax.random.key(0), x)
  assert set(variables) == {"params"}
  grads = jax.jit(fp8.grad(lambda v: jnp.sum(jnp.sin(layer.apply(v, x)))))(variables)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


def test_recipes_are_abstract():
  with pytest.raises(TypeError, match=r"abstract"):
    Recipe()
