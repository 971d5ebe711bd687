"""Do several processes train to the losses of one?

    python benchmarks/several_processes.py        # no GPU needed; some minutes on two CPU cores

``train_lm.py --preset micro`` trains in BF16 and in FP8 as one, two and four processes of one CPU
device each, and as one process of one, two and four devices; from the same seed, on the same
batches. Compared are the losses of every step and the last state, bit for bit, and as::

    off = max over steps of |loss / loss of one device - 1|

The program is the same for the same number of devices, whoever has them; only who carries the
numbers between them differs. Two devices have one way to add two numbers, so there all bits must be
the same; of four, one process and several add in another order. A batch that is cut into more parts
is added up in more parts: equal up to rounding, here that of bfloat16. What has no order has
the same bits everywhere: the FP8 state after the first step, for amaxes are reduced by max.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import flax_fp8 as fp8
from lm.checkpoints import read_newest
from lm.config import PRESETS
from lm.files import write_text
from lm.launch import Group
from lm.options import positive
from lm.report import environment
from lm.runs import BF16, Run
from lm.step import step_shapes

RESULTS = Path(__file__).resolve().parent / "results"
PRESET, FP8 = "micro", "delayed"
SETUPS = ((1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
  """How a run ended.

  Attributes:
    losses: of every step.
    leaves: of the last checkpoint's state, by path.
  """

  losses: list[float]
  leaves: dict[str, np.ndarray]

  def same(self, other: "Ended", within: str = "") -> bool:
    """Whether the leaves with ``within`` in their path, all without it, are the same bits."""
    names = [name for name in self.leaves if within in name]
    return all(self.leaves[name].tobytes() == other.leaves[name].tobytes() for name in names)

  def off(self, other: "Ended", steps: slice = slice(None)) -> float:
    """The largest relative difference of the losses."""
    mine, others = np.array(self.losses[steps]), np.array(other.losses[steps])
    return float(np.abs(mine / others - 1).max())


def train(folder: Path, run: Run, steps: int, processes: int, devices: int) -> Ended:
  """Trains in processes of their own, in a folder of their own."""
  out = folder / f"{run}_{steps}_{processes}x{devices}"
  options = ["--preset", PRESET, "--precision", "bf16" if run == BF16 else "fp8", "--recipe", FP8]
  options += ["--steps", f"{steps}", "--checkpoint-every", f"{steps}", "--explain", "none"]
  with Group(
    [*options, "--out", str(out)], out / "logs", processes=processes, devices=devices
  ) as group:
    group.finish()
  shapes, _ = step_shapes(dataclasses.replace(PRESETS[PRESET], steps=steps), run)
  state = read_newest(out / "checkpoints" / run, shapes)
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return Ended(
    losses=json.loads((out / "results.json").read_text())["runs"][run]["train_curve"],
    leaves={jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves},
  )


def measure(folder: Path, run: Run, steps: int) -> list[dict[str, Any]]:
  """Trains in every setup, and compares; one entry a setup, in JSON's types."""
  rows, ended, first = list[dict[str, Any]](), dict[tuple[int, int], Ended](), None
  for processes, devices in SETUPS:
    got = ended[processes, devices] = train(folder, run, steps, processes, devices)
    row: dict[str, Any] = {"processes": processes, "devices": processes * devices}
    one_device, one_process = ended[1, 1], ended[1, processes * devices]
    row["losses_as_one_process"] = got.losses == one_process.losses
    row["state_as_one_process"] = got.same(one_process)
    row["first_loss_off"] = got.off(one_device, slice(1))
    row["off"] = got.off(one_device)
    if run != BF16:
      once = train(folder, run, 1, processes, devices)
      first = first or once
      row["first_fp8_state_as_one_device"] = once.same(first, fp8.OVERWRITE_WITH_GRADIENT)
    rows.append(row | {"losses": got.losses})
  return rows


def table(found: dict[str, list[dict[str, Any]]]) -> Table:
  """One row a setup."""
  grid = Table(title="Beside one process with as many devices; beside one device")
  for heading in ("", "processes", "devices", "losses", "state", "first loss", "FP8 state", "off"):
    grid.add_column(heading, justify="right" if heading else "left")
  bits = {True: "same bits", False: "differ", None: "-"}
  for run, rows in found.items():
    for row in rows:
      grid.add_row(
        run,
        f"{row['processes']}",
        f"{row['devices']}",
        bits[row["losses_as_one_process"]],
        bits[row["state_as_one_process"]],
        f"{row['first_loss_off']:.1g}",
        bits[row.get("first_fp8_state_as_one_device")],
        f"{row['off']:.1g}",
      )
  return grid


def make_parser() -> argparse.ArgumentParser:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--steps", type=positive, default=30, help="of each run")
  parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
  return parser


def main(argv: list[str] | None = None) -> int:
  """Runs the benchmark; ``argv`` is the command line, None the process's own."""
  arguments, console = make_parser().parse_args(argv), Console()
  with tempfile.TemporaryDirectory() as folder:
    found = {run: measure(Path(folder), run, arguments.steps) for run in (BF16, FP8)}
  console.print(table(found))
  document = {"environment": environment(), "steps": arguments.steps, "runs": found}
  path = arguments.out / "several_processes.json"
  write_text(path, json.dumps(document, indent=1) + "\n")
  console.print(f"Wrote {path}", highlight=False, soft_wrap=True)
  return 0


if __name__ == "__main__":
  sys.exit(main())
