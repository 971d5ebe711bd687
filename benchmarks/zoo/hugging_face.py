"""Models of Hugging Face's ``transformers``: the Linen modules inside its wrappers."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from zoo.model import Case, Model, first_array, normal, tokens

ROWS, LENGTH, WIDTH, HEADS, VOCABULARY = 2, 32, 64, 4, 96

# The sizes of most configurations, by the names that most have for them.
SIZES = {
  "vocab_size": VOCABULARY,
  "hidden_size": WIDTH,
  "num_hidden_layers": 1,
  "num_attention_heads": HEADS,
  "intermediate_size": 2 * WIDTH,
  "max_position_embeddings": 2 * LENGTH,
}
BOTH_SIDES = {
  "vocab_size": VOCABULARY,
  "d_model": WIDTH,
  "max_position_embeddings": 2 * LENGTH,
  **{
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in {"layers": 1, "attention_heads": HEADS, "ffn_dim": 2 * WIDTH}.items()
  },
}
T5 = {
  "vocab_size": VOCABULARY,
  "d_model": WIDTH,
  "d_kv": 16,
  "d_ff": 2 * WIDTH,
  "num_layers": 1,
  "num_heads": HEADS,
}
IMAGES = {**SIZES, "image_size": 32, "patch_size": 8, "num_labels": 16}
STAGES = {
  "embedding_size": 32,
  "hidden_sizes": [32, 64],
  "depths": [1, 1],
  "num_labels": 16,
}


def _text(config: Any) -> dict[str, Any]:
  del config
  positions = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
  return {
    "input_ids": tokens(ROWS, LENGTH, VOCABULARY),
    "attention_mask": jnp.ones((ROWS, LENGTH), jnp.int32),
    "token_type_ids": jnp.zeros((ROWS, LENGTH), jnp.int32),
    "position_ids": positions,
    "head_mask": None,
  }


def _both_sides(config: Any) -> dict[str, Any]:
  inputs = _text(config)
  decoder = {f"decoder_{name}": inputs[name] for name in ("attention_mask", "position_ids")}
  return {**inputs, **decoder, "decoder_input_ids": tokens(ROWS, LENGTH, VOCABULARY, seed=1)}


def _speech(config: Any) -> dict[str, Any]:
  inputs = _both_sides(config)
  return {**inputs, "input_features": normal(ROWS, config.num_mel_bins, 4 * LENGTH)}


def _wave(config: Any) -> dict[str, Any]:
  del config
  return {"input_values": normal(ROWS, 640), "attention_mask": jnp.ones((ROWS, 640), jnp.int32)}


def _image(config: Any) -> dict[str, Any]:
  del config
  return {"pixel_values": normal(ROWS, 32, 32, 3)}


def _image_and_text(config: Any) -> dict[str, Any]:
  return {**_text(config), **_image(config)}


def _read(out: Any) -> jax.Array:
  """Returns the logits, or the first array."""
  logits = getattr(out, "logits", None)
  return first_array(out) if logits is None else logits


def _case(
  name: str,
  config_class: str,
  inputs: Callable[[Any], dict[str, Any]],
  sizes: dict[str, Any],
  input_shape: tuple[int, ...] | None = None,
  variant: str = "",
  **fields: Any,
) -> Case:
  """Describes a model by the classes of its wrapper and configuration."""

  def make() -> Model:
    library: Any = importlib.import_module("transformers")
    config = getattr(library, config_class)(**{**sizes, **fields})
    given = {} if input_shape is None else {"input_shape": input_shape}
    module = getattr(library, name)(config, _do_init=False, **given).module
    taken = inspect.signature(module.__call__).parameters
    kwargs = {key: value for key, value in inputs(config).items() if key in taken}
    return Model(module, (), kwargs, _read, labels=True)

  return Case("transformers", f"{name}, {variant}" if variant else name, make)


CASES = (
  _case("FlaxBertForMaskedLM", "BertConfig", _text, SIZES),
  _case("FlaxRobertaForMaskedLM", "RobertaConfig", _text, SIZES),
  _case("FlaxRobertaPreLayerNormForMaskedLM", "RobertaPreLayerNormConfig", _text, SIZES),
  _case("FlaxXLMRobertaForSequenceClassification", "XLMRobertaConfig", _text, SIZES, num_labels=16),
  _case("FlaxElectraForMaskedLM", "ElectraConfig", _text, SIZES, embedding_size=32),
  _case(
    "FlaxDistilBertForMaskedLM",
    "DistilBertConfig",
    _text,
    {
      "vocab_size": VOCABULARY,
      "dim": WIDTH,
      "hidden_dim": 2 * WIDTH,
      "n_layers": 1,
      "n_heads": HEADS,
      "max_position_embeddings": 2 * LENGTH,
    },
  ),
  _case("FlaxAlbertForMaskedLM", "AlbertConfig", _text, SIZES, embedding_size=32),
  _case("FlaxBigBirdForMaskedLM", "BigBirdConfig", _text, SIZES, attention_type="original_full"),
  _case(
    "FlaxBigBirdForSequenceClassification",
    "BigBirdConfig",
    _text,
    SIZES,
    variant="block-sparse",
    attention_type="block_sparse",
    block_size=4,
    num_random_blocks=1,
    num_labels=16,
  ),
  _case("FlaxRoFormerForMaskedLM", "RoFormerConfig", _text, SIZES),
  _case(
    "FlaxGPT2LMHeadModel",
    "GPT2Config",
    _text,
    {
      "vocab_size": VOCABULARY,
      "n_embd": WIDTH,
      "n_layer": 1,
      "n_head": HEADS,
      "n_positions": 2 * LENGTH,
    },
  ),
  _case(
    "FlaxGPTNeoForCausalLM",
    "GPTNeoConfig",
    _text,
    {
      "vocab_size": VOCABULARY,
      "hidden_size": WIDTH,
      "num_layers": 2,
      "num_heads": HEADS,
      "attention_types": [[["global", "local"], 1]],
      "window_size": 8,
      "max_position_embeddings": 2 * LENGTH,
    },
  ),
  _case(
    "FlaxGPTJForCausalLM",
    "GPTJConfig",
    _text,
    {
      "vocab_size": VOCABULARY,
      "n_embd": WIDTH,
      "n_layer": 1,
      "n_head": HEADS,
      "rotary_dim": 8,
      "n_positions": 2 * LENGTH,
    },
  ),
  _case(
    "FlaxOPTForCausalLM",
    "OPTConfig",
    _text,
    {**SIZES, "ffn_dim": 2 * WIDTH, "word_embed_proj_dim": WIDTH},
  ),
  _case(
    "FlaxXGLMForCausalLM",
    "XGLMConfig",
    _text,
    {
      "vocab_size": VOCABULARY,
      "d_model": WIDTH,
      "ffn_dim": 2 * WIDTH,
      "num_layers": 1,
      "attention_heads": HEADS,
      "max_position_embeddings": 2 * LENGTH,
    },
  ),
  _case(
    "FlaxBloomForCausalLM",
    "BloomConfig",
    _text,
    {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": 1, "n_head": HEADS},
  ),
  _case("FlaxLlamaForCausalLM", "LlamaConfig", _text, SIZES, num_key_value_heads=2),
  _case("FlaxGemmaForCausalLM", "GemmaConfig", _text, SIZES, num_key_value_heads=2, head_dim=16),
  _case("FlaxMistralForCausalLM", "MistralConfig", _text, SIZES, num_key_value_heads=2),
  _case("FlaxBartForConditionalGeneration", "BartConfig", _both_sides, BOTH_SIDES),
  _case("FlaxMBartForConditionalGeneration", "MBartConfig", _both_sides, BOTH_SIDES),
  _case("FlaxPegasusForConditionalGeneration", "PegasusConfig", _both_sides, BOTH_SIDES),
  _case("FlaxMarianMTModel", "MarianConfig", _both_sides, BOTH_SIDES, pad_token_id=0),
  _case("FlaxBlenderbotForConditionalGeneration", "BlenderbotConfig", _both_sides, BOTH_SIDES),
  _case(
    "FlaxBlenderbotSmallForConditionalGeneration", "BlenderbotSmallConfig", _both_sides, BOTH_SIDES
  ),
  _case("FlaxT5ForConditionalGeneration", "T5Config", _both_sides, T5),
  _case("FlaxMT5ForConditionalGeneration", "MT5Config", _both_sides, T5),
  _case("FlaxLongT5ForConditionalGeneration", "LongT5Config", _both_sides, T5, local_radius=7),
  _case(
    "FlaxLongT5ForConditionalGeneration",
    "LongT5Config",
    _both_sides,
    T5,
    local_radius=7,
    variant="transient-global",
    encoder_attention_type="transient-global",
    global_block_size=4,
  ),
  _case(
    "FlaxWhisperForConditionalGeneration",
    "WhisperConfig",
    _speech,
    BOTH_SIDES,
    num_mel_bins=16,
    max_source_positions=2 * LENGTH,
    max_target_positions=2 * LENGTH,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
    input_shape=(1, 16, 4 * LENGTH),
  ),
  _case("FlaxViTForImageClassification", "ViTConfig", _image, IMAGES),
  _case("FlaxBeitForImageClassification", "BeitConfig", _image, IMAGES),
  _case("FlaxDinov2ForImageClassification", "Dinov2Config", _image, IMAGES),
  _case("FlaxResNetForImageClassification", "ResNetConfig", _image, STAGES),
  _case("FlaxRegNetForImageClassification", "RegNetConfig", _image, STAGES, groups_width=16),
  _case(
    "FlaxCLIPModel",
    "CLIPConfig",
    _image_and_text,
    {
      "text_config": {**SIZES, "projection_dim": 32, "eos_token_id": 95},
      "vision_config": {**IMAGES, "projection_dim": 32},
      "projection_dim": 32,
    },
  ),
  _case(
    "FlaxWav2Vec2ForCTC",
    "Wav2Vec2Config",
    _wave,
    SIZES,
    conv_dim=[32, 32],
    conv_stride=[5, 4],
    conv_kernel=[10, 4],
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
    do_stable_layer_norm=True,
    feat_extract_norm="layer",
  ),
)
