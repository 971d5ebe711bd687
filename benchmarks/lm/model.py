"""A Llama-like decoder in Flax Linen. One argument decides between BF16 and FP8.

    Transformer(shape)                                           # BF16
    Transformer(shape, dot_general_cls=recipe.dot_general_cls)   # FP8

FP8 covers the projections of each layer (q, k, v, o; gate, up, down), forward and backward. The
embedding, norms, attention scores and output head stay in ``dtype``, and parameters in float32.
With ``fused=recipe``, one GEMM computes q, k and v, and another gate and up.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import flax_fp8 as fp8
from lm.config import ModelShape


def rotate(x: jax.Array, base: float = 10_000.0) -> jax.Array:
  """Rotates each pair ``(x[i], x[i + D/2])`` at position t by the angle ``t * base**(-2i/D)``."""
  length, half = x.shape[1], x.shape[-1] // 2
  speed = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = jnp.outer(jnp.arange(length, dtype=jnp.float32), speed)[None, :, None, :]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  turned = (first * cos - second * sin, second * cos + first * sin)
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def norm(name: str, dtype: Any) -> nn.RMSNorm:
  return nn.RMSNorm(dtype=dtype, name=name)


def fused_qkv(
  shape: ModelShape, recipe: fp8.Recipe, name: str | None = None, dtype: Any = jnp.bfloat16
) -> fp8.Fp8FusedQKV:
  sizes: dict[str, Any] = {"num_heads": shape.heads, "num_kv_heads": shape.kv_heads}
  sizes |= {"head_dim": shape.head_dim, "dtype": dtype, "recipe": recipe}
  return fp8.Fp8FusedQKV(**sizes, use_bias=False, name=name)


def fused_swiglu(
  shape: ModelShape, recipe: fp8.Recipe, name: str | None = None, dtype: Any = jnp.bfloat16
) -> fp8.Fp8SwiGLU:
  return fp8.Fp8SwiGLU(hidden_features=shape.d_ff, dtype=dtype, recipe=recipe, name=name)


def fuse_params(params: Mapping[str, Any], shape: ModelShape, recipe: fp8.Recipe) -> dict[str, Any]:
  """Converts the parameters of separate projections to those of fused ones."""
  layers = dict(params["layers"])
  take = lambda *names: {name: layers.pop(name) for name in names}
  qkv = fused_qkv(shape, recipe).from_separate(take("query", "key", "value"))
  swiglu = fused_swiglu(shape, recipe).from_separate(take("gate", "up", "down"))
  return {**params, "layers": {**layers, "qkv": qkv, "swiglu": swiglu}}


class Block(nn.Module):
  """``x + attention(norm(x))``, then ``x + swiglu(norm(x))``."""

  shape: ModelShape
  dot_general_cls: Any = None  # makes the projections' GEMMs; None for BF16
  fused: fp8.Recipe | None = None  # of fused projections; None for separate layers
  dtype: Any = jnp.bfloat16  # of activations

  def project(self, x: jax.Array, features: int, name: str) -> jax.Array:
    """Multiplies by a ``[D, features]`` kernel. Only here does FP8 enter the model."""
    cls = self.dot_general_cls
    return nn.Dense(features, use_bias=False, dtype=self.dtype, dot_general_cls=cls, name=name)(x)

  def project_heads(self, x: jax.Array) -> tuple[jax.Array, ...]:
    """Query, key and value ``[B, T, heads, head_dim]``."""
    if self.fused is not None:
      return fused_qkv(self.shape, self.fused, "qkv", self.dtype)(x)
    heads = {"query": self.shape.heads, "key": self.shape.kv_heads, "value": self.shape.kv_heads}
    return tuple(
      self.project(x, count * self.shape.head_dim, name).reshape(*x.shape[:2], count, -1)
      for name, count in heads.items()
    )

  def attend(self, x: jax.Array) -> jax.Array:
    """Causal grouped-query attention over ``[B, T, D]``."""
    query, key, value = self.project_heads(x)
    heads = (rotate(query), rotate(key), value)
    attention = self.shape.attention
    if self.dtype == jnp.float16 and attention == "xla":
      # For float16 heads, JAX asks XLA for an algorithm that no CPU has (F16_F16_F32).
      heads = tuple(head.astype(jnp.float32) for head in heads)
    mixed = jax.nn.dot_product_attention(*heads, is_causal=True, implementation=attention)
    return self.project(mixed.astype(self.dtype).reshape(*x.shape), self.shape.d_model, "out")

  def swiglu(self, x: jax.Array) -> jax.Array:
    """``(silu(x @ gate) * (x @ up)) @ down`` over ``[B, T, D]``."""
    if self.fused is not None:
      return fused_swiglu(self.shape, self.fused, "swiglu", self.dtype)(x)
    gate = self.project(x, self.shape.d_ff, "gate")
    up = self.project(x, self.shape.d_ff, "up")
    return self.project(fp8.swiglu(gate, up), self.shape.d_model, "down")

  @nn.compact
  def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
    """Takes and returns the residual stream, in the form that ``nn.scan`` carries."""
    x = x + self.attend(norm("attention_norm", self.dtype)(x))
    x = x + self.swiglu(norm("swiglu_norm", self.dtype)(x))
    return x, None


class Transformer(nn.Module):
  """Tokens ``[B, T]`` to float32 logits ``[B, T, vocabulary]``; fields as ``Block``."""

  shape: ModelShape
  dot_general_cls: Any = None
  fused: fp8.Recipe | None = None
  dtype: Any = jnp.bfloat16

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    vocabulary, d_model = self.shape.vocabulary, self.shape.d_model
    x = nn.Embed(vocabulary, d_model, dtype=self.dtype, name="embedding")(tokens)
    x, _ = self.layers()(x, None)
    x = norm("final_norm", self.dtype)(x)
    head = nn.Dense(vocabulary, use_bias=False, dtype=self.dtype, name="head")
    return head(x).astype(jnp.float32)

  def layers(self) -> nn.Module:
    """Stacks the blocks on a leading axis; each layer has its own kernels and FP8 state."""
    policy = fp8.remat_policies.save_fp8_scales  # a few bytes; none without FP8
    block = nn.remat(Block, prevent_cse=False, policy=policy) if self.shape.remat else Block
    return nn.scan(
      block,
      variable_axes={"params": 0, fp8.OVERWRITE_WITH_GRADIENT: 0},
      split_rngs={"params": True},
      length=self.shape.layers,
    )(self.shape, self.dot_general_cls, self.fused, self.dtype, name="layers")
