"""Exports a trained model: FP8 kernels, and a forward pass that needs only JAX.

``variables/`` has the frozen variables as ``fp8.save_checkpoint`` writes them. ``forward.jax`` has
the program as ``jax.export`` serializes it, called with these variables and tokens ``[1,
seq_len]``. Embedding and head are stored in BF16, as the model computes with them, and norms in
float32.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp

import flax_fp8 as fp8
from harness.output import whole_file
from lm.config import TrainConfig
from lm.devices import Devices
from lm.runs import Run
from lm.step import make_model
from lm.text import Corpus
from lm.train import Record, tree_bytes, validator

VARIABLES, PROGRAM = "variables", "forward.jax"
PLATFORMS = ("cpu", "cuda")
# MXFP8's product on GPUs: JAX does not promise to read it in another version.
UNSTABLE = [jax.export.DisabledSafetyCheck.custom_call("__op$block_scaled_dot")]


def window(config: TrainConfig) -> jax.ShapeDtypeStruct:
  """What the exported program reads."""
  return jax.ShapeDtypeStruct((1, config.seq_len), jnp.int32)


def freeze(config: TrainConfig, run: Run, variables: Any) -> tuple[nn.Module, dict[str, Any]]:
  """Freezes a trained model, and stores in BF16 what the model casts to BF16."""
  module, frozen = fp8.freeze_for_inference(make_model(config, run), variables, window(config))
  cast = lambda path, x: x.astype(jnp.bfloat16) if path[-1].key in ("kernel", "embedding") else x
  return module, frozen | {"params": jax.tree_util.tree_map_with_path(cast, frozen["params"])}


def export_forward(config: TrainConfig, run: Run, trained: Any, frozen: Any) -> jax.export.Exported:
  """Lowers the frozen forward pass, with XLA's attention, which every platform has."""
  shape = dataclasses.replace(config.shape, attention="xla")
  model = make_model(dataclasses.replace(config, shape=shape), run)
  shapes = functools.partial(jax.eval_shape, lambda tree: tree)
  served, _ = fp8.freeze_for_inference(model, shapes(trained), window(config))
  export = functools.partial(jax.export.export, jax.jit(served.apply), disabled_checks=UNSTABLE)
  try:
    return export(platforms=PLATFORMS)(shapes(frozen), window(config))
  except NotImplementedError:  # ``jax.nn.scaled_matmul`` is lowered for GPUs only
    return export()(shapes(frozen), window(config))


def export_run(
  config: TrainConfig, run: Run, corpus: Corpus, variables: Any, folder: Path
) -> Record:
  """Freezes, saves, exports and validates a trained model; replaces earlier files in ``folder``."""
  module, frozen = freeze(config, run, variables)
  folder.mkdir(parents=True, exist_ok=True)
  fp8.save_checkpoint(folder / VARIABLES, frozen, overwrite=True)
  program = export_forward(config, run, variables, frozen)
  serialized = program.serialize()
  with whole_file(folder / PROGRAM) as beside:
    beside.write_bytes(serialized)
  return {
    "bytes": tree_bytes(frozen),
    "bytes_bf16": 2 * sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
    "program_bytes": len(serialized),
    "platforms": list(program.platforms),
    "validation_loss": validator(config, module.apply, corpus, Devices.first())(frozen),
  }
