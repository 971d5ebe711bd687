"""What a sweep ends with: JSON with all pairs, a table for each question, and a plot."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console

from harness import names
from harness.output import say
from harness.plot import make_figure
from harness.table import Column, print_table
from lm.train import LAST
from trials.arms import ARMS, GATES, QUESTIONS
from trials.paired import LEVEL, MARGINS, Record, compare, losses, verdict

PANELS = {
  "training": f"training, last {LAST} steps",
  "held_out": "held-out",
  "held_out_in_bf16": "held-out, weights in BF16",
}
TITLES = {
  "recipes": "Does FP8 train like BF16?",
  "parts": "Where does the gap come from?",
  "layers": "Which layers should stay in BF16?",
  "remedies": "What changes the gap?",
}
LIMITS = (-3.0, 5.0)  # percent, of the plot
FIGURES = 6  # of a loss in JSON; a trial's own file has all


def label(arm: str) -> str:
  return names.label(arm).replace("bf16", "BF16")


def in_short(record: Record) -> dict[str, Any]:
  """What the JSON keeps of a trial."""
  short = lambda loss: float(f"{loss:.{FIGURES}g}")
  gates = [short(loss) for loss in record["held_out"]]
  return {name: short(loss) for name, loss in losses(record).items()} | {"gates": gates}


def make_content(trials: Mapping[str, Mapping[int, Record]]) -> dict[str, Any]:
  """Each arm with its trials, and its comparison over the seeds that its BF16 arm has too."""
  arms: dict[str, Any] = {}
  for name in (name for name in ARMS if name in trials):
    base, own = ARMS[name].base, trials[name]
    short = {str(seed): in_short(own[seed]) for seed in sorted(own)}
    arms[name] = {"base": base, "trials": short}
    if name != base and own.keys() & trials.get(base, {}).keys():
      arms[name]["compared"] = compare(own, trials[base])
  of = {name: arm["compared"]["training"] for name, arm in arms.items() if "compared" in arm}
  summary = {f"{label(name)}, % above BF16 in training": each["mean"] for name, each in of.items()}
  rules = {"margins": MARGINS, "level": LEVEL, "last_steps": LAST, "gates": GATES}
  return rules | {"summary": summary, "arms": arms}


def compared(content: Mapping[str, Any]) -> dict[str, Any]:
  """The comparisons by arm; other BF16 arms have none, except those that show the floor."""
  arms = content["arms"]
  bases = {arm["base"] for arm in arms.values()}
  found = {name: arm["compared"] for name, arm in arms.items() if "compared" in arm}
  return {name: each for name, each in found.items() if name not in bases}


def interval(of: Mapping[str, Any]) -> str:
  """The mean and its interval: ``+0.57 [+0.36, +0.78]``."""
  if "interval" not in of:
    return f"{of['mean']:+.2f}"
  low, high = of["interval"]
  return f"{of['mean']:+.2f} [{low:+.2f}, {high:+.2f}]"


def probability(of: Mapping[str, Any]) -> str:
  """The p-value of "no difference"."""
  return "" if "p" not in of else "<0.0001" if of["p"] < 1e-4 else f"{of['p']:.4f}"


COLUMNS = (
  Column("gap to BF16, %", lambda row: label(row["arm"]), left=True),
  Column("pairs", "{training[pairs]}"),
  Column("training", lambda row: interval(row["training"])),
  Column("SD", "{training[standard_deviation]:.2f}"),
  Column("p", lambda row: probability(row["training"])),
  Column("within", lambda row: verdict(row["training"])),
  Column("held-out", lambda row: interval(row["held_out"])),
  Column("within", lambda row: verdict(row["held_out"])),
  Column("in BF16", "{held_out_in_bf16[mean]:+.2f}"),
  Column("above", "{gates_above}/{gates}"),
)


def rows(content: Mapping[str, Any], question: str) -> list[dict[str, Any]]:
  found = compared(content)
  arms = [arm.name for arm in QUESTIONS[question] if arm.name in found]
  return [{"arm": name} | found[name] for name in arms]


def show(content: Mapping[str, Any], console: Console) -> None:
  """Prints a table for each question with arms that no table above has."""
  shown: set[str] = set()
  for question, title in TITLES.items():
    found = rows(content, question)
    if not shown.issuperset(row["arm"] for row in found):
      print_table(console, title, COLUMNS, found, group=None)
    shown.update(row["arm"] for row in found)
  small, large = MARGINS
  say(
    console,
    "gap: 100 * (loss / loss of BF16 - 1). Both of a pair have the same seed and batches.",
    f"training: gap of the mean loss of the last {LAST} steps, its 95 % interval, SD and p.",
    f"within: equivalent to BF16, two one-sided tests at {LEVEL:.0%}, margin {small} or {large} %.",
    "held-out: loss at the end. in BF16: the same with the trained weights in the BF16 model.",
    "above: how often the held-out loss was above BF16's, over seeds and gates.",
  )


def color(arm: str) -> str:
  try:
    return names.color(arm)
  except KeyError:
    return names.color(names.BF16)


def draw_panel(axes: Any, arms: Mapping[str, Any], loss: str) -> None:
  """Draws each pair as a circle, and their mean with its interval."""
  widest = MARGINS[-1]
  axes.axvspan(-widest, widest, color="0.95", zorder=0)
  axes.axvspan(-MARGINS[0], MARGINS[0], color="0.88", zorder=0)
  axes.axvline(0.0, color="gray", linewidth=0.8)
  for place, (name, each) in enumerate(arms.items()):
    gaps = list(each[loss]["gaps"].values())
    places = place + np.linspace(-0.25, 0.25, len(gaps))
    axes.plot(gaps, places, "o", color=color(name), fillstyle="none", markersize=4)
    low, high = each[loss].get("interval", [each[loss]["mean"]] * 2)
    axes.plot([low, high], [place, place], "-", color="black", linewidth=2)
    axes.plot(each[loss]["mean"], place, "|", color="black", markersize=12)
    if each[loss]["mean"] > LIMITS[1]:  # a control
      axes.text(LIMITS[1], place, f"{each[loss]['mean']:+.0f} % →", ha="right", va="center")
  axes.set_xlim(*LIMITS)
  axes.set_ylim(len(arms) - 0.4, -0.6)
  axes.set_title(PANELS[loss], fontsize="small")
  axes.set_xlabel("loss above BF16, %")


def draw(content: Mapping[str, Any]) -> Any:
  """Draws all pairs; gray bands are the margins of equivalence."""
  arms = compared(content)
  title = "Gap of each pair, mean and 95 % interval; gray: margins of equivalence"
  figure = make_figure(title, content, (11, 1.8 + 0.32 * len(arms)))
  panels = figure.subplots(1, len(PANELS), sharey=True)
  for axes, loss in zip(panels, PANELS, strict=True):
    draw_panel(axes, arms, loss)
  panels[0].set_yticks(range(len(arms)), map(label, arms), fontsize="small")
  return figure
