"""Fused modules, and parameters of separate layers for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import flax_fp8 as fp8

KEY = jax.random.key(0)
TOKENS, D, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 64, 48, 4, 2, 16, 80
WIDTHS = {"query": HEADS, "key": KV_HEADS, "value": KV_HEADS}
X = jnp.asarray(np.random.default_rng(99).normal(size=(TOKENS, D)), jnp.float32)
CURRENT = fp8.Float8CurrentScaling()
QKV = functools.partial(
  fp8.Fp8FusedQKV, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, emulate=True
)
SWIGLU = functools.partial(fp8.Fp8SwiGLU, hidden_features=HIDDEN, emulate=True)
SCALES = ("joint", "separate")


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def separate_qkv(bias=False, lead=(), scale=None):
  """Parameters of three ``nn.Dense``, multiplied by the factors in ``scale``."""
  made = {}
  for seed, (name, heads) in enumerate(WIDTHS.items()):
    factor = (scale or {}).get(name, 1.0) / np.sqrt(D)
    made[name] = {"kernel": normal(seed, *lead, D, heads * HEAD_DIM) * factor}
    if bias:
      made[name]["bias"] = normal(seed + 10, *lead, heads * HEAD_DIM)
  return made


def separate_swiglu(lead=()):
  shapes = {"gate": (D, HIDDEN), "up": (D, HIDDEN), "down": (HIDDEN, D)}
  return {
    name: {"kernel": normal(seed, *lead, *shape) / 8}
    for seed, (name, shape) in enumerate(shapes.items())
  }


def with_heads(separate):
  """The same parameters in the shapes of ``nn.DenseGeneral``."""
  return jax.tree.map(lambda x: x.reshape(*x.shape[:-1], -1, HEAD_DIM), separate)


def float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def init(module):
  return jax.eval_shape(module.init, KEY, X)
