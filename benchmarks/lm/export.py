"""What training leaves to serve: FP8 kernels, and a forward pass that needs nothing but JAX.

``variables/`` has the frozen variables as ``fp8.save_checkpoint`` writes them, ``forward.jax`` a
program as ``jax.export`` serialises it; it is called with these variables and tokens
``[1, seq_len]``. Variables are no constants of the program, so its size is not the model's.

What stays in high precision is stored as the model computes with it: embedding and head in BF16,
the norms' scales in float32.
"""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp

import flax_fp8 as fp8
from lm.config import TrainConfig
from lm.curve import Export
from lm.files import whole_file
from lm.runs import Run
from lm.step import make_model, mean_loss
from lm.text import Corpus, validation_batches
from lm.train import tree_bytes, validate

VARIABLES, PROGRAM = "variables", "forward.jax"
PLATFORMS = ("cpu", "cuda")
BF16_BYTES = 2
# MXFP8's product on GPUs, which JAX doesn't promise to read in another version.
UNSTABLE = [jax.export.DisabledSafetyCheck.custom_call("__op$block_scaled_dot")]


def window(config: TrainConfig) -> jax.ShapeDtypeStruct:
  """What the exported program reads."""
  return jax.ShapeDtypeStruct((1, config.seq_len), jnp.int32)


def freeze(config: TrainConfig, run: Run, variables: Any) -> tuple[nn.Module, dict[str, Any]]:
  """Freezes a trained model: FP8 kernels, and BF16 where the model casts to it anyway."""
  module, frozen = fp8.freeze_for_inference(make_model(config, run), variables, window(config))
  cast = lambda path, x: x.astype(jnp.bfloat16) if path[-1].key in ("kernel", "embedding") else x
  return module, frozen | {"params": jax.tree_util.tree_map_with_path(cast, frozen["params"])}


def export_forward(config: TrainConfig, run: Run, trained: Any, frozen: Any) -> jax.export.Exported:
  """Lowers the frozen forward pass, with XLA's attention: every platform has that one.

  Args:
    config: what was trained.
    run: with which recipe.
    trained: variables of the run.
    frozen: what they became.

  Returns:
    The program for CPUs and NVIDIA's GPUs; for this machine's platform where this JAX has none for
    both, as up to 0.10 with MXFP8.
  """
  shape = dataclasses.replace(config.shape, attention="xla")
  model = make_model(dataclasses.replace(config, shape=shape), run)
  shapes = functools.partial(jax.eval_shape, lambda tree: tree)
  served, _ = fp8.freeze_for_inference(model, shapes(trained), window(config))
  export = functools.partial(jax.export.export, jax.jit(served.apply), disabled_checks=UNSTABLE)
  try:
    return export(platforms=PLATFORMS)(shapes(frozen), window(config))
  except NotImplementedError:  # ``jax.nn.scaled_matmul`` is lowered for GPUs alone
    return export()(shapes(frozen), window(config))


def bytes_on_disk(folder: Path) -> int:
  """Bytes of all files under a folder."""
  return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def disk_bytes_in_bf16(params: Any) -> int:
  """Bytes of a checkpoint of parameters in BF16, which is written and measured."""
  with tempfile.TemporaryDirectory() as folder:
    fp8.save_checkpoint(folder, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    return bytes_on_disk(Path(folder))


def kernel_bytes(frozen: Any) -> int:
  """Bytes of the FP8 kernels and their scales."""
  leaves = jax.tree_util.tree_leaves_with_path(frozen["fp8_frozen"])
  return sum(leaf.nbytes for path, leaf in leaves if path[-1].key in ("kernel", "kernel_scale"))


def export_run(
  config: TrainConfig, run: Run, corpus: Corpus, variables: Any, folder: Path
) -> Export:
  """Freezes, saves and exports a trained model, and validates what will be served.

  Args:
    config: what was trained.
    run: with which recipe.
    corpus: on what.
    variables: the trained ones.
    folder: of this run; files of an earlier export are replaced.

  Returns:
    What serving takes, beside BF16.
  """
  module, frozen = freeze(config, run, variables)
  folder.mkdir(parents=True, exist_ok=True)
  fp8.save_checkpoint(folder / VARIABLES, frozen, overwrite=True)
  program = export_forward(config, run, variables, frozen)
  serialized = program.serialize()
  with whole_file(folder / PROGRAM) as beside:
    beside.write_bytes(serialized)
  sizes = {"batch_size": config.batch_size, "seq_len": config.seq_len}
  batches = validation_batches(corpus, limit=config.validation_batches, **sizes)
  loss_of = jax.jit(functools.partial(mean_loss, module.apply))
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree["params"]))
  return Export(
    kernel_bytes=kernel_bytes(frozen),
    kernel_bytes_bf16=BF16_BYTES * (count(variables) - count(frozen)),
    bytes=tree_bytes(frozen),
    bytes_bf16=BF16_BYTES * count(variables),
    disk_bytes=bytes_on_disk(folder / VARIABLES),
    disk_bytes_bf16=disk_bytes_in_bf16(variables["params"]),
    program_bytes=len(serialized),
    platforms=tuple(program.platforms),
    validation_loss=validate(loss_of, frozen, batches),
  )
