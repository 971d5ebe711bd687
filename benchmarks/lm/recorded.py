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


def find(config: TrainConfig, text: str, folder: Path) -> dict[str, Any]:
  """The comparisons with BF16 of this configuration and name of a text; empty if none."""
  asked = {key: value for key, value in config.as_dict().items() if key not in OTHER}
  for path in sorted(folder.glob("convergence_*.json")):
    content = json.loads(path.read_text())
    made = {key: value for key, value in content["config"].items() if key not in OTHER}
    if made == asked and content["text"]["name"] == text:
      arms = content["arms"]
      return {name: arm["compared"] for name, arm in arms.items() if "compared" in arm}
  return {}


def percent(of: Mapping[str, Any]) -> str:
  low, high = of["interval"]
  return f"{of['mean']:+.2f} % [{low:+.2f}, {high:+.2f}]"


def sentences(
  config: TrainConfig, text: str, runs: Iterable[Run], folder: Path = RESULTS
) -> Iterator[str]:
  """One sentence for each run that was compared before, with 95 % intervals."""
  found = find(config, text, folder)
  for run in runs:
    if of := found.get(ARMS.get(run, run)):
      training, held_out = percent(of["training"]), percent(of["held_out"])
      yield (
        f"Recorded over {of['training']['pairs']} seeds, {label(run)} against BF16: training loss "
        f"{training}, validation loss {held_out}."
      )
