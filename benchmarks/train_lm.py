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
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import flax_fp8 as fp8
from flax_fp8.doctor import allow_missing_cuda
from flax_fp8.explain.target import NAMES
from harness import output
from harness.environment import on_cpu
from harness.output import positive, say
from lm import processes, runs
from lm.config import CPU_SECONDS_PER_STEP, PRESETS, TrainConfig, UsageError
from lm.devices import Devices
from lm.explain import NONE, Reports, explain_steps, write_reports
from lm.export import export_run
from lm.model import Transformer
from lm.progress import showing
from lm.report import draw, make_document, show
from lm.runs import BF16, Run, label, recipe_of
from lm.text import Corpus
from lm.train import Record, open_checkpoints, train

SAME_IN_EACH_PROCESS = ("out", "export", "explain", "resume", "checkpoint_every")
TRAINING = ("steps", "batch_size", "seed", "calibrate")
COMPILE_SECONDS = 12.0  # per run, explained and trained, on a CPU
PRECISIONS, DTYPES = ("bf16", "fp8", "both"), ("bfloat16", "float16")
EXPLAIN = "GPU: print the whole report of each step as compiled for it; none: compile no step"


def make_options() -> argparse.ArgumentParser:
  """The command line. What it leaves out comes from the preset."""
  parser = output.make_parser(__doc__)
  parser.set_defaults(out=Path("runs/train_lm"))
  add, count = parser.add_argument, processes.not_negative
  made = functools.partial(
    parser.add_mutually_exclusive_group().add_argument,
    dest="made",
    action="store_const",
    default="",
  )
  recipes: dict[str, Any] = {"choices": runs.RECIPE_CHOICES, "nargs": "+", "default": ["delayed"]}
  add("--precision", choices=PRECISIONS, default="both", help="what to train; default: both")
  add("--recipe", **recipes, help="recipes of the FP8 runs; default: delayed")
  made("--fused", const=runs.FUSED, help="FP8 runs fuse the projections q, k, v, and gate, up")
  made("--convert", const=runs.CONVERTED, help="FP8 runs convert the model with fp8_linear_layers")
  add("--dtype", choices=DTYPES, default="bfloat16", help="of activations; default: bfloat16")
  add("--calibrate", type=count, help="training batches that calibrate FP8 state before step 0")
  add("--preset", choices=PRESETS, default="tiny", help="sizes of model and run; default: tiny")
  add("--text", type=Path, help="text file to learn; default: Python's language reference")
  add("--steps", type=positive, help="optimizer steps")
  add("--batch-size", type=positive, help="sequences per step")
  add("--seed", type=count, help="seed of parameters and batches")
  add("--remat", action="store_true", default=None, help="recompute blocks in the backward pass")
  add("--attention", choices=("xla", "cudnn"), help="attention kernel; cudnn needs a GPU")
  add("--explain", choices=(*NAMES, NONE), help=EXPLAIN)
  add("--export", type=Path, help="folder for frozen FP8 models and exported forward passes")
  add("--resume", action="store_true", help="continue from the checkpoints in --out")
  add("--checkpoint-every", type=count, default=100, help="steps between checkpoints; 0: none")
  processes.add_options(parser)
  return parser


def explains(arguments: argparse.Namespace) -> bool:
  """Whether whole reports are asked for."""
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
  suffix = arguments.made and f"-{arguments.made}"
  bf16, recipes = (BF16,), tuple(run + suffix for run in runs.named_recipes(arguments.recipe))
  if arguments.dtype == "float16":
    bf16, recipes = (BF16, runs.in_float16(BF16)), tuple(map(runs.in_float16, recipes))
  return {"bf16": bf16, "fp8": recipes, "both": bf16 + recipes}[arguments.precision]


def folders(arguments: argparse.Namespace) -> Iterator[tuple[Run, Path]]:
  """The runs, each with the folder of its checkpoints."""
  for run in choose_runs(arguments):
    yield run, arguments.out / "checkpoints" / run


def introduce(
  arguments: argparse.Namespace, config: TrainConfig, corpus: Corpus, console: Console
) -> None:
  """Says what will happen, and how long it takes on a CPU."""
  chosen, per_step = choose_runs(arguments), CPU_SECONDS_PER_STEP.get(arguments.preset)
  say(
    console,
    f"This trains a decoder with {config.shape.parameters:,} parameters to predict the next byte "
    f"of {corpus.name}: {config.steps:,} steps each of {', '.join(map(label, chosen))}.",
    "All runs have the same seed, batches and optimizer. So the gap between their validation "
    "losses is what FP8 changes.",
  )
  if on_cpu() and per_step:
    size = config.steps * config.batch_size / PRESETS[arguments.preset].batch_size
    seconds = sum(COMPILE_SECONDS + size * per_step[recipe_of(run) is not None] for run in chosen)
    say(console, f"On two CPU cores it takes about {max(1, round(seconds / 60))} min.")


def check(
  arguments: argparse.Namespace, config: TrainConfig, corpus: Corpus, devices: Devices
) -> None:
  """Raises UsageError if devices, processes or checkpoints rule out what was asked for."""
  asked = {name: str(getattr(arguments, name)) for name in SAME_IN_EACH_PROCESS}
  processes.require_same([choose_runs(arguments), config.as_dict(), corpus.digest, asked])
  devices.require_even(config.batch_size)
  if arguments.export:
    processes.require_alone("--export")
  for run, folder in folders(arguments):
    with open_checkpoints(config, run, corpus, folder) as checkpoints:
      checkpoints.find(resume=arguments.resume)


def require_attention(config: TrainConfig) -> None:
  """Raises UsageError if the attention kernel can't be trained with."""
  if config.shape.attention == "cudnn" and (backend := jax.default_backend()) != "gpu":
    raise UsageError(
      f"--attention: cudnn trains on a GPU only; got {backend}. Use --attention xla."
    )


def show_dry_runs(config: TrainConfig, chosen: tuple[Run, ...], console: Console) -> None:
  """Prints which layers each conversion takes, and by which rule; nothing is computed."""
  tokens = jax.ShapeDtypeStruct((config.batch_size, config.seq_len), jnp.int32)
  for run in chosen:
    if (recipe := recipe_of(run)) is not None and runs.has(run, runs.CONVERTED):
      report = fp8.Fp8Config(recipe=recipe).report(Transformer(config.shape), tokens)
      console.out(f"{label(run)}, dry run:", report, sep="\n", highlight=False)


def prove(arguments: argparse.Namespace, config: TrainConfig, console: Console) -> Reports:
  """Reports on each run's step before any array of the model's size is made."""
  show_dry_runs(config, choose_runs(arguments), console)
  reports = explain_steps(config, choose_runs(arguments), arguments.explain, console)
  if explains(arguments) and processes.speaks():
    write_reports(reports, arguments.out)
    say(console, f"Wrote explain_*.md and explain_*.png to {arguments.out}")
  return reports


def run_all(
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
    with showing(console, label(run), config.steps) as display:
      record, variables = train(
        config, run, corpus, folder=folder, devices=devices, display=display, **options
      )
    if arguments.export and recipe_of(run) is not None:
      export = export_run(config, run, corpus, variables, arguments.export / run)
      record["export"] = export
    records.append(record)
  return records


def suggest(arguments: argparse.Namespace, console: Console) -> None:
  """Says where the results are, and what to try next."""
  out = arguments.out
  say(console, f"Plot: {out / 'curves.png'}", f"Numbers: {out / 'results.json'}", "Next:")
  again = f"  python benchmarks/train_lm.py --preset {arguments.preset}"
  if len(arguments.recipe) == 1 and arguments.recipe != ["all"]:
    say(console, f"{again} --recipe all --out runs/recipes    # compares all recipes")
  if not explains(arguments):
    say(console, f"{again} --explain h200 --out runs/explain  # reports on the step for an H200")
  say(console, "  docs/index.md                             # guides: your own model in FP8")


def main(argv: list[str] | None = None) -> int:
  """Runs the benchmark; returns 2 if the command line asks for something impossible."""
  arguments = make_options().parse_args(argv)
  if arguments.redraw:
    output.save(draw(output.read_json(arguments.out, "results")), arguments.out, "curves")
    return 0
  allow_missing_cuda()
  try:
    processes.connect(arguments)
    console, devices = output.make_console(), Devices.every()
    console.quiet = not processes.speaks()
    runs.require_fp8_hardware(choose_runs(arguments))
    config, corpus = configure(arguments), Corpus.read(arguments.text)
    introduce(arguments, config, corpus, console)
    check(arguments, config, corpus, devices)
    reports = prove(arguments, config, console)
    require_attention(config)
    with processes.ending_at_once():
      records = run_all(arguments, config, corpus, console, devices)
  except UsageError as error:
    print(f"train_lm: {error}", file=sys.stderr)
    return 2
  document = make_document(records, reports, config, corpus, len(devices.devices))
  if explains(arguments):
    document["explain"] = {run: report.to_dict() for run, report in reports.items()}
  show(document, console)
  if processes.speaks():
    output.write_json(arguments.out, "results", document)
    output.save(draw(document), arguments.out, "curves")
  suggest(arguments, console)
  return 0


if __name__ == "__main__":
  sys.exit(main())
