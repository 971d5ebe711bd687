"""Does FP8 train like BF16?

    python benchmarks/convergence.py                          # the recipes, with 16 seeds
    python benchmarks/convergence.py                          # the same command again: continues
    python benchmarks/convergence.py --question parts --seeds 12
    python benchmarks/convergence.py --preset gpu --arms bf16 "bf16, fp8-sized" delayed --seeds 4
    python benchmarks/convergence.py --report                 # tables of what was trained so far

A trial trains one arm from one seed. All arms of a seed begin with the same parameters and see the
same batches in the same order. An arm is BF16, FP8 with one recipe, or a variant of these. Each is
paired with BF16, and a pair's ``gap = 100 * (loss / loss of BF16 - 1)``, in percent.

Three losses are compared: the mean training loss of the last 300 steps, the loss of a fixed
held-out text at the end, and that loss of the trained weights in a BF16 model. Held-out losses are
also taken at 16 gates during training. For the mean gap of all pairs, the result has a 95 %
interval, and two one-sided tests of equivalence with margins that were fixed beforehand.

The floor is the gap of BF16 to itself, from parameters changed by one unit in the last place, or by
2.6 %, as E4M3 rounds. It shows how far chance moves a pair. Controls must be found worse: scales
that stay 1, E5M2 in the forward pass, and ``most_recent`` with spikes in the loss.

Questions: ``recipes`` (with floor and controls), ``parts``, ``layers``, ``remedies``, and ``size``
for other presets. Each trial leaves a file in ``--out``, from which the same command continues.
Equal seeds give equal files. Runs with other values of ``--first-seed`` into one ``--out`` are
pooled.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.environment import environment, on_cpu
from harness.output import make_console, make_parser, positive, redraw, say, write_json
from lm.config import TrainConfig
from lm.text import Corpus
from trials.arms import ARMS, GATES, QUESTIONS, Arm
from trials.files import read, sweep
from trials.report import draw, make_content, show
from trials.sizes import PRESETS_OF_TRIALS

WIDTH = 150  # of the tables, where the output is no terminal


def make_options() -> argparse.ArgumentParser:
  parser = make_parser(__doc__)
  parser.set_defaults(out=Path("runs/convergence"))
  add = parser.add_argument
  add("--preset", choices=PRESETS_OF_TRIALS, default="tiny", help="size of model and run")
  add("--question", choices=QUESTIONS, nargs="+", default=["recipes"], help="arms to train")
  add("--arms", choices=ARMS, nargs="+", help="train these arms instead")
  add("--seeds", type=positive, default=16, help="trials of each arm; default: 16")
  add("--first-seed", type=int, default=0, help="seeds count from here")
  add("--steps", type=positive, help=f"optimizer steps, a multiple of {GATES}")
  add("--batch-size", type=positive, help="sequences per step")
  add("--jobs", type=positive, help="processes; default: 2 on a CPU, 1 on a GPU")
  add("--report", action="store_true", help="train nothing, report what --out has")
  return parser


def configure(arguments: argparse.Namespace) -> TrainConfig:
  config = PRESETS_OF_TRIALS[arguments.preset]
  named = {"steps": arguments.steps, "batch_size": arguments.batch_size}
  return dataclasses.replace(config, **{name: value for name, value in named.items() if value})


def choose(arguments: argparse.Namespace) -> Sequence[Arm]:
  """The arms to train, each once, and the BF16 arms that they are paired with."""
  asked = arguments.arms or [arm.name for name in arguments.question for arm in QUESTIONS[name]]
  needed = {ARMS[name].base for name in asked} | set(asked)
  return [arm for name, arm in ARMS.items() if name in needed]


def report(arguments: argparse.Namespace, trials: Mapping[str, Any], config: TrainConfig) -> None:
  settings = {key: value for key, value in config.as_dict().items() if key != "seed"}
  content = {"environment": environment(), "preset": arguments.preset, "config": settings}
  content |= {"text": Corpus.of_preset(arguments.preset).as_dict()} | make_content(trials)
  write_json(arguments.out, name_of(arguments), content)
  show(content, make_console(WIDTH))


def name_of(arguments: argparse.Namespace) -> str:
  return f"convergence_{arguments.preset}"


def main(argv: list[str] | None = None) -> None:
  arguments = make_options().parse_args(argv)
  if not arguments.redraw:
    config, corpus = configure(arguments), Corpus.of_preset(arguments.preset)
    folder = arguments.out / "trials" / arguments.preset
    if not arguments.report:
      seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
      jobs = arguments.jobs or (2 if on_cpu() else 1)
      note = lambda text: say(make_console(), text)
      sweep(config, choose(arguments), corpus, seeds, folder, jobs=jobs, note=note)
    report(arguments, read(folder, config, corpus), config)
  redraw(arguments.out, name_of(arguments), draw)


if __name__ == "__main__":
  main()
