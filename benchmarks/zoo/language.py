"""Sequence models of smaller packages: language models, recurrences, a decoder of image tokens."""

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp

from zoo.model import Case, Model, first_array, normal, tokens

ROWS, LENGTH, WIDTH, VOCABULARY = 2, 32, 64, 96


def _positions() -> jax.Array:
  return jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))


def _dalle() -> Model:
  configuration: Any = importlib.import_module("dalle_mini.model.configuration")
  modeling: Any = importlib.import_module("dalle_mini.model.modeling")
  sides = {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in {"layers": 1, "attention_heads": 4, "ffn_dim": 2 * WIDTH}.items()
  }
  config = configuration.DalleBartConfig(
    d_model=WIDTH,
    encoder_vocab_size=VOCABULARY,
    image_vocab_size=VOCABULARY - 1,
    image_length=LENGTH,
    max_text_length=LENGTH,
    **sides,
  )
  mask = jnp.ones((ROWS, LENGTH), jnp.int32)
  kwargs = {
    "input_ids": tokens(ROWS, LENGTH, VOCABULARY),
    "attention_mask": mask,
    "decoder_input_ids": tokens(ROWS, LENGTH, VOCABULARY, seed=1),
    "decoder_attention_mask": mask,
    "position_ids": _positions(),
    "decoder_position_ids": _positions(),
  }
  module = modeling.FlaxBartForConditionalGenerationModule(config)
  return Model(module, (), kwargs, lambda out: out.logits, labels=True)


def _griffin() -> Model:
  library: Any = importlib.import_module("recurrentgemma.jax")
  common: Any = importlib.import_module("recurrentgemma.common")
  block = common.TemporalBlockType
  config = common.GriffinConfig(
    vocab_size=VOCABULARY,
    width=WIDTH,
    mlp_expanded_width=3 * WIDTH,
    num_heads=4,
    block_types=(block.RECURRENT, block.ATTENTION),
    embeddings_scale_by_sqrt_dim=True,
    attention_window_size=16,
    logits_soft_cap=30.0,
    scan_type=common.ScanType.LINEAR_NATIVE,
  )
  inputs = (tokens(ROWS, LENGTH, VOCABULARY), _positions())
  return Model(library.Griffin(config), inputs, {}, first_array, labels=True)


def _gemma() -> Model:
  library: Any = importlib.import_module("gemma.gm.nn")
  kind = library.AttentionType
  config = library.config.TransformerConfig(
    num_embed=VOCABULARY,
    embed_dim=WIDTH,
    hidden_dim=2 * WIDTH,
    num_heads=4,
    head_dim=16,
    num_kv_heads=2,
    final_logit_softcap=None,
    use_post_attn_norm=True,
    use_post_ffw_norm=True,
    attention_types=(kind.LOCAL_SLIDING, kind.GLOBAL),
    sliding_window_size=8,
    use_qk_norm=True,
  )
  module = library.Transformer(config=config, dtype=jnp.float32)
  inputs = (tokens(ROWS, LENGTH, VOCABULARY),)
  return Model(module, inputs, {}, lambda out: out.logits, labels=True)


def _gpt2() -> Model:
  library: Any = importlib.import_module("flaxmodels.gpt2.gpt2")

  @dataclasses.dataclass(frozen=True)
  class Config:
    vocab_size: int = VOCABULARY
    n_positions: int = LENGTH
    n_embd: int = WIDTH
    n_layer: int = 1
    n_head: int = 4
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    attn_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True

  inputs = (tokens(ROWS, LENGTH, VOCABULARY),)
  read = lambda out: out["last_hidden_state"]
  return Model(library.GPT2Model(Config()), inputs, {}, read)


def _translator() -> Model:
  library: Any = importlib.import_module("vtransformer.model")
  module = library.Transformer(
    embed_dim=512,
    output_dim=VOCABULARY,
    src_vocab_size=VOCABULARY,
    trg_vocab_size=VOCABULARY,
    max_length=LENGTH,
    n_enc_layers=1,
    n_dec_layers=1,
  )
  text = tokens(ROWS, LENGTH, VOCABULARY), tokens(ROWS, LENGTH, VOCABULARY, seed=1)
  return Model(module, (*text, jnp.ones(LENGTH)), labels=True)


def _experts() -> Model:
  library: Any = importlib.import_module("nano_moe.model")
  sizes: Any = importlib.import_module("nano_moe.config")
  config = sizes.NanoMoEConfig(
    vocab_size=VOCABULARY, n_layers=1, d_model=WIDTH, d_ff=2 * WIDTH, block_size=LENGTH
  )
  inputs = (tokens(ROWS, LENGTH, VOCABULARY),)
  return Model(library.NanoMoE(config), inputs, {}, first_array, labels=True)


def _recurrence(name: str) -> Model:
  library: Any = importlib.import_module("long_range_models")
  layer = getattr(library, name)(feature_dim=32, state_dim=32)
  return Model(
    library.ContinuousSequenceModel(layer, out_dim=32, emb_dim=32), (normal(ROWS, 16, 32),)
  )


def _adder() -> Model:
  library: Any = importlib.import_module("evojax.policy.seq2seq")
  symbols = library.char_table.vocab_size
  encode = lambda length, seed: jax.nn.one_hot(tokens(ROWS, length, symbols, seed), symbols)
  module = library.Seq2seq(teacher_force=True, hidden_size=32)
  return Model(module, (encode(8, 0), encode(6, 1)), {}, first_array, labels=True)


def _layers() -> Model:
  library: Any = importlib.import_module("sequence_layers.jax")
  config = library.Serial.Config(
    [
      library.Dense.Config(WIDTH),
      library.Residual.Config(
        [
          library.LayerNormalization.Config(),
          library.Dense.Config(2 * WIDTH, activation=jax.nn.gelu),
          library.Dense.Config(WIDTH),
        ]
      ),
      library.Residual.Config(
        [
          library.DotProductSelfAttention.Config(
            num_heads=4, units_per_head=16, max_past_horizon=8, max_future_horizon=0
          ),
          library.DenseShaped.Config([WIDTH]),
        ]
      ),
    ]
  )
  sequence = library.Sequence(normal(ROWS, LENGTH, 32), jnp.ones((ROWS, LENGTH), bool))
  return Model(config.make(), (sequence,), {"training": False}, lambda out: out.values)


CASES = (
  Case("dalle-mini", "FlaxBartForConditionalGenerationModule", _dalle),
  Case("recurrentgemma", "Griffin", _griffin),
  Case("gemma", "Transformer", _gemma),
  Case("flaxmodels", "GPT2Model", _gpt2),
  Case("vanilla-transformer-jax", "Transformer", _translator),
  Case("nano-moe-jax", "NanoMoE", _experts),
  Case("long-range-models", "LRULayer", lambda: _recurrence("LRULayer")),
  Case("long-range-models", "S5Layer", lambda: _recurrence("S5Layer")),
  Case("evojax", "Seq2seq", _adder),
  Case("sequence-layers", "Serial", _layers),
)
