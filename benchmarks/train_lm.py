"""Does FP8 train a language model to the loss that BF16 reaches?

    python benchmarks/train_lm.py                      # both, on two CPU cores, in a few minutes
    python benchmarks/train_lm.py --recipe all         # BF16 once, and FP8 with every recipe
    python benchmarks/train_lm.py --preset h200 --text corpus.txt
    python benchmarks/train_lm.py --fused              # FP8 with one GEMM of q, k, v; of gate, up
    python benchmarks/train_lm.py --dtype float16      # BF16, float16, and FP8 in float16
    python benchmarks/train_lm.py --convert --calibrate 4 --export served
    python benchmarks/train_lm.py --explain h200       # reports on the step as compiled for an H200

A Llama-like decoder learns Python's language reference byte by byte, in BF16 and in FP8. All runs
have the same seed, batches and optimizer. The models differ in one argument, ``dot_general_cls``.
With ``--fused``, FP8 runs have fused projections, which start from the same parameters. With
``--convert``, FP8 runs convert the BF16 model. With ``--dtype float16``, FP8 runs compute in
float16 with loss scaling; a float16 run without FP8 is added.

The result is ``gap = 100 * (loss FP8 / loss BF16 - 1)`` on held-out text, printed as a table.
``curves.png`` and ``results.json`` go to ``--out``. With ``--resume``, a killed run continues, with
the same bits as a run that was not killed.

Before training, each step is compiled for the attached GPU, or for a described H200, and its FP8
GEMMs are counted. The benchmark stops if a projection's GEMM is not FP8. For block recipes the
GEMMs are only counted: not every GPU has one FP8 GEMM for them.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
from rich.console import Console

from flax_fp8.doctor import allow_missing_cuda
from flax_fp8.explain.target import NAMES
from lm.config import PRESETS, TrainConfig
from lm.convert import show_dry_runs
from lm.curve import Result
from lm.devices import Devices
from lm.errors import UsageError
from lm.explain import NONE, Reports, explain_steps, write_reports
from lm.export import export_run
from lm.options import not_negative, positive
from lm.plot import write_png
from lm.processes import add_options, connect, ending_at_once, require_alone, require_same, speaks
from lm.progress import ConsoleDisplay
from lm.report import show, write_json
from lm.runs import (
  BF16,
  RECIPE_CHOICES,
  Run,
  converted,
  fused,
  in_float16,
  label,
  named_recipes,
  recipe_of,
  require_fp8_hardware,
)
from lm.text import Corpus, read_corpus
from lm.train import require_startable, train

PRECISIONS = ("bf16", "fp8", "both")
SAME_IN_EACH_PROCESS = ("out", "export", "explain", "resume", "checkpoint_every")
TRAINING = ("steps", "batch_size", "seed", "calibrate")


def make_parser() -> argparse.ArgumentParser:
  """The command line; what is left out comes from the preset."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  of_recipes = "recipes of the FP8 runs; default: delayed"
  on_gpu = "GPU: print the whole report of each step as compiled for it; none: compile no step"
  add("--precision", choices=PRECISIONS, default="both", help="what to train; default: both")
  add("--recipe", choices=RECIPE_CHOICES, nargs="+", default=["delayed"], help=of_recipes)
  made = parser.add_mutually_exclusive_group()
  store = functools.partial(made.add_argument, dest="made", action="store_const", default=str)
  store("--fused", const=fused, help="FP8 runs fuse the projections q, k, v, and gate, up")
  store("--convert", const=converted, help="FP8 runs convert the BF16 model with fp8_linear_layers")
  add(
    "--dtype",
    choices=("bfloat16", "float16"),
    default="bfloat16",
    help="of activations; default: bfloat16",
  )
  add(
    "--calibrate", type=not_negative, help="training batches that calibrate FP8 state before step 0"
  )
  add("--preset", choices=PRESETS, default="tiny", help="sizes of model and run; default: tiny")
  add("--text", type=Path, help="text file to learn; default: Python's language reference")
  add("--steps", type=positive, help="optimizer steps")
  add("--batch-size", type=positive, help="sequences per step")
  add("--seed", type=not_negative, help="seed of parameters and batches")
  add("--remat", action="store_true", default=None, help="recompute blocks in the backward pass")
  add("--attention", choices=("xla", "cudnn"), help="attention kernel; cudnn needs a GPU")
  add("--explain", choices=(*NAMES, NONE), help=on_gpu)
  add("--out", type=Path, default=Path("runs/train_lm"), help="folder for results")
  add("--export", type=Path, help="folder for frozen FP8 models and their exported forward passes")
  add("--resume", action="store_true", help="continue from the checkpoints in --out")
  add(
    "--checkpoint-every", type=not_negative, default=100, help="steps between checkpoints; 0: none"
  )
  add_options(parser)
  return parser


def explains(arguments: argparse.Namespace) -> bool:
  """Whether whole reports are asked for, and not the one line that there is without asking."""
  return arguments.explain not in (None, NONE)


def configure(arguments: argparse.Namespace) -> TrainConfig:
  """Takes the preset, and changes what the command line names."""

  def named(*names: str) -> dict[str, object]:
    given = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}

  preset = PRESETS[arguments.preset]
  shape = dataclasses.replace(preset.shape, **named("remat", "attention"))
  return dataclasses.replace(preset, shape=shape, **named(*TRAINING))


def choose_runs(arguments: argparse.Namespace) -> tuple[Run, ...]:
  """The runs asked for: BF16, the recipes, or both; in float16 too, where that is asked for."""
  bf16, recipes = (BF16,), tuple(map(arguments.made, named_recipes(arguments.recipe)))
  if arguments.dtype == "float16":
    bf16, recipes = (BF16, in_float16(BF16)), tuple(map(in_float16, recipes))
  return {"bf16": bf16, "fp8": recipes, "both": bf16 + recipes}[arguments.precision]


def require_attention(config: TrainConfig) -> None:
  """Raises where the attention kernel can't be trained with."""
  if config.shape.attention == "cudnn" and (backend := jax.default_backend()) != "gpu":
    raise UsageError(
      f"--attention: cudnn trains on a GPU only; got {backend}. Use --attention xla."
    )


def require_shared(
  arguments: argparse.Namespace, config: TrainConfig, corpus: Corpus, devices: Devices
) -> None:
  """Raises where the devices can't share the work, or the processes were told different things."""
  asked = {name: str(getattr(arguments, name)) for name in SAME_IN_EACH_PROCESS}
  require_same([choose_runs(arguments), config.as_dict(), corpus.digest, asked])
  devices.require_even(config.batch_size)
  if arguments.export:
    require_alone("--export")


def folders(arguments: argparse.Namespace) -> Iterator[tuple[Run, Path]]:
  """The runs asked for, each with the folder of its checkpoints."""
  for name in choose_runs(arguments):
    yield name, arguments.out / "checkpoints" / name


def prove(
  arguments: argparse.Namespace, config: TrainConfig, corpus: Corpus, console: Console
) -> Reports:
  """Reports on each run's step, before any array of the model's size is made.

  Each process does so for itself, and stops where the others do: none is left waiting.
  """
  for name, folder in folders(arguments):
    require_startable(config, name, corpus, folder=folder, resume=arguments.resume)
  show_dry_runs(config, choose_runs(arguments), console)
  reports = explain_steps(config, choose_runs(arguments), arguments.explain, console)
  if explains(arguments) and speaks():
    write_reports(reports, arguments.out)
    console.print(f"Wrote explain_*.md and explain_*.png to {arguments.out}", highlight=False)
  return reports


def run(
  arguments: argparse.Namespace,
  config: TrainConfig,
  corpus: Corpus,
  console: Console,
  devices: Devices,
) -> list[Result]:
  """Trains what is asked for, one run after the other."""
  results = []
  for name, folder in folders(arguments):
    with ConsoleDisplay(console, label(name), config.steps) as display:
      result, variables = train(
        config,
        name,
        corpus,
        folder=folder,
        resume=arguments.resume,
        checkpoint_every=arguments.checkpoint_every,
        devices=devices,
        display=display,
      )
    if arguments.export and recipe_of(name) is not None:
      exported = export_run(config, name, corpus, variables, arguments.export / name)
      result = dataclasses.replace(result, export=exported)
    results.append(result)
  return results


def main(argv: list[str] | None = None) -> int:
  """Runs the benchmark.

  Args:
    argv: the command line without the program's name; None reads the process's own.

  Returns:
    0, or 2 where the command line asked for what cannot be.
  """
  arguments = make_parser().parse_args(argv)
  allow_missing_cuda()  # of the GPU compiler, JAX wants to know where its CUDA is
  try:
    connect(arguments)
    console, devices = Console(quiet=not speaks()), Devices.every()
    require_fp8_hardware(choose_runs(arguments))
    config, corpus = configure(arguments), read_corpus(arguments.text)
    require_shared(arguments, config, corpus, devices)
    reports = prove(arguments, config, corpus, console)
    require_attention(config)
    with ending_at_once():
      results = run(arguments, config, corpus, console, devices)
  except UsageError as error:
    print(f"train_lm: {error}", file=sys.stderr)
    return 2
  show(results, reports, config, console)
  if speaks():
    write_png(results, arguments.out / "curves.png")
    explained, path = explains(arguments), arguments.out / "results.json"
    write_json(results, reports, config, corpus, path, devices=devices, explained=explained)
  console.print(f"Wrote curves.png and results.json to {arguments.out}", highlight=False)
  return 0


if __name__ == "__main__":
  sys.exit(main())
