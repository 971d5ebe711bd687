"""Does a run whose processes are killed, again and again, end where the unbroken run ends?

    python benchmarks/kill_and_resume.py        # no GPU needed; about ten minutes on two CPU cores

``train_lm.py --preset micro`` trains in FP8 as two processes, with a checkpoint every second step.
At a random moment one of them is killed outright (SIGKILL): while it starts, between steps, or in
the middle of a save. The other ends by itself, or is ended; both are started again with
``--resume``; and so on, 20 times, to the end. Checked after every kill, and at the end::

    resumed step = newest complete checkpoint on disk >= last checkpoint reported saved
    final state, losses = those of a run that was never killed, bit for bit

The moments are drawn from ``--seed``: a quarter of the kills falls within the time that a start
takes, the others are spread over the run, each within the time of two saves.
"""

import argparse
import dataclasses
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from lm.checkpoints import read_newest
from lm.config import PRESETS
from lm.files import write_text
from lm.launch import Group
from lm.options import not_negative, positive
from lm.report import environment
from lm.step import step_shapes

RESULTS = Path(__file__).resolve().parent / "results"
PRESET, RUN = "micro", "delayed"
GRACE_SECONDS = 15.0
CHECKPOINT_EVERY = 2
STEPS_BETWEEN_KILLS = 8
STARTING = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kill:
  """One kill, as it is planned.

  Attributes:
    process: which one.
    after_step: the reported checkpoint from which the delay counts; None counts from the start.
    delay: of a start's duration, or of the time of two saves; from 0 to 1.
  """

  process: int
  after_step: int | None
  delay: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
  """What a kill left behind.

  Attributes:
    kill: the plan.
    resumed: the step after which this life of the run had begun.
    reported: the last checkpoint reported saved, in this life or before.
    complete: the newest complete checkpoint on disk.
    in_save: whether an unfinished checkpoint lay beside it.
    ended: how many of the others had to be ended.
  """

  kill: Kill
  resumed: int
  reported: int
  complete: int
  in_save: bool
  ended: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
  """How long things take here, in seconds, as the unbroken run shows.

  Attributes:
    start: from the start to the first step.
    saves: from one checkpoint to the next but one.
  """

  start: float
  saves: float


def plan(kills: int, processes: int, seed: int) -> list[Kill]:
  """Draws the kills: whom, and when."""
  draw = random.Random(seed)
  starting = set(draw.sample(range(kills), round(STARTING * kills)))
  return [
    Kill(
      process=draw.randrange(processes),
      after_step=None if index in starting else (index + 1) * STEPS_BETWEEN_KILLS,
      delay=draw.random(),
    )
    for index in range(kills)
  ]


def total_steps(kills: int) -> int:
  """Steps enough for every kill to find the run running."""
  return (kills + 2) * STEPS_BETWEEN_KILLS


def checkpoints(out: Path) -> Path:
  """The folder of the run's checkpoints."""
  return out / "checkpoints" / RUN


def newest(out: Path) -> int:
  """The newest checkpoint that was renamed into place; 0 without one."""
  folder = checkpoints(out)
  names = [path.name for path in folder.iterdir()] if folder.exists() else []
  return max((int(name) for name in names if name.isdecimal()), default=0)


def in_save(out: Path) -> bool:
  """Whether there is a checkpoint that is not complete."""
  folder = checkpoints(out)
  return folder.exists() and any(not path.name.isdecimal() for path in folder.iterdir())


class Runs:
  """Starts the same run over and over."""

  def __init__(self, processes: int, kills: int, folder: Path) -> None:
    """Keeps what does not change."""
    self.processes, self.steps, self.folder = processes, total_steps(kills), folder

  def start(self, name: str) -> Group:
    """Starts the processes on the folder of that name; from its checkpoint, if there is one."""
    out = self.folder / name
    options = ["--preset", PRESET, "--precision", "fp8", "--recipe", RUN, "--explain", "none"]
    options += ["--steps", f"{self.steps}", "--checkpoint-every", f"{CHECKPOINT_EVERY}"]
    options += ["--out", str(out), "--resume"]
    return Group(options, out / "logs", processes=self.processes)

  def unbroken(self) -> Pace:
    """Runs without a kill."""
    begun, times = time.perf_counter(), list[float]()
    with self.start("unbroken") as group:
      for count in range(1, self.steps // CHECKPOINT_EVERY + 1):
        group.wait_until(lambda wanted=count: len(group.saved) >= wanted)
        times.append(time.perf_counter())
      group.finish()
    saves = 2 * statistics.median(np.diff(times).tolist())
    return Pace(start=times[0] - begun, saves=saves)

  def killed(self, kill: Kill, reported: int, pace: Pace) -> Found:
    """Starts or resumes the run, and kills one of its processes.

    Raises:
      RuntimeError: it did not go on from the newest complete checkpoint, or that is older than one
        that was reported saved.
    """
    out = self.folder / "killed"
    before = newest(out)
    with self.start("killed") as group:
      if kill.after_step is None:
        time.sleep(kill.delay * pace.start)
      else:
        group.wait_until(lambda: bool(group.saved) and group.saved[-1] >= (kill.after_step or 0))
        time.sleep(kill.delay * pace.saves)
      group.kill(kill.process)
      ended = group.end(GRACE_SECONDS)
      require_resumed(group, before)
      found = Found(
        kill=kill,
        resumed=group.resumed,
        reported=max([reported, *group.saved]),
        complete=newest(out),
        in_save=in_save(out),
        ended=ended,
      )
    if found.complete < found.reported:
      raise RuntimeError(
        "kill_and_resume: a checkpoint that was reported saved must be there after a kill; got "
        f"{found}. Look into {out}."
      )
    return found

  def to_the_end(self) -> int:
    """Resumes the run and lets it end; gives the step after which it went on."""
    before = newest(self.folder / "killed")
    with self.start("killed") as group:
      group.finish()
      require_resumed(group, before)
      return group.resumed


def require_resumed(group: Group, newest: int) -> None:
  """Raises where a run that said where it goes on from did not mean the newest checkpoint."""
  if "goes on after" in group.said and group.resumed != newest:
    raise RuntimeError(
      "kill_and_resume: a run must go on from the newest complete checkpoint; got step "
      f"{group.resumed}, and {newest} on disk."
    )
  if "starts anew" in group.said and newest:
    raise RuntimeError(f"kill_and_resume: a run must not start anew; got {newest} on disk.")


def final(out: Path, steps: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """The last checkpoint's leaves, and the losses of ``results.json``."""
  state, _ = step_shapes(dataclasses.replace(PRESETS[PRESET], steps=steps), RUN)
  leaves = jax.tree_util.tree_leaves_with_path(read_newest(checkpoints(out), state))
  run = json.loads((out / "results.json").read_text())["runs"][RUN]
  curves = {name: run[name] for name in ("train_curve", "validation_curve")}
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}, curves


def compare(runs: Runs) -> dict[str, Any]:
  """Holds the end of the killed run against that of the unbroken one."""
  (got, curves), (want, wanted) = (
    final(runs.folder / name, runs.steps) for name in ("killed", "unbroken")
  )
  return {
    "leaves": len(want),
    "bytes": sum(leaf.nbytes for leaf in want.values()),
    "differing_leaves": [name for name in want if got[name].tobytes() != want[name].tobytes()],
    "losses_equal": curves == wanted,
    "final_step": int(got[".step"]),
    "final_loss": wanted["validation_curve"][-1][1],
  }


def measure(arguments: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
  """Runs everything; gives the answer in JSON's types."""
  runs = Runs(arguments.processes, arguments.kills, folder)
  pace, reported, all_found = runs.unbroken(), 0, list[Found]()
  console.print(f"Unbroken: {runs.steps} steps, {pace}", highlight=False, soft_wrap=True)
  for number, kill in enumerate(plan(arguments.kills, arguments.processes, arguments.seed), 1):
    found = runs.killed(kill, reported, pace)
    all_found.append(found)
    reported = found.reported
    console.print(f"Kill {number}: {found}", highlight=False, soft_wrap=True)
  last = runs.to_the_end()
  return {
    "environment": environment(),
    "processes": arguments.processes,
    "steps": runs.steps,
    "checkpoint_every": CHECKPOINT_EVERY,
    "seed": arguments.seed,
    "seconds": dataclasses.asdict(pace),
    "kills": [dataclasses.asdict(found) for found in all_found],
    "kills_in_a_save": sum(found.in_save for found in all_found),
    "kills_of_process_0": sum(found.kill.process == 0 for found in all_found),
    "ended_by_hand": sum(found.ended for found in all_found),
    "last_life_resumed_after": last,
    "end": compare(runs),
  }


def make_parser() -> argparse.ArgumentParser:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--processes", type=positive, default=2)
  parser.add_argument("--kills", type=positive, default=20)
  parser.add_argument("--seed", type=not_negative, default=0, help="of whom and when")
  parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
  parser.add_argument("--work", type=Path, help="folder of both runs; default: a temporary one")
  return parser


def main(argv: list[str] | None = None) -> int:
  """Runs the benchmark; ``argv`` is the command line, None the process's own.

  Returns:
    0, or 1 where the killed run ended elsewhere.
  """
  arguments, console = make_parser().parse_args(argv), Console()
  with tempfile.TemporaryDirectory() as temporary:
    found = measure(arguments, arguments.work or Path(temporary), console)
  path = arguments.out / "kill_and_resume.json"
  write_text(path, json.dumps(found, indent=1) + "\n")
  end = found["end"]
  same = end["losses_equal"] and not end["differing_leaves"]
  count, in_saves = len(found["kills"]), found["kills_in_a_save"]
  console.print(
    f"{count} kills, {in_saves} of them in a save: the final state is "
    f"{'the same, bit for bit' if same else 'another'}. Wrote {path}",
    highlight=False,
    soft_wrap=True,
  )
  return 0 if same else 1


if __name__ == "__main__":
  sys.exit(main())
