"""Does a run whose processes are killed, again and again, end where the unbroken run ends?

    python -m tests.reliability.kill_and_resume --kills 20    # ten minutes on two CPU cores

``train_lm.py --preset micro`` trains in FP8 as two processes, with a checkpoint every second step.
At a random moment one of them is killed (SIGKILL): while it starts, between steps, or during a
save. The other ends by itself, or is ended. Both start again with ``--resume``, until the run is
complete. After every kill, and at the end::

    resumed step = newest complete checkpoint on disk >= last checkpoint reported as saved
    final state, losses = those of a run that was never killed, bit for bit

``--seed`` decides the moments. A quarter of the kills fall within the time that a start takes. The
others are spread over the run, each within the time of two saves.
"""

import dataclasses
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from harness.environment import environment
from harness.output import make_parser, positive, write_json
from lm.config import PRESETS
from tests.reliability.launch import Group, final_leaves

PRESET, RUN = "micro", "delayed"
GRACE_SECONDS = 15.0
CHECKPOINT_EVERY = 2
STEPS_BETWEEN_KILLS = 8
STARTING = 0.25


def plan(kills, processes, seed):
  """Draws the kills: the process, and the moment.

  Returns:
    Dictionaries of ``process``; ``after_step``, the reported checkpoint from which the delay
    counts, None for the start; and ``delay``, a part of a start's time, or of the time of two
    saves.
  """
  draw = random.Random(seed)
  starting = set(draw.sample(range(kills), round(STARTING * kills)))
  return [
    {
      "process": draw.randrange(processes),
      "after_step": None if index in starting else (index + 1) * STEPS_BETWEEN_KILLS,
      "delay": draw.random(),
    }
    for index in range(kills)
  ]


def newest(folder):
  """The newest complete checkpoint in a folder, or 0; and whether there is an incomplete one."""
  names = [path.name for path in folder.iterdir()] if folder.exists() else []
  complete = [int(name) for name in names if name.isdecimal()]
  return max(complete, default=0), len(complete) < len(names)


def require_resumed(said, resumed, newest):
  """Raises RuntimeError if a run did not continue from the newest complete checkpoint."""
  wrong = "continues after" in said and resumed != newest
  if wrong or ("starts at step 0" in said and newest):
    raise RuntimeError(
      "kill_and_resume: a run must continue from the newest complete checkpoint; got step "
      f"{resumed}, and {newest} on disk."
    )


class Runs:
  """Starts the same run over and over, in a folder of its name."""

  def __init__(self, processes, kills, folder):
    self.processes, self.folder = processes, folder
    self.steps = (kills + 2) * STEPS_BETWEEN_KILLS  # every kill finds the run running

  def start(self, name, processes=None, devices=1):
    options = ["--preset", PRESET, "--precision", "fp8", "--recipe", RUN, "--resume"]
    options += ["--steps", f"{self.steps}", "--checkpoint-every", f"{CHECKPOINT_EVERY}"]
    count = processes or self.processes
    return Group(options, self.folder / name, processes=count, devices=devices)

  def checkpoints(self, name):
    return self.folder / name / "checkpoints" / RUN

  def unbroken(self, *counts):
    """Runs without a kill; returns the seconds of a start, and of two saves."""
    begun, times = time.perf_counter(), []
    with self.start("unbroken", *counts) as group:
      for count in range(1, self.steps // CHECKPOINT_EVERY + 1):
        group.wait_until(lambda count=count: len(group.saved) >= count)
        times.append(time.perf_counter())
      group.finish()
    return {"start": times[0] - begun, "saves": 2 * statistics.median(np.diff(times).tolist())}

  def killed(self, kill, reported, pace):
    """Starts or resumes the run, kills one process, and returns what that left behind."""
    before, _ = newest(self.checkpoints("killed"))
    with self.start("killed") as group:
      if kill["after_step"] is None:
        time.sleep(kill["delay"] * pace["start"])
      else:
        group.wait_until(lambda: max(group.saved, default=0) >= kill["after_step"])
        time.sleep(kill["delay"] * pace["saves"])
      group.kill(kill["process"])
      ended = group.end(GRACE_SECONDS)
      require_resumed(group.said, group.resumed, before)
      complete, in_save = newest(self.checkpoints("killed"))
      found = {"kill": kill, "resumed": group.resumed, "reported": max([reported, *group.saved])}
      found |= {"complete": complete, "in_save": in_save, "ended": ended}
    if complete < found["reported"]:
      raise RuntimeError(
        "kill_and_resume: a checkpoint that was reported as saved must survive a kill; got "
        f"{found}. Look into {self.folder}."
      )
    return found

  def to_the_end(self, *counts):
    """Resumes the run and lets it end; returns the step after which it continued."""
    before, _ = newest(self.checkpoints("killed"))
    with self.start("killed", *counts) as group:
      group.finish()
      require_resumed(group.said, group.resumed, before)
      return group.resumed

  def final(self, name):
    """The leaves of the last checkpoint, and the losses."""
    config = dataclasses.replace(PRESETS[PRESET], steps=self.steps)
    run = json.loads((self.folder / name / "results.json").read_text())["runs"][RUN]
    curves = {key: run[key] for key in ("train_curve", "validation_curve")}
    return final_leaves(self.checkpoints(name), config, RUN), curves

  def compare(self):
    """Compares the end of the killed run with that of the unbroken one."""
    (got, curves), (want, wanted) = self.final("killed"), self.final("unbroken")
    return {
      "leaves": len(want),
      "bytes": sum(leaf.nbytes for leaf in want.values()),
      "differing_leaves": [name for name in want if got[name].tobytes() != want[name].tobytes()],
      "losses_equal": curves == wanted,
      "final_loss": wanted["validation_curve"][-1][1],
    }


def measure(processes, kills, seed, folder, others=()):
  """Runs everything; ``others`` are processes and devices of unbroken run and last life."""
  runs, all_found = Runs(processes, kills, folder), []
  pace = runs.unbroken(*others)
  print(f"Unbroken: {runs.steps} steps, {pace}")
  for number, kill in enumerate(plan(kills, processes, seed), 1):
    reported = all_found[-1]["reported"] if all_found else 0
    all_found.append(runs.killed(kill, reported, pace))
    print(f"Kill {number}: {all_found[-1]}")
  last = runs.to_the_end(*others)
  return {
    "environment": environment(),
    "processes": processes,
    "steps": runs.steps,
    "checkpoint_every": CHECKPOINT_EVERY,
    "seed": seed,
    "seconds": pace,
    "kills": all_found,
    "kills_in_a_save": sum(found["in_save"] for found in all_found),
    "kills_of_process_0": sum(found["kill"]["process"] == 0 for found in all_found),
    "ended_by_hand": sum(found["ended"] for found in all_found),
    "last_life_resumed_after": last,
    "end": runs.compare(),
  }


def main(argv=None):
  """Runs the experiment; returns 1 if the killed run ended elsewhere."""
  parser = make_parser(__doc__)
  parser.add_argument("--processes", type=positive, default=2)
  parser.add_argument("--kills", type=positive, default=20)
  parser.add_argument("--seed", type=int, default=0, help="of processes and moments")
  arguments = parser.parse_args(argv)
  with tempfile.TemporaryDirectory() as folder:
    found = measure(arguments.processes, arguments.kills, arguments.seed, Path(folder))
  write_json(arguments.out, "kill_and_resume", found)
  same = found["end"]["losses_equal"] and not found["end"]["differing_leaves"]
  print(
    f"{arguments.kills} kills, {found['kills_in_a_save']} of them during a save: the final state "
    f"{'is the same, bit for bit' if same else 'differs'}."
  )
  return int(not same)


if __name__ == "__main__":
  sys.exit(main())
