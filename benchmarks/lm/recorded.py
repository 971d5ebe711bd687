"""What ``convergence.py`` found for the same model and schedule, to be printed beside one pair."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.output import RESULTS
from lm.config import TrainConfig
from lm.runs import FLOOR, Run, label

# How often a run is validated, and its seed, do not change what is learned.
OTHER = {"seed", "validate_every", "validation_batches", "remat", "attention"}
ARMS = {FLOOR: "bf16, fp8-sized"}  # names there that differ from names here


def find(config: TrainConfig, folder: Path = RESULTS) -> dict[str, Any]:
  """The comparisons of arms with BF16 that were made with this configuration; empty if none."""
  asked = {key: value for key, value in config.as_dict().items() if key not in OTHER}
  for path in sorted(folder.glob("convergence_*.json")):
    content = json.loads(path.read_text())
    if {key: value for key, value in content["config"].items() if key not in OTHER} == asked:
      arms = content["arms"]
      return {name: arm["compared"] for name, arm in arms.items() if "compared" in arm}
  return {}


def percent(of: Mapping[str, Any]) -> str:
  low, high = of["interval"]
  return f"{of['mean']:+.2f} % [{low:+.2f}, {high:+.2f}]"


def sentences(config: TrainConfig, runs: Iterable[Run], folder: Path = RESULTS) -> Iterator[str]:
  """One sentence for each run that was compared before, with 95 % intervals."""
  found = find(config, folder)
  for run in runs:
    if of := found.get(ARMS.get(run, run)):
      training, held_out = percent(of["training"]), percent(of["held_out"])
      yield (
        f"Recorded over {of['training']['pairs']} seeds, {label(run)} against BF16: training loss "
        f"{training}, validation loss {held_out}."
      )
