"""Linen models without any FP8 code, as users write them.

Each case is a model, what its ``init`` takes, and a config if the default does not take all that
there is; ``fp8_layers`` are the paths at which state is expected.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax

import flax_fp8 as fp8

D, F = 16, 32


@functools.cache
def normal(*shape):
  return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


class Mlp(nn.Module):
  """A compact module with a named and an unnamed layer."""

  features: int = D
  dtype: Any = None

  @nn.compact
  def __call__(self, x):
    x = nn.gelu(nn.Dense(F, dtype=self.dtype)(x))
    return nn.Dense(self.features, use_bias=False, dtype=self.dtype, name="down")(x)


class AutoEncoder(nn.Module):
  """A module with ``setup`` and several methods."""

  def setup(self):
    self.encoder = nn.Sequential([nn.Dense(F), nn.relu, nn.Dense(D)])
    self.decoders = [nn.Dense(F), nn.Dense(D)]

  def __call__(self, x):
    return self.decode(self.encode(x))

  def encode(self, x):
    return self.encoder(x)

  def decode(self, z):
    for layer in self.decoders:
      z = layer(z)
    return z


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return x + Mlp(name="mlp")(nn.LayerNorm()(x)), None


class Scanned(nn.Module):
  """Rematted blocks under nn.scan, with only params in its arguments."""

  layers: int = 3

  @nn.compact
  def __call__(self, x):
    stack = nn.scan(
      nn.remat(Block),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.layers,
    )
    x, _ = stack(name="layers")(x, None)
    return nn.Dense(F, name="head")(x)


class Remat(nn.Module):
  """nn.remat of a class and of a method."""

  @nn.compact
  def __call__(self, x):
    x = nn.remat(Mlp)(name="first")(x)
    return self.second(x)

  @nn.remat
  def second(self, x):
    return nn.Dense(D, name="second")(x)


class Ensemble(nn.Module):
  """Four members under nn.vmap with separate kernels, and one shared layer."""

  @nn.compact
  def __call__(self, x):
    members = nn.vmap(
      Mlp, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=4
    )
    y = members(name="members")(x)
    shared = nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False})
    return shared(D, name="shared")(y)


class Shared(nn.Module):
  """One layer that is called three times, and one that two modules share."""

  @nn.compact
  def __call__(self, x):
    layer = nn.Dense(D, name="layer")
    for _ in range(3):
      x = jnp.tanh(layer(x))
    common = nn.Dense(D, name="common")
    return Uses(common, name="a")(x) + Uses(common, name="b")(2 * x)


class Uses(nn.Module):
  layer: nn.Module

  @nn.compact
  def __call__(self, x):
    return nn.Dense(D)(self.layer(x))


class EncoderDecoder(nn.Module):
  """Attention over an encoded source, causal attention with a cache, tied embeddings."""

  vocabulary: int = 32
  decode: bool = False

  def setup(self):
    self.embedding = nn.Embed(self.vocabulary, D)
    attention = functools.partial(nn.MultiHeadDotProductAttention, num_heads=2, qkv_features=F)
    self.encoder_attention = attention()
    self.self_attention = attention(decode=self.decode)
    self.cross_attention = attention()
    self.mlp = Mlp()
    self.norm = nn.LayerNorm()

  def encode(self, source):
    x = self.embedding(source)
    return x + self.encoder_attention(x, x)

  def decode_step(self, encoded, target):
    y = self.embedding(target)
    mask = None if self.decode else nn.make_causal_mask(target)
    y = y + self.self_attention(y, y, mask=mask)
    y = y + self.cross_attention(self.norm(y), encoded)
    return self.embedding.attend(y + self.mlp(y))

  def __call__(self, source, target):
    return self.decode_step(self.encode(source), target)


class Moe(nn.Module):
  """Experts in one einsum, and a router that must stay in high precision."""

  experts: int = 4

  @nn.compact
  def __call__(self, x):
    weights = nn.softmax(nn.Dense(self.experts, name="router")(x))
    up = self.param("up", nn.initializers.lecun_normal(), (self.experts, D, F))
    down = self.param("down", nn.initializers.lecun_normal(), (self.experts, F, D))
    hidden = nn.gelu(jnp.einsum("bsd,edf->ebsf", x, up))
    out = jnp.einsum("ebsf,efd->ebsd", hidden, down)
    return jnp.sum(out * jnp.moveaxis(weights, -1, 0)[..., None], axis=0)


class MoeModel(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Einsum((D, 2, D), "bsd,dnh->bsnh", name="heads")(x).sum(-2)
    return Moe(name="moe")(x)


class ConvNet(nn.Module):
  """Convolutions, batch statistics, dropout, then dense layers."""

  @nn.compact
  def __call__(self, image, train=False):
    x = nn.Conv(D, (3, 3))(image)
    x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
    x = x.mean((1, 2))
    x = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(F)(x)))
    return nn.Dense(10, name="classifier")(x)


def blocked_dot_general(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None):
  """A custom dot_general."""
  return lax.dot_general(
    lhs, rhs, dimension_numbers, precision, preferred_element_type=preferred_element_type
  )


class Custom(nn.Module):
  """A layer with its own dot_general, and a module with ``setup`` and its own contraction."""

  def setup(self):
    self.own = nn.Dense(D, dot_general=blocked_dot_general)
    self.exact = nn.Dense(D, precision="highest")
    self.factors = Factors()

  def __call__(self, x):
    return self.factors(self.exact(self.own(x)))


class Factors(nn.Module):
  def setup(self):
    make = nn.initializers.lecun_normal()
    self.left = self.param("left", make, (D, F))
    self.right = self.param("right", make, (F, D))

  def __call__(self, x):
    return self.contract(self.contract(x, self.left), self.right)

  def contract(self, x, kernel):
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


class Recurrent(nn.Module):
  """A cell that nn.RNN scans over time with shared kernels."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(D, name="project")(nn.RNN(nn.GRUCell(D), name="rnn")(x))


class Jitted(nn.Module):
  """nn.jit, with its cache of compiled functions."""

  @nn.compact
  def __call__(self, x):
    return nn.jit(Mlp)(name="jitted")(x)


class Partitioned(nn.Module):
  """Boxed parameters with axis names."""

  @nn.compact
  def __call__(self, x):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    stack = nn.scan(
      Sliced,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=2,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return stack(init, name="layers")(x, None)[0]


class Sliced(nn.Module):
  init: Any

  @nn.compact
  def __call__(self, x, _):
    return nn.Dense(D, kernel_init=self.init)(x), None


class Branches(nn.Module):
  """nn.cond and nn.while_loop."""

  @nn.compact
  def __call__(self, x):
    wide, narrow = nn.Dense(D, name="wide"), nn.Dense(D, name="narrow")
    if self.is_initializing():
      wide(x), narrow(x)
    return nn.cond(x.sum() > 0, lambda _, x: wide(x), lambda _, x: narrow(x), self, x)


@dataclasses.dataclass(frozen=True)
class Case:
  """A model and the expected FP8 layers of its converted module."""

  model: nn.Module
  args: tuple[Any, ...]
  fp8_layers: tuple[str, ...]
  config: fp8.Fp8Config = dataclasses.field(default_factory=fp8.Fp8Config)

  @property
  def converted(self):
    return fp8.fp8_linear_layers(self.model, self.config)


TOKENS = np.arange(8).reshape(2, 4) % 7
ATTENTIONS = [
  f"{name}_attention/{part}/Fp8DotGeneral_0"
  for name in ("encoder", "self", "cross")
  for part in ("query", "key", "value", "out")
]

CASES = {
  "compact": Case(Mlp(), (normal(4, D),), ("Dense_0/Fp8DotGeneral_0", "down/Fp8DotGeneral_0")),
  "bfloat16": Case(
    Mlp(dtype=jnp.bfloat16),
    (normal(4, D),),
    ("Dense_0/Fp8DotGeneral_0", "down/Fp8DotGeneral_0"),
  ),
  "setup": Case(
    AutoEncoder(),
    (normal(4, D),),
    tuple(
      f"{name}/Fp8DotGeneral_0"
      for name in ("encoder/layers_0", "encoder/layers_2", "decoders_0", "decoders_1")
    ),
  ),
  "scanned": Case(
    Scanned(),
    (normal(4, D),),
    tuple(f"layers/mlp/{name}/Fp8DotGeneral_0" for name in ("Dense_0", "down")),
  ),
  "remat": Case(
    Remat(),
    (normal(4, D),),
    tuple(f"{name}/Fp8DotGeneral_0" for name in ("first/Dense_0", "first/down", "second")),
  ),
  "vmapped": Case(
    Ensemble(),
    (normal(4, D),),
    tuple(f"{name}/Fp8DotGeneral_0" for name in ("members/Dense_0", "members/down", "shared")),
  ),
  "shared": Case(
    Shared(),
    (normal(4, D),),
    tuple(f"{name}/Fp8DotGeneral_0" for name in ("layer", "common", "a/Dense_0", "b/Dense_0")),
  ),
  "encoder_decoder": Case(
    EncoderDecoder(),
    (TOKENS, TOKENS[:, ::-1]),
    (*ATTENTIONS, "mlp/Dense_0/Fp8DotGeneral_0", "mlp/down/Fp8DotGeneral_0"),
  ),
  "moe": Case(
    MoeModel(),
    (normal(2, 3, D),),
    ("heads/Fp8Einsum_0", "moe/Fp8Einsum_0", "moe/Fp8Einsum_1"),
    fp8.Fp8Config(functions="moe"),
  ),
  "convolution": Case(ConvNet(), (normal(2, 4, 4, 3),), ("Dense_0/Fp8DotGeneral_0",)),
  "custom_dot_general": Case(
    Custom(),
    (normal(4, D),),
    ("factors/contract_Fp8DotGeneral_0", "factors/contract_Fp8DotGeneral_1"),
    fp8.Fp8Config(functions="factors"),
  ),
  "recurrent": Case(
    Recurrent(),
    (normal(2, 5, D),),
    tuple(
      f"{name}/Fp8DotGeneral_0"
      for name in (
        "project",
        *(f"GRUCell_0/{gate}" for gate in ("ir", "iz", "in", "hr", "hz", "hn")),
      )
    ),
  ),
  "jitted": Case(
    Jitted(),
    (normal(4, D),),
    tuple(f"jitted/{name}/Fp8DotGeneral_0" for name in ("Dense_0", "down")),
  ),
  "partitioned": Case(Partitioned(), (normal(4, D),), ("layers/Dense_0/Fp8DotGeneral_0",)),
  "branches": Case(Branches(), (normal(4, D),), ("wide/Fp8DotGeneral_0", "narrow/Fp8DotGeneral_0")),
}
