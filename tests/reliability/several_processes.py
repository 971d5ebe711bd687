"""Do several processes train to the losses of one?

    python -m tests.reliability.several_processes    # no GPU needed; minutes on two CPU cores

``train_lm.py --preset micro`` trains in BF16 and in FP8 as one, two and four processes of one CPU
device each, and as one process of one, two and four devices, with the same seed and batches. Losses
of every step and the final state are compared bit for bit, and as::

    off = max over steps of |loss / loss of one device - 1|

The program depends on the number of devices alone; processes change only who carries the numbers.
Two devices have one way to add two numbers, so all bits must be the same. Four devices of several
processes add in another order than those of one process. A batch in more parts is summed in more
parts: equal up to bfloat16's rounding. Amaxes are reduced by max, which has no order, so the FP8
state after the first step must have the same bits everywhere.
"""

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np

import flax_fp8 as fp8
from harness.environment import environment
from harness.output import make_console, make_parser, positive, write_json
from harness.table import Column, print_table
from lm.config import PRESETS
from tests.reliability.launch import Group, final_leaves

PRESET, FP8 = "micro", "delayed"
SETUPS = ((1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1))  # processes, devices of each
BITS = {True: "same bits", False: "differ", None: "-"}
COLUMNS = (
  Column("", "{run}", left=True),
  Column("processes", "{processes}"),
  Column("devices", "{devices}"),
  Column("losses as one process", lambda row: BITS[row["losses_as_one_process"]]),
  Column("state as one process", lambda row: BITS[row["state_as_one_process"]]),
  Column("first loss off one device", "{first_loss_off:.1g}"),
  Column("first FP8 state", lambda row: BITS[row.get("first_fp8_state_as_one_device")]),
  Column("off one device", "{off:.1g}"),
)


def train(folder, run, steps, processes, devices):
  """Trains in separate processes; returns the losses and the leaves of the final state."""
  out = folder / f"{run}_{steps}_{processes}x{devices}"
  precision = "bf16" if run == "bf16" else "fp8"
  options = ["--preset", PRESET, "--precision", precision, "--recipe", FP8]
  options += ["--steps", f"{steps}", "--checkpoint-every", f"{steps}"]
  with Group(options, out, processes=processes, devices=devices) as group:
    group.finish()
  config = dataclasses.replace(PRESETS[PRESET], steps=steps)
  losses = json.loads((out / "results.json").read_text())["runs"][run]["train_curve"]
  return losses, final_leaves(out / "checkpoints" / run, config, run)


def same(leaves, others, within=""):
  """Whether the leaves with ``within`` in their path have the same bits."""
  return all(x.tobytes() == others[name].tobytes() for name, x in leaves.items() if within in name)


def measure(folder, run, steps, setups=SETUPS):
  """Trains in every setup, and compares it with one device and with one process."""
  rows, ended, once = [], {}, {}
  for processes, devices in setups:
    losses, leaves = ended[processes, devices] = train(folder, run, steps, processes, devices)
    one_losses, one_leaves = ended[1, processes * devices]
    off = np.abs(np.array(losses) / np.array(ended[1, 1][0]) - 1)
    row = {"run": run, "processes": processes, "devices": processes * devices}
    row |= {"first_loss_off": float(off[0]), "off": float(off.max()), "losses": losses}
    row["losses_as_one_process"] = losses == one_losses
    row["state_as_one_process"] = same(leaves, one_leaves)
    if run != "bf16":
      at = processes, devices
      once[at] = leaves if steps == 1 else train(folder, run, 1, processes, devices)[1]
      first = same(once[at], once[1, 1], fp8.OVERWRITE_WITH_GRADIENT)
      row["first_fp8_state_as_one_device"] = first
    rows.append(row)
  return rows


def main(argv=None):
  parser = make_parser(__doc__)
  parser.add_argument("--steps", type=positive, default=30, help="of each run")
  arguments = parser.parse_args(argv)
  with tempfile.TemporaryDirectory() as folder:
    found = {run: measure(Path(folder), run, arguments.steps) for run in ("bf16", FP8)}
  print_table(make_console(), "Losses and states", COLUMNS, [*found["bf16"], *found[FP8]], "run")
  document = {"environment": environment(), "steps": arguments.steps, "runs": found}
  write_json(arguments.out, "several_processes", document)


if __name__ == "__main__":
  main()
