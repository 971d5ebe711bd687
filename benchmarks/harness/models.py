"""The models of the benchmarks: a layer, an MLP, a Llama block, stacks of them, a decoder."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import flax_fp8 as fp8
from harness.variants import Variant
from lm import model as lm
from lm.config import ModelShape

# "mix" is elementwise and stands for attention where only the projections are of interest.
Mixer: TypeAlias = Literal["cudnn", "xla", "mix"]
ATTENTION = "attention"  # a module's name: its GEMMs are BF16 in every variant


def dense(features: int, variant: Variant, name: str | None = None) -> nn.Dense:
  """A layer without bias that computes in bfloat16."""
  cls = variant.dot_general_cls
  return nn.Dense(features, use_bias=False, dot_general_cls=cls, name=name, **variant.dtypes)


class Heads(nn.Module):
  """Query, key and value: three layers, or one fused layer."""

  shape: ModelShape
  variant: Variant

  @nn.compact
  def __call__(self, x: jax.Array) -> Any:
    """Takes ``[..., width]``; fused layers of a recipe return heads ``[..., heads, head_dim]``."""
    shape, variant = self.shape, self.variant
    widths = {name: shape.projections[name][1] for name in ("query", "key", "value")}
    if variant.fused is None:
      return tuple(dense(width, variant, name)(x) for name, width in widths.items())
    if variant.recipe is None:
      joint = dense(sum(widths.values()), variant, "qkv")(x)
      return tuple(jnp.split(joint, [widths["query"], widths["query"] + widths["key"]], axis=-1))
    counts = {"num_heads": shape.heads, "num_kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
    options: Any = {"recipe": variant.recipe, "kernel_scales": variant.fused, **variant.dtypes}
    return fp8.Fp8FusedQKV(**counts, use_bias=False, name="qkv", **options)(x)


class SwiGLU(nn.Module):
  """``down(silu(gate(x)) * up(x))``; ``gate`` and ``up`` are two layers, or one fused layer."""

  shape: ModelShape
  variant: Variant

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    hidden, variant = self.shape.d_ff, self.variant
    if variant.fused is not None and variant.recipe is not None:
      options: Any = {"recipe": variant.recipe, "kernel_scales": variant.fused, **variant.dtypes}
      return fp8.Fp8SwiGLU(hidden_features=hidden, name="mlp", **options)(x)
    if variant.fused is not None:
      gate, up = jnp.split(dense(2 * hidden, variant, "gate_up")(x), 2, axis=-1)
    else:
      gate, up = (dense(hidden, variant, name)(x) for name in ("gate", "up"))
    return dense(self.shape.d_model, variant, "down")(fp8.swiglu(gate, up))


class Attention(nn.Module):
  """Causal attention with rotary positions, or ``mix``."""

  shape: ModelShape
  mixer: Mixer

  def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    if self.mixer == "mix":
      wide = lambda x: jnp.tile(x, (1, self.shape.heads // self.shape.kv_heads))
      return jnp.tanh(query * wide(key)) * wide(value)
    split = (*query.shape[:2], -1, self.shape.head_dim)
    query, key, value = (x.reshape(split) for x in (query, key, value))
    heads = lm.rotate(query), lm.rotate(key), value
    out = jax.nn.dot_product_attention(*heads, is_causal=True, implementation=self.mixer)
    return out.reshape(*out.shape[:2], -1)


class Block(nn.Module):
  """A pre-norm Llama block, all in bfloat16, as a step of a scan."""

  shape: ModelShape
  variant: Variant
  mixer: Mixer

  @nn.compact
  def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
    shape, variant = self.shape, self.variant
    norm = lambda name: nn.RMSNorm(name=name, **variant.dtypes)
    heads = Heads(shape, variant, name="heads")(norm("before_attention")(x))
    mixed = Attention(shape, self.mixer, name=ATTENTION)(*heads)
    x = x + dense(shape.d_model, variant, "out")(mixed)
    return x + SwiGLU(shape, variant, name="swiglu")(norm("before_mlp")(x)), None


class Mlp(nn.Module):
  """``x + down(relu(up(norm(x))))`` of widths 2048 and 8192, as a step of a scan."""

  variant: Variant

  @nn.compact
  def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
    y = nn.relu(dense(8192, self.variant, "up")(nn.RMSNorm(**self.variant.dtypes)(x)))
    return x + dense(2048, self.variant, "down")(y), None


class Stack(nn.Module):
  """Blocks of a class, unrolled or under ``nn.scan``, from one array to one array."""

  block: Any
  arguments: tuple[Any, ...]  # of the class
  length: int = 1
  scan: bool = False
  remat: bool = False
  policy: Callable[..., Any] | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    block = self.block
    if self.remat:
      block = nn.remat(block, prevent_cse=not self.scan, policy=self.policy)
    if self.scan:
      layers = fp8.scan(block, {"params": 0}, split_rngs={"params": True}, length=self.length)
      return layers(*self.arguments, name="layers")(x, None)[0]
    for _ in range(self.length):
      x, _ = block(*self.arguments)(x, None)
    return x


class SplitBlock(nn.Module):
  """A block of a class; with ``split``, its residual stream is sharded along the batch."""

  block: Any
  arguments: tuple[Any, ...]  # of the class
  split: bool

  @nn.compact
  def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
    if self.split:
      x = jax.lax.with_sharding_constraint(x, PartitionSpec("data"))
    return self.block(*self.arguments, name="block")(x, None)


class Decoder(nn.Module):
  """A decoder of blocks of a class, from tokens ``[B, T]`` to float32 logits."""

  shape: ModelShape
  block: Any
  arguments: tuple[Any, ...]  # of the class
  scan: bool
  split: bool = False

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    shape = self.shape
    x = nn.Embed(shape.vocabulary, shape.d_model, dtype=jnp.bfloat16, name="embedding")(tokens)
    arguments = (self.block, self.arguments, self.split)
    how: Any = {
      "scan": self.scan,
      "remat": shape.remat,
      "policy": fp8.remat_policies.save_fp8_scales,
    }
    x = Stack(SplitBlock, arguments, shape.layers, **how, name="layers")(x)
    head = nn.Dense(shape.vocabulary, use_bias=False, dtype=jnp.bfloat16, name="head")
    return head(nn.RMSNorm(dtype=jnp.bfloat16)(x)).astype(jnp.float32)
