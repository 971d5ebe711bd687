"""Models of Hugging Face's ``diffusers``: Stable Diffusion's UNet, its ControlNet and its VAE."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp

from zoo.model import Case, Model, normal

SIZES = {
  "sample_size": 8,
  "in_channels": 4,
  "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
  "block_out_channels": (32, 64),
  "layers_per_block": 1,
  "attention_head_dim": 4,
  "cross_attention_dim": 32,
}


def _noisy() -> tuple[jax.Array, ...]:
  """A noisy sample, its time step, and the text that it is of."""
  return normal(2, 4, 8, 8), jnp.array([3, 7]), normal(2, 16, 32, seed=1)


def _library() -> Any:
  return importlib.import_module("diffusers")


def _unet(**fields: Any) -> Model:
  up = ("UpBlock2D", "CrossAttnUpBlock2D")
  module = _library().FlaxUNet2DConditionModel(up_block_types=up, **SIZES, **fields)
  return Model(module, _noisy(), read=lambda out: out.sample)


def _controlnet() -> Model:
  module = _library().FlaxControlNetModel(conditioning_embedding_out_channels=(16, 32), **SIZES)
  condition = normal(2, 3, 16, 16, seed=2)
  return Model(module, (*_noisy(), condition), read=lambda out: out.mid_block_res_sample)


def _vae() -> Model:
  module = _library().FlaxAutoencoderKL(
    block_out_channels=(32, 64),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
  )
  return Model(module, (normal(2, 3, 16, 16),), read=lambda out: out.sample)


CASES = (
  Case("diffusers", "FlaxUNet2DConditionModel", _unet),
  Case(
    "diffusers",
    "FlaxUNet2DConditionModel, linear projections",
    lambda: _unet(use_linear_projection=True, split_head_dim=True),
  ),
  Case("diffusers", "FlaxControlNetModel", _controlnet),
  Case("diffusers", "FlaxAutoencoderKL", _vae),
)
