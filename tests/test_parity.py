"""Twenty training steps in float32 equal ``flax.linen.fp8_ops`` bit for bit, where it is correct.

There is one exception. For some outputs, ``jnp.einsum`` passes the operands to Flax's module in
reverse order, and its variables ``input_*`` then describe the kernel. The values are the same.
"""

import functools
from typing import Any

import flax.linen as nn
import flax.linen.fp8_ops as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_fp8 import fp8_ops

OWG = fp8_ops.OVERWRITE_WITH_GRADIENT
STEPS = 20
# Optimized, as users compile. Without optimizations, JAX 0.8.1 sometimes rounds a quotient
# differently in the two programs.
AS_USERS = {"xla_backend_optimization_level": 3}


class Einsum(nn.Module):
  """One einsum of an input and a parameter."""

  ops: Any
  equation: str
  shape: tuple[int, ...]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    w = self.param("w", nn.initializers.normal(0.1), self.shape)
    return self.ops.Fp8Einsum(amax_history_length=8, name="dot")(self.equation, x, w)


def dense(ops):
  return nn.Dense(32, dot_general_cls=lambda: ops.Fp8DotGeneral(amax_history_length=8, name="dot"))


def dense_general(ops):
  cls = lambda: ops.Fp8DotGeneral(amax_history_length=8, name="dot")
  return nn.DenseGeneral((4, 8), axis=(-2, -1), dot_general_cls=cls)


def dense_batched(ops):
  cls = lambda: ops.Fp8DotGeneral(amax_history_length=8, name="dot")
  return nn.DenseGeneral(8, batch_dims=(0,), dot_general_cls=cls)


EQUATIONS = {
  "ebk,ekn->ebn": ((3, 8, 32), (3, 32, 16)),
  "bhqd,bhkd->bhqk": ((2, 3, 16, 32), (2, 3, 16, 32)),
  "BSEM,EMH->EBSH": ((2, 8, 4, 16), (4, 16, 32)),
  "mkl,lkn->mn": ((16, 8, 4), (4, 8, 16)),
  "amk,kn->mn": ((3, 16, 32), (32, 16)),
  "mk,kn->nm": ((32, 48), (48, 16)),
  "bmk,bkn->mbn": ((2, 32, 48), (2, 48, 16)),
}
EXCHANGED = {"mk,kn->nm", "bmk,bkn->mbn"}

CASES = {
  "Dense": (dense, (4, 6, 48)),
  "DenseGeneral": (dense_general, (5, 6, 16)),
  "DenseGeneral, batched": (dense_batched, (3, 6, 16)),
} | {
  equation: ((lambda ops, e=equation, w=w: Einsum(ops, e, w)), x)
  for equation, (x, w) in EQUATIONS.items()
}


def trajectory(make, ops, x):
  """Returns loss, output, gradients and variables of every step of gradient descent."""
  module = make(ops)
  variables = jax.jit(module.init)(jax.random.key(0), x)

  @functools.partial(jax.jit, compiler_options=AS_USERS)
  def step(variables, batch):
    out, vjp = jax.vjp(module.apply, variables, batch)
    return out, vjp(jnp.sin(batch.size * out))

  steps = []
  for i in range(STEPS):
    out, grads = jax.device_get(step(variables, x * np.float32(1 + 0.5 * np.sin(i))))
    # NumPy updates the parameters, so that no compiler fuses the update with one of the programs.
    descend = lambda p, g: p - np.float32(0.01) * g
    params = jax.tree.map(descend, variables["params"], grads[0]["params"])
    variables = jax.device_get({"params": params, OWG: grads[0][OWG]})
    steps.append((variables, out, grads))
  return steps


def exchange(steps):
  """Renames input to kernel and kernel to input."""
  other = {"input": "kernel", "kernel": "input", "output": "output"}

  def rename(tree):
    if not isinstance(tree, dict):
      return tuple(map(rename, tree)) if isinstance(tree, tuple) else tree
    if "input_scale" not in tree:
      return {key: rename(value) for key, value in tree.items()}
    return {
      "_".join([other[key.split("_", 1)[0]], key.split("_", 1)[1]]): value
      for key, value in tree.items()
    }

  return [rename(step) for step in steps]


@pytest.mark.parametrize("name", CASES)
def test_twenty_steps(name):
  make, shape = CASES[name]
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  ours, theirs = trajectory(make, fp8_ops, x), trajectory(make, reference, x)
  if name in EXCHANGED:
    theirs = exchange(theirs)
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  scale = ours[-1][0][OWG]["dot"]["input_scale"]
  assert 0 < float(scale[0]) < 1, "the scale never moved: the comparison would show nothing"
