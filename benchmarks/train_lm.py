"""Does FP8 train a language model to the loss that BF16 reaches?

    python benchmarks/train_lm.py                      # both, on two CPU cores, in two minutes
    python benchmarks/train_lm.py --floor              # and BF16 from slightly other parameters
    python benchmarks/train_lm.py --recipe all         # BF16 once, and FP8 with every recipe
    python benchmarks/train_lm.py --preset h200        # a billion parameters, on a GPU
    python benchmarks/train_lm.py --fused              # FP8 with one GEMM of q, k, v; of gate, up
    python benchmarks/train_lm.py --dtype float16      # BF16, float16, and FP8 in float16
    python benchmarks/train_lm.py --convert --calibrate 4 --export served
    python benchmarks/train_lm.py --explain h200       # reports on the step as compiled for an H200

A Llama-like decoder learns Python's language reference byte by byte, in BF16 and in FP8. With
``--preset h200`` it learns the source of Python's standard library, which is larger. All runs
have the same seed, batches and optimizer. The models differ in one argument, ``dot_general_cls``.
With ``--fused``, FP8 runs have fused projections, which start from the same parameters. With
``--convert``, FP8 runs convert the BF16 model. With ``--dtype float16``, FP8 runs compute in
float16 with loss scaling; a float16 run without FP8 is added.

The result is ``gap = 100 * (loss FP8 / loss BF16 - 1)``, in training and on held-out text, printed
as a table. One pair shows little, because chance moves each run. ``--floor`` adds a second BF16 run
from parameters changed by 2.6 %. ``convergence.py`` has the mean gap of many pairs; where it was
recorded for the same preset, it is printed below the table.
``curves.png`` and ``results.json`` go to ``--out``. With ``--resume``, a killed run continues, with
the same bits as a run that was not killed.

Before training, each step is compiled for the attached GPU, or for a described H200, and its FP8
GEMMs are counted. The benchmark stops if a projection's GEMM is not FP8. With ``mxfp8`` the GEMMs
are only counted: not every GPU has FP8 GEMMs for it.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from flax_fp8.doctor import allow_missing_cuda
from flax_fp8.explain.target import NAMES
from harness import output
from harness.environment import on_cpu
from harness.output import positive, say
from lm import processes, recorded, runs
from lm.config import PRESETS, TrainConfig, UsageError
from lm.devices import Devices
from lm.explain import NONE, explain_steps, write_reports
from lm.export import export_run
from lm.report import draw, make_document, show
from lm.runs import BF16, FLOAT16, FLOOR, Run, label, recipe_of
from lm.text import Corpus
from lm.train import Record, open_checkpoints, train

SAME_IN_EACH_PROCESS = ("out", "export", "explain", "resume", "checkpoint_every")
TRAINING = ("steps", "batch_size", "seed", "calibrate")
# Seconds of a step on two CPU cores in BF16 and in FP8, and to compile and explain a run.
CPU_SECONDS = {"micro": (0.005, 0.01), "tiny": (0.015, 0.05), "small": (0.15, 0.35)}
COMPILE_SECONDS = 12.0
PRECISIONS, DTYPES = ("bf16", "fp8", "both"), ("bfloat16", "float16")
EXPLAIN = "GPU: print the whole report of each step as compiled for it; none: compile no step"


def make_options() -> argparse.ArgumentParser:
  """The command line. What it leaves out comes from the preset."""
  parser = output.make_parser(__doc__)
  parser.set_defaults(out=Path("runs/train_lm"))
  add = parser.add_argument
  made = functools.partial(
    parser.add_mutually_exclusive_group().add_argument,
    dest="made",
    action="store_const",
    default="",
  )
  recipes: dict[str, Any] = {"choices": runs.RECIPE_CHOICES, "nargs": "+", "default": ["delayed"]}
  add("--precision", choices=PRECISIONS, default="both", help="what to train; default: both")
  add("--floor", action="store_true", help="BF16 again, from parameters changed by 2.6 %%")
  add("--recipe", **recipes, help="recipes of the FP8 runs; default: delayed")
  made("--fused", const=runs.FUSED, help="FP8 runs fuse the projections q, k, v, and gate, up")
  made("--convert", const=runs.CONVERTED, help="FP8 runs convert the model with fp8_linear_layers")
  add("--dtype", choices=DTYPES, default="bfloat16", help="of activations; default: bfloat16")
  add("--calibrate", type=int, help="training batches that calibrate FP8 state before step 0")
  add("--preset", choices=PRESETS, default="tiny", help="sizes of model and run; default: tiny")
  add("--text", type=Path, help="text file to learn; default: a text that comes with Python")
  add("--steps", type=positive, help="optimizer steps")
  add("--batch-size", type=positive, help="sequences per step")
  add("--seed", type=int, help="seed of parameters and batches")
  add("--remat", action="store_true", default=None, help="recompute blocks in the backward pass")
  add("--attention", choices=("xla", "cudnn"), help="attention kernel; cudnn needs a GPU")
  add("--explain", choices=(*NAMES, NONE), help=EXPLAIN)
  add("--export", type=Path, help="folder for frozen FP8 models and exported forward passes")
  add("--resume", action="store_true", help="continue from the checkpoints in --out")
  add("--checkpoint-every", type=int, default=100, help="steps between checkpoints; 0: none")
  processes.add_options(parser)
  return parser


def configure(arguments: argparse.Namespace) -> TrainConfig:
  """Takes the preset, and changes what the command line names."""

  def named(*names: str) -> dict[str, object]:
    given = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}

  preset = PRESETS[arguments.preset]
  shape = dataclasses.replace(preset.shape, **named("remat", "attention"))
  return dataclasses.replace(preset, shape=shape, **named(*TRAINING))


def choose_runs(arguments: argparse.Namespace) -> tuple[Run, ...]:
  suffix = arguments.made and f"-{arguments.made}"
  bf16 = (BF16, FLOOR) if arguments.floor else (BF16,)
  recipes = tuple(run + suffix for run in runs.named_recipes(arguments.recipe))
  if arguments.dtype == "float16":
    bf16, recipes = (*bf16, FLOAT16), tuple(f"{run}-{FLOAT16}" for run in recipes)
  return {"bf16": bf16, "fp8": recipes, "both": bf16 + recipes}[arguments.precision]


def folders(arguments: argparse.Namespace) -> Iterator[tuple[Run, Path]]:
  """The runs, each with the folder of its checkpoints."""
  for run in choose_runs(arguments):
    yield run, arguments.out / "checkpoints" / run


def introduce(
  arguments: argparse.Namespace, config: TrainConfig, corpus: Corpus, console: Console
) -> None:
  """Says what will happen, and how long it takes on a CPU."""
  chosen, per_step = choose_runs(arguments), CPU_SECONDS.get(arguments.preset)
  say(
    console,
    f"This trains a decoder with {config.shape.parameters:,} parameters to predict the next byte "
    f"of {corpus.name}: {config.steps:,} steps each of {', '.join(map(label, chosen))}.",
    "All runs have the same seed, batches and optimizer. The gap between their losses is what FP8 "
    "changes, and chance: any small change makes two runs drift apart.",
  )
  if on_cpu() and per_step:
    size = config.steps * config.batch_size / PRESETS[arguments.preset].batch_size
    seconds = sum(COMPILE_SECONDS + size * per_step[recipe_of(run) is not None] for run in chosen)
    say(console, f"On two CPU cores, this takes about {max(1, round(seconds / 60))} min.")


def check(arguments: argparse.Namespace, config: TrainConfig, corpus: Corpus) -> None:
  """Raises UsageError if processes or checkpoints rule out what was asked for."""
  asked = {name: str(getattr(arguments, name)) for name in SAME_IN_EACH_PROCESS}
  processes.require_same([choose_runs(arguments), config.as_dict(), corpus.digest, asked])
  if arguments.export and (count := jax.process_count()) > 1:
    raise UsageError(
      f"--export: is for one process; got {count}. Train with these, then run one process with "
      "--resume: it continues from the last checkpoint."
    )
  for run, folder in folders(arguments):
    with open_checkpoints(config, run, corpus, folder) as checkpoints:
      checkpoints.find(resume=arguments.resume)


def require_attention(config: TrainConfig) -> None:
  """Raises UsageError if the attention kernel can't be trained with."""
  if config.shape.attention == "cudnn" and (backend := jax.default_backend()) != "gpu":
    raise UsageError(
      f"--attention: cudnn trains on a GPU only; got {backend}. Use --attention xla."
    )


def train_all(
  arguments: argparse.Namespace,
  config: TrainConfig,
  corpus: Corpus,
  console: Console,
  devices: Devices,
) -> list[Record]:
  """Trains what is asked for, one run after the other, and exports it."""
  records: list[Record] = []
  options = {"resume": arguments.resume, "checkpoint_every": arguments.checkpoint_every}
  for run, folder in folders(arguments):
    note = lambda text, run=run: say(console, f"{label(run)}: {text}")
    record, variables = train(
      config, run, corpus, folder=folder, devices=devices, note=note, **options
    )
    if arguments.export and recipe_of(run) is not None:
      record["export"] = export_run(config, run, corpus, variables, arguments.export / run)
    records.append(record)
  return records


def compare(arguments: argparse.Namespace) -> None:
  """Explains, trains and reports."""
  out, chosen = arguments.out, choose_runs(arguments)
  console, devices = output.make_console(), Devices.every()
  console.quiet = not processes.speaks()
  config, corpus = configure(arguments), Corpus.of_preset(arguments.preset, arguments.text)
  introduce(arguments, config, corpus, console)
  check(arguments, config, corpus)
  # Before any array of the model's size is made.
  reports = explain_steps(config, chosen, arguments.explain, console)
  whole = reports if arguments.explain and processes.speaks() else {}
  write_reports(whole, out)
  require_attention(config)
  with processes.ending_at_once():
    records = train_all(arguments, config, corpus, console, devices)
  document = make_document(records, reports, config, corpus, len(devices.devices))
  if whole:
    document["explain"] = {run: report.to_dict() for run, report in whole.items()}
  show(document, console)
  say(console, *recorded.sentences(config, corpus.name, chosen))
  if processes.speaks():
    output.write_json(out, "results", document)
    output.save(draw(document), out, "curves")
  suggest(arguments, console)


def suggest(arguments: argparse.Namespace, console: Console) -> None:
  """Says where the results are, and what to try next."""
  out = arguments.out
  say(console, f"Plot: {out / 'curves.png'}", f"Numbers: {out / 'results.json'}", "Next:")
  again = f"  python benchmarks/train_lm.py --preset {arguments.preset}"
  say(console, f"{again} --recipe all --out runs/recipes    # compares all recipes")
  say(console, "  python benchmarks/convergence.py  # many seeds: the mean gap, with its interval")
  say(console, f"{again} --explain h200 --out runs/explain  # reports on the step for an H200")
  say(console, "  docs/index.md  # guides: your own model in FP8")


def main(argv: list[str] | None = None) -> int:
  """Runs the benchmark; returns 2 if the command line asks for something impossible."""
  arguments = make_options().parse_args(argv)
  if arguments.redraw:
    output.save(draw(output.read_json(arguments.out, "results")), arguments.out, "curves")
    return 0
  allow_missing_cuda()
  try:
    processes.connect(arguments)
    compare(arguments)
  except UsageError as error:
    print(f"train_lm: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
