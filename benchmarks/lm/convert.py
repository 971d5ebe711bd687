"""FP8 without a change of the model: the twin of the plain ``Transformer``, and its dry run."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from rich.console import Console

import flax_fp8 as fp8
from lm.config import TrainConfig
from lm.model import ModelShape, Transformer
from lm.runs import Run, is_converted, label, recipe_of


def convert(shape: ModelShape, recipe: fp8.Recipe, dtype: Any = jnp.bfloat16) -> nn.Module:
  """Makes the FP8 twin of the model without FP8."""
  return fp8.fp8_linear_layers(Transformer(shape, dtype=dtype), fp8.Fp8Config(recipe=recipe))


def show_dry_runs(config: TrainConfig, runs: tuple[Run, ...], console: Console) -> None:
  """Prints which layers each conversion takes, and what decided; nothing is computed."""
  tokens = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), jnp.int32)
  for run in runs:
    recipe = recipe_of(run)
    if recipe is not None and is_converted(run):
      report = fp8.Fp8Config(recipe=recipe).report(Transformer(config.shape), tokens)
      console.out(f"{label(run)}, dry run:", report, sep="\n", highlight=False)
