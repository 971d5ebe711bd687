"""Files of trials: one for each arm and seed, complete or absent, so that a sweep can continue.

A sweep divides the seeds of each arm among ``jobs`` processes. On a CPU each has one core.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from harness.environment import on_cpu
from harness.output import write_text
from lm.checkpoints import require_identity
from lm.config import TrainConfig
from lm.text import Corpus
from trials.arms import Arm
from trials.proof import count_fp8_gemms
from trials.trial import Record, run_trial

Note = Callable[[str], None]


def identify(config: TrainConfig, corpus: Corpus) -> dict[str, Any]:
  """Everything that decides a trial besides arm and seed, in JSON's types."""
  settings = {key: value for key, value in config.as_dict().items() if key != "seed"}
  return settings | {
    "text": corpus.digest,
    "jax": jax.__version__,
    "flax": metadata.version("flax"),
    "optax": metadata.version("optax"),
    "device": jax.devices()[0].device_kind,
  }


def path_of(folder: Path, arm: str, seed: int) -> Path:
  return folder / re.sub(r"\W+", "_", arm.lower()) / f"{seed}.json"


def missing(folder: Path, arm: Arm, seeds: Iterable[int]) -> list[int]:
  return [seed for seed in seeds if not path_of(folder, arm.name, seed).exists()]


def train_arm(
  config: TrainConfig, arm: Arm, corpus: Corpus, seeds: Sequence[int], folder: Path
) -> str:
  """Trains one arm with some seeds, writes a file for each, and says what it did."""
  identity = identify(config, corpus)
  proof = "" if on_cpu() else f"; {count_fp8_gemms(config, arm)}"
  for seed in seeds:
    record = run_trial(dataclasses.replace(config, seed=seed), arm, corpus)
    content = {"identity": identity} | record
    write_text(path_of(folder, arm.name, seed), json.dumps(content) + "\n")
  return f"{arm.name}: trained with seeds {', '.join(map(str, seeds))}{proof}"


def sweep(
  config: TrainConfig,
  arms: Iterable[Arm],
  corpus: Corpus,
  seeds: Sequence[int],
  folder: Path,
  *,
  jobs: int,
  note: Note,
) -> None:
  """Trains each arm with each seed that has no file yet."""
  tasks = [
    (config, arm, corpus, left[part::jobs], folder)
    for arm in arms
    if (left := missing(folder, arm, seeds))
    for part in range(jobs)
    if left[part::jobs]
  ]
  for done in run_tasks(tasks, jobs):
    note(done)


def run_tasks(tasks: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[str]:
  if jobs == 1:
    yield from (train_arm(*task) for task in tasks)
    return
  context = multiprocessing.get_context("spawn")
  cores = context.Queue()
  for core in range(jobs):
    cores.put(core)
  with concurrent.futures.ProcessPoolExecutor(jobs, context, take_core, (cores,)) as pool:
    futures = [pool.submit(train_arm, *task) for task in tasks]
    try:
      yield from (future.result() for future in concurrent.futures.as_completed(futures))
    finally:
      pool.shutdown(cancel_futures=True)


def take_core(cores: Any) -> None:
  """Keeps this process on one core; processes that share cores slow each other down."""
  core = cores.get()
  if hasattr(os, "sched_setaffinity"):
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {allowed[core % len(allowed)]})


def read(folder: Path, config: TrainConfig, corpus: Corpus) -> dict[str, dict[int, Record]]:
  """All trials of a folder, by arm and seed.

  Raises:
    UsageError: a file has other settings, versions or text.
  """
  identity = identify(config, corpus)
  found: dict[str, dict[int, Record]] = {}
  for path in sorted(folder.glob("*/*.json")):
    record = json.loads(path.read_text())
    require_identity(identity, record.pop("identity"), f"--out: {path}")
    found.setdefault(record["arm"], {})[record["seed"]] = record
  return found
