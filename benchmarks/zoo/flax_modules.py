"""Modules that Flax itself publishes: attention and recurrent cells; needs no other package."""

import flax.linen as nn
import jax

from zoo.model import Case, Model, normal


class AttentionStack(nn.Module):
  """Two layers of ``nn.MultiHeadDotProductAttention``, each on the residual stream."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Takes and gives the residual stream."""
    for _ in range(2):
      x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
    return x


def _attention() -> Model:
  return Model(AttentionStack(), (normal(2, 16, 64),))


def _lstm() -> Model:
  return Model(nn.RNN(nn.OptimizedLSTMCell(64)), (normal(2, 8, 32),))


def _gru() -> Model:
  return Model(nn.RNN(nn.GRUCell(64)), (normal(2, 8, 32),))


def _bidirectional() -> Model:
  cells = (nn.RNN(nn.LSTMCell(32)), nn.RNN(nn.LSTMCell(32)))
  return Model(nn.Bidirectional(*cells), (normal(2, 8, 32),))


CASES = (
  Case("flax", "MultiHeadDotProductAttention", _attention),
  Case("flax", "RNN(OptimizedLSTMCell)", _lstm),
  Case("flax", "RNN(GRUCell)", _gru),
  Case("flax", "Bidirectional(LSTMCell)", _bidirectional),
)
TINY = CASES[0]
