"""Rematerialization policies: gradients stay equal, and the expected values are recomputed."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from flax_fp8 import remat_policies

RECIPE = fp8.DelayedScaling(amax_history_len=3)
JAX = jax.checkpoint_policies
# GEMMs in a block's forward and backward pass: three for each layer, plus those recomputed.
POLICIES = {
  "none": (None, 6),
  "nothing": (JAX.nothing_saveable, 7),
  "JAX's dots": (JAX.dots_saveable, 7),
  "dots": (remat_policies.dots_saveable, 6),
  "dots, no batch": (remat_policies.dots_with_no_batch_dims_saveable, 6),
  "inputs": (remat_policies.save_fp8_inputs, 7),
  "scales": (remat_policies.save_fp8_scales, 7),
  "everything": (JAX.everything_saveable, 6),
}


class Block(nn.Module):
  """A residual MLP. The gradient needs the result of its first GEMM, but not of its second."""

  dtype: object = jnp.float32

  @nn.compact
  def __call__(self, x):
    layer = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype, param_dtype=self.dtype)
    cls = RECIPE.dot_general_cls
    y = nn.silu(layer(128, dot_general_cls=cls, name="up")(x))
    return x + layer(x.shape[-1], dot_general_cls=cls, name="down")(y)


class Model(nn.Module):
  """A block under a remat policy. The layers around it need its gradients."""

  policy: object
  dtype: object = jnp.float32

  @nn.compact
  def __call__(self, x):
    block = Block if self.policy is None else nn.remat(Block, policy=self.policy)
    return jnp.tanh(block(self.dtype, name="block")(jnp.sin(x)))


def step(model, variables, x):
  loss = lambda v, x: jnp.mean(jnp.square(model.apply(v, x).astype(jnp.float32)))
  return fp8.value_and_grad(loss, argnums=(0, 1))(variables, x)


@pytest.fixture(scope="module")
def without_remat():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 64)), jnp.float32)
  variables = jax.jit(Model(None).init)(jax.random.key(0), x)
  return variables, x, jax.jit(functools.partial(step, Model(None)))(variables, x)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "none"])
def test_gradients_and_state_are_those_without_remat(policy, without_remat):
  variables, x, want = without_remat
  got = jax.jit(functools.partial(step, Model(POLICIES[policy][0])))(variables, x)
  chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-7)


FAST = ("JAX's dots", "dots")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("policy", "gemms"),
  [
    pytest.param(
      *case, id=name, marks=[] if name in FAST else (pytest.mark.slow, pytest.mark.exhaustive)
    )
    for name, case in POLICIES.items()
  ],
)
def test_what_is_computed_again(described, policy, gemms):
  del described
  model = Model(policy, jnp.bfloat16)
  x = jax.ShapeDtypeStruct((256, 64), jnp.bfloat16)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  report = fp8.explain(functools.partial(step, model), variables, x, target="h100")
  assert report.fp8_gemms == report.total_gemms == gemms


@pytest.mark.parametrize("name", ["current", "rowwise"])
def test_saved_amaxes_are_not_computed_again(described, name):
  del described
  moved = {}
  for policy in ("nothing", "scales"):
    block = nn.remat(nn.Dense, policy=POLICIES[policy][0])
    cls = fp8.get_recipe(name).dot_general_cls
    layer = block(1024, use_bias=False, dtype=jnp.bfloat16, dot_general_cls=cls)
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    loss = lambda v, x, layer=layer: jnp.mean(jnp.square(layer.apply(v, x).astype(jnp.float32)))
    report = fp8.explain(jax.grad(loss, (0, 1)), variables, x, target="h100")
    moved[policy] = report.bytes_outside_gemms
  # The kernel in float32 and the input in bfloat16 are read once less for their amaxes, which are
  # written and read instead.
  assert moved["nothing"] - moved["scales"] > 0.99 * 2**20 * (4 + 2)
