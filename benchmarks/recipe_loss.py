"""Does every recipe train to BF16's loss?

    python benchmarks/recipe_loss.py --seeds 0 1 2           # BF16 and every recipe, each seed
    python benchmarks/recipe_loss.py --seeds 0 1 2           # the same command again: continues
    python benchmarks/recipe_loss.py --redraw --out benchmarks/results

A recipe's answer is the mean over seeds of ``gap = 100 * (loss FP8 / loss BF16 - 1)`` of one seed,
with its standard error. BF16 runs twice, the second time from parameters rounded to bfloat16. Its
gap shows how far one rounding moves a run, and a recipe's gap is to be compared with it.

Each run leaves its checkpoint in ``--out``, from which the same command continues. Commands with
different ``--seeds`` can run at the same time.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from harness.environment import environment
from harness.names import color
from harness.output import make_console, make_parser, positive, redraw, say, write_json
from harness.plot import make_figure
from harness.table import Column, print_table
from lm.config import PRESETS, TrainConfig
from lm.report import find_gaps
from lm.runs import ALL, BF16, BF16_AGAIN, RECIPE_CHOICES, Run, label, named_recipes
from lm.text import Corpus
from lm.train import Record, train

LEFT_OUT = ("run", "train_curve", "stretch_rates")


def finish(config: TrainConfig, run: Run, out: Path) -> Record:
  """Trains what is left of one run, and returns its record."""
  note = lambda text: say(make_console(), f"{label(run)}, seed {config.seed}: {text}")
  folder = out / "checkpoints" / f"{run}_seed{config.seed}"
  options: dict[str, Any] = {"resume": True, "checkpoint_every": 100, "note": note}
  record, _ = train(config, run, Corpus.read(), folder=folder, **options)
  return {key: value for key, value in record.items() if key not in LEFT_OUT}


def compare(runs: dict[Run, dict[str, Record]]) -> dict[Run, dict[str, Any]]:
  """The gap of each run to BF16: by seed, its mean, and the standard error."""
  found: dict[Run, dict[str, Any]] = {}
  by_seed = {seed: find_gaps({run: runs[run][seed] for run in runs}) for seed in runs[BF16]}
  for run in (run for run in runs if run != BF16):
    gaps = {seed: of[run] for seed, of in by_seed.items()}
    found[run] = {"gap_percent": gaps, "mean_gap_percent": statistics.fmean(gaps.values())}
    if len(gaps) > 1:
      found[run]["standard_error"] = statistics.stdev(gaps.values()) / len(gaps) ** 0.5
  return found


def show(content: dict[str, Any]) -> None:
  """Prints a row for each run: its losses, and its mean gap."""
  rows = [
    {"run": label(run)}
    | {f"seed {seed}": record["validation_loss"] for seed, record in records.items()}
    | content["compared"].get(run, {})
    for run, records in content["runs"].items()
  ]
  seeds = [Column(f"seed {seed}", f"{{seed {seed}:.4f}}") for seed in content["seeds"]]
  gap = Column("mean gap to BF16", "{mean_gap_percent:+.2f} %")
  columns = [Column("", "{run}", left=True), *seeds, gap]
  columns += [Column("standard error", "{standard_error:.2f} %")]
  print_table(make_console(), "Validation loss", columns, rows, group=None)


def draw(content: dict[str, Any]) -> Any:
  """Draws one circle per seed, and beside it the mean with its standard error."""
  title = f"Validation loss above BF16, {content['config']['steps']} steps; one circle per seed"
  figure = make_figure(title, content, (7, 4))
  axes = figure.subplots()
  axes.axhline(0.0, color="gray", linewidth=0.8)
  for place, (run, each) in enumerate(content["compared"].items()):
    gaps = list(each["gap_percent"].values())
    axes.plot([place] * len(gaps), gaps, "o", color=color(run), fillstyle="none")
    looks = {"fmt": "_", "color": "black", "capsize": 3}
    axes.errorbar(place + 0.15, each["mean_gap_percent"], each.get("standard_error"), **looks)
  axes.set_xticks(range(len(content["compared"])), map(label, content["compared"]))
  axes.set_ylabel("loss above BF16, %")
  return figure


def main(argv: list[str] | None = None) -> None:
  parser = make_parser(__doc__)
  parser.set_defaults(out=Path("runs/recipe_loss"))
  add = parser.add_argument
  add("--preset", choices=PRESETS, default="small", help="size of model and run")
  add("--recipes", choices=RECIPE_CHOICES, nargs="+", default=[ALL], help="beside BF16")
  add("--seeds", type=int, nargs="+", default=[0, 1, 2])
  add("--steps", type=positive, help="optimizer steps")
  arguments = parser.parse_args(argv)
  config, name = PRESETS[arguments.preset], f"recipe_loss_{arguments.preset}"
  config = dataclasses.replace(config, steps=arguments.steps or config.steps)
  if not arguments.redraw:
    names = (BF16, BF16_AGAIN, *named_recipes(arguments.recipes))
    configs = {str(seed): dataclasses.replace(config, seed=seed) for seed in arguments.seeds}
    runs = {
      run: {seed: finish(of, run, arguments.out) for seed, of in configs.items()} for run in names
    }
    settings = {key: value for key, value in config.as_dict().items() if key != "seed"}
    content = {"environment": environment(), "config": settings, "seeds": arguments.seeds}
    content |= {"text": Corpus.read().as_dict(), "compared": compare(runs), "runs": runs}
    write_json(arguments.out, name, content)
    show(content)
  redraw(arguments.out, name, draw)


if __name__ == "__main__":
  main()
