"""Does every recipe train to BF16's loss?

    python benchmarks/recipe_loss.py --seeds 0 1 2           # BF16 and every recipe, each seed
    python benchmarks/recipe_loss.py --seeds 0 1 2           # the same command again: continues
    python benchmarks/recipe_loss.py --redraw --out benchmarks/results

A recipe's answer is the mean over seeds of ``gap = 100 * (loss FP8 / loss BF16 - 1)`` of one seed,
with its standard error. BF16 runs twice, the second time from parameters rounded to bfloat16. Its
gap shows how far one rounding moves a run, and a recipe's gap is to be compared with it.

Each finished run leaves a file in ``--out``, and each unfinished one its checkpoint. Commands with
different ``--seeds`` can run at the same time.
"""

import dataclasses
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

from harness.environment import environment
from harness.names import color
from harness.output import make_console, make_parser, positive, redraw, say, write_json
from harness.plot import make_figure
from harness.table import Column, print_table
from lm.checkpoints import require_identity
from lm.config import PRESETS, TrainConfig
from lm.runs import ALL, BF16, BF16_AGAIN, RECIPE_CHOICES, Run, label, named_recipes
from lm.text import Corpus
from lm.train import Record, identify, train

LEFT_OUT = ("identity", "run", "train_curve", "stretch_rates")


def finish(config: TrainConfig, run: Run, out: Path) -> Record:
  """Trains what is left of one run, and returns its record."""
  name, corpus = f"{run}_seed{config.seed}", Corpus.read()
  identity, path = identify(config, run, corpus), out / f"{name}.json"
  if not path.exists():
    note = lambda text: say(make_console(), f"{label(run)}, seed {config.seed}: {text}")
    options: dict[str, Any] = {"resume": True, "checkpoint_every": 100, "note": note}
    record, _ = train(config, run, corpus, folder=out / "checkpoints" / name, **options)
    write_json(out, name, {"identity": identity, "environment": environment(), **record})
  record = json.loads(path.read_text())
  require_identity(identity, record["identity"], f"--out: {path}")
  return {key: value for key, value in record.items() if key not in LEFT_OUT}


def compare(runs: dict[Run, dict[str, Record]]) -> dict[Run, dict[str, Any]]:
  """The gap of each run to BF16: by seed, its mean, and the standard error."""
  found: dict[Run, dict[str, Any]] = {}
  for run in runs.keys() - {BF16}:
    loss = lambda of, seed: runs[of][seed]["validation_loss"]
    gaps = {seed: 100 * (loss(run, seed) / loss(BF16, seed) - 1) for seed in runs[run]}
    found[run] = {"gap_percent": gaps, "mean_gap_percent": statistics.fmean(gaps.values())}
    if len(gaps) > 1:
      found[run]["standard_error"] = statistics.stdev(gaps.values()) / len(gaps) ** 0.5
  return {run: found[run] for run in runs if run in found}


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
    runs: dict[Run, dict[str, Record]] = {}
    names = (BF16, BF16_AGAIN, *named_recipes(arguments.recipes))
    for seed, run in itertools.product(arguments.seeds, names):
      record = finish(dataclasses.replace(config, seed=seed), run, arguments.out)
      runs.setdefault(run, {})[str(seed)] = record
    settings = {key: value for key, value in config.as_dict().items() if key != "seed"}
    content = {"environment": environment(), "config": settings, "seeds": arguments.seeds}
    content |= {"text": Corpus.read().as_dict(), "compared": compare(runs), "runs": runs}
    write_json(arguments.out, name, content)
    losses = [
      {f"seed {seed}": each["validation_loss"] for seed, each in of.items()} for of in runs.values()
    ]
    rows = [{"run": label(run)} | by for run, by in zip(runs, losses, strict=True)]
    seeds = [Column(f"seed {seed}", f"{{seed {seed}:.4f}}") for seed in arguments.seeds]
    print_table(make_console(), "Validation loss", [Column("", "{run}", left=True), *seeds], rows)
    columns = [Column("", "{run}", left=True), Column("mean gap", "{mean_gap_percent:+.2f} %")]
    columns.append(Column("standard error", "{standard_error:.2f} %"))
    gaps = [{"run": label(run)} | each for run, each in content["compared"].items()]
    print_table(make_console(), "Gap to BF16", columns, gaps)
  redraw(arguments.out, name, draw)


if __name__ == "__main__":
  main()
