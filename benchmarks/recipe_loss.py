"""Does every recipe train to BF16's loss?

    python benchmarks/recipe_loss.py --seeds 0 1 2 --jobs 2   # every recipe; two runs at a time
    python benchmarks/recipe_loss.py --seeds 0 1 2            # the same command again: goes on
    python benchmarks/recipe_loss.py --seeds 0 1 2 --report   # reads what there is, trains nothing

The runs of ``train_lm.py``: BF16 and FP8 with each recipe, for each seed. A recipe's answer is the
mean over seeds of ``gap = 100 * (loss FP8 / loss BF16 - 1)``, both losses of one seed, beside its
standard error. BF16 itself runs twice, the second time from initial parameters rounded to
bfloat16: its gap is what two runs drift apart by, and a recipe's is to be read against it.

A finished run leaves one file in ``--out``, a killed one its checkpoint; both are used when the
command is given again. ``recipe_loss.json`` and ``recipe_loss.png`` hold the answer.

With ``--jobs N``, N processes share the CPU's cores out among them; on a GPU leave it at 1.
"""

import argparse
import dataclasses
import multiprocessing
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import TypeAlias

from rich.console import Console

from lm.config import PRESETS, TrainConfig
from lm.errors import UsageError
from lm.options import not_negative, positive
from lm.progress import ConsoleDisplay
from lm.runs import (
  ALL,
  BF16,
  BF16_AGAIN,
  RECIPE_CHOICES,
  Run,
  label,
  named_recipes,
  require_fp8_hardware,
)
from lm.sweep import Sweep, draw, read_run, show, write_json, write_run
from lm.text import Corpus, read_corpus
from lm.train import train

Cores: TypeAlias = "SimpleQueue[set[int]]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """One run of the sweep.

  Attributes:
    run: BF16 or a recipe.
    config: what to train, its seed included.
    text: the file to learn; None for Python's language reference.
    out: the sweep's folder.
    checkpoint_every: steps between checkpoints.
  """

  run: Run
  config: TrainConfig
  text: Path | None
  out: Path
  checkpoint_every: int

  @property
  def name(self) -> str:
    """What the run's file and folder are called."""
    return f"{self.run}_seed{self.config.seed}"


def make_parser() -> argparse.ArgumentParser:
  """The command line; what is left out comes from the preset."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--preset", choices=PRESETS, default="small", help="size of model and run")
  add("--recipes", choices=RECIPE_CHOICES, nargs="+", default=[ALL], help="beside BF16")
  add("--seeds", type=not_negative, nargs="+", default=[0, 1, 2])
  add("--text", type=Path, help="file to learn; default: Python's language reference")
  add("--steps", type=positive, help="optimiser steps")
  add("--batch-size", type=positive, help="windows a step")
  add("--jobs", type=positive, default=1, help="runs at a time")
  add("--out", type=Path, default=Path("runs/recipe_loss"), help="folder of all results")
  add("--report", action="store_true", help="train nothing; report on the runs that are finished")
  add("--checkpoint-every", type=not_negative, default=100, help="steps; 0 writes none")
  return parser


def plan(arguments: argparse.Namespace) -> list[Task]:
  """The runs asked for: seed by seed, so that the first gaps are there early."""
  given = {name: getattr(arguments, name) for name in ("steps", "batch_size")}
  changes = {name: value for name, value in given.items() if value is not None}
  same = {name: getattr(arguments, name) for name in ("text", "out", "checkpoint_every")}
  return [
    Task(
      run=run,
      config=dataclasses.replace(PRESETS[arguments.preset], seed=seed, **changes),
      **same,
    )
    for seed in dict.fromkeys(arguments.seeds)
    for run in (BF16, BF16_AGAIN, *named_recipes(arguments.recipes))
  ]


def share_out(jobs: int) -> list[set[int]]:
  """The cores of each of ``jobs`` processes; empty where the system says nothing of cores."""
  if not hasattr(os, "sched_getaffinity"):
    return [set() for _ in range(jobs)]
  cores = sorted(os.sched_getaffinity(0))
  return [set(cores[index % len(cores) :: jobs]) for index in range(jobs)]


def end_with_parent() -> None:
  """Ends this process when its parent was killed, which would leave it training unseen."""
  if (parent := multiprocessing.parent_process()) is not None:
    parent.join()
    os._exit(1)


def prepare(queue: Cores) -> None:
  """Binds this process to cores of its own, before JAX counts them to make its threads."""
  threading.Thread(target=end_with_parent, daemon=True).start()
  if cores := queue.get():
    os.sched_setaffinity(0, cores)


def finish(task: Task) -> None:
  """Trains what is left of one run, and writes its file."""
  corpus = read_corpus(task.text)
  if read_run(task.out, task.name, task.config, task.run, corpus) is not None:
    return
  console = Console(force_terminal=False)  # several runs may write: lines, no bars
  name = f"{label(task.run)}, seed {task.config.seed}"
  with ConsoleDisplay(console, name, task.config.steps) as display:
    result, _ = train(
      task.config,
      task.run,
      corpus,
      folder=task.out / "checkpoints" / task.name,
      resume=True,
      checkpoint_every=task.checkpoint_every,
      display=display,
    )
  write_run(task.out, task.name, task.config, result, corpus)


def finish_all(tasks: list[Task], jobs: int) -> None:
  """Trains what is not finished, ``jobs`` runs at a time, each in a process of its own.

  Raises:
    UsageError: a finished run or a checkpoint in ``out`` is of another configuration.
  """
  context = multiprocessing.get_context("spawn")
  queue: Cores = context.SimpleQueue()
  for cores in share_out(jobs):
    queue.put(cores)
  with ProcessPoolExecutor(jobs, context, initializer=prepare, initargs=(queue,)) as pool:
    futures = [pool.submit(finish, task) for task in tasks]
    try:
      for future in futures:
        future.result()
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


def collect(tasks: list[Task], corpus: Corpus) -> Sweep:
  """Reads the finished runs among ``tasks``."""
  sweep = Sweep()
  for task in tasks:
    if (found := read_run(task.out, task.name, task.config, task.run, corpus)) is not None:
      sweep.add(task.run, task.config.seed, found)
  return sweep


def main(argv: list[str] | None = None) -> int:
  """Runs the benchmark.

  Args:
    argv: the command line without the program's name; None reads the process's own.

  Returns:
    0, or 2 where the command line asked for what cannot be.
  """
  arguments, console = make_parser().parse_args(argv), Console()
  try:
    tasks, corpus = plan(arguments), read_corpus(arguments.text)
    if not arguments.report:
      require_fp8_hardware(task.run for task in tasks)
      finish_all(tasks, arguments.jobs)
    sweep = collect(tasks, corpus)
    if not sweep.runs:
      raise UsageError(f"--report: needs finished runs; got none in {arguments.out}.")
  except UsageError as error:
    print(f"recipe_loss: {error}", file=sys.stderr)
    return 2
  show(sweep, tasks[0].config, console)
  write_json(sweep, tasks[0].config, corpus, arguments.out / "recipe_loss.json")
  draw(sweep).savefig(arguments.out / "recipe_loss.png", dpi=120)
  console.print(f"Wrote recipe_loss.json and recipe_loss.png to {arguments.out}", highlight=False)
  return 0


if __name__ == "__main__":
  sys.exit(main())
