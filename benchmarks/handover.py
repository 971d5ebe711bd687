"""Does a run keep its loss when it changes between BF16 and FP8?

    python benchmarks/handover.py        # no GPU needed; a few minutes on two CPU cores

The model of ``train_lm.py --preset tiny`` trains a third of its steps in BF16, a third in FP8 and a
third in BF16 again. At each change the whole training state goes through a checkpoint on disk, and
``upgrade_variables`` adds or ``downgrade_variables`` removes the FP8 state; parameters and the
optimiser's state must be the same bits on both sides. The validation loss is taken on both sides,
of the same parameters; a second run stays BF16, with the same seed, batches and learning rates::

    jump = 100 * (loss after the change / loss before it - 1)
    gap  = 100 * (last loss / last loss of the run that stays BF16 - 1)
"""

import argparse
import dataclasses
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import flax_fp8 as fp8
from lm.config import PRESETS, TrainConfig
from lm.curve import Curve
from lm.model import Transformer
from lm.options import not_negative, positive
from lm.plot import smooth
from lm.progress import ConsoleDisplay, Display
from lm.report import EMULATED, describe_text, emulated, environment
from lm.step import compile_step, create_state, mean_loss, optimizer
from lm.text import Corpus, read_corpus, training_batch, validation_batches
from lm.train import STRETCH, due, next_stop, run_stretch, validate

RESULTS = Path(__file__).resolve().parent / "results"
# The advice for fresh state: until it has seen a step, a tensor is scaled by its own amax.
RECIPE = fp8.DelayedScaling(first_step="current")
PLAN = (None, RECIPE, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
  """One change between BF16 and FP8.

  Attributes:
    step: steps taken before it.
    to: what the run goes on in.
    before: validation loss before the change.
    after: validation loss after it, of the same parameters.
  """

  step: int
  to: str
  before: float
  after: float

  @property
  def jump_percent(self) -> float:
    """How far the loss is off after the change."""
    return 100.0 * (self.after / self.before - 1.0)


class Parts:
  """What runs share: batches, optimiser, the first state, and what is compiled for each recipe."""

  def __init__(self, config: TrainConfig, corpus: Corpus) -> None:
    """Makes everything but what needs a recipe."""
    sizes = {"batch_size": config.batch_size, "seq_len": config.seq_len}
    self.config, self.tx = config, optimizer(config)
    self.draw = functools.partial(training_batch, corpus, seed=config.seed, **sizes)
    self.batches = validation_batches(corpus, limit=config.validation_batches, **sizes)
    self.first = create_state(config, "bf16")
    self.model = functools.cache(self._model)
    self.loss_of = functools.cache(self._loss_of)
    self.compiled_steps: dict[fp8.Recipe | None, Any] = {}

  def _model(self, recipe: fp8.Recipe | None) -> Transformer:
    return Transformer(self.config.shape, dot_general_cls=recipe and recipe.dot_general_cls)

  def _loss_of(self, recipe: fp8.Recipe | None) -> Any:
    apply_fn: Any = self.model(recipe).apply
    return jax.jit(functools.partial(mean_loss, apply_fn))

  def step(self, recipe: fp8.Recipe | None, state: fp8.TrainState) -> Any:
    """The compiled step."""
    if recipe not in self.compiled_steps:
      self.compiled_steps[recipe], _ = compile_step(state, self.draw(step=0))
    return self.compiled_steps[recipe]

  def state(
    self, recipe: fp8.Recipe | None, variables: Any, like: fp8.TrainState
  ) -> fp8.TrainState:
    """The training state of other variables, with the step and the optimiser's state of another."""
    apply_fn = self.model(recipe).apply
    state = fp8.TrainState.create(apply_fn=apply_fn, params=variables, tx=self.tx)
    return state.replace(step=like.step, opt_state=like.opt_state)


class Run:
  """A run that can change its recipe: the state, its losses, and what came of the changes."""

  def __init__(self, parts: Parts, display: Display) -> None:
    """Makes the BF16 state of step 0, in memory of its own, for the steps overwrite it."""
    self.parts, self.display = parts, display
    first = jax.tree.map(jnp.copy, parts.first)
    self.recipe: fp8.Recipe | None = None
    self.state, self.curve = parts.state(None, first.params, first), Curve()
    self.changes: list[Change] = []

  def validate(self) -> float:
    """The validation loss of the state as it is."""
    return validate(self.parts.loss_of(self.recipe), self.state.params, self.parts.batches)

  def train(self, until: int) -> None:
    """Trains to step ``until``, and validates there and on the way."""
    step_fn, every = self.parts.step(self.recipe, self.state), self.parts.config.validate_every
    while self.curve.step < until:
      stop = next_stop(self.curve.step, until, STRETCH, every)
      self.state = run_stretch(step_fn, self.state, self.curve, self.parts.draw, stop)
      if validated := due(stop, until, every):
        self.curve.validation.append((stop, self.validate()))
      self.display.update(self.curve, validated=validated)

  def change(self, recipe: fp8.Recipe | None, folder: Path) -> None:
    """Goes on with ``recipe``, or in BF16, from a checkpoint in ``folder``."""
    before = self.curve.validation[-1][1]
    self.state, self.recipe = hand_over(self.state, self.parts, recipe, folder), recipe
    to = "FP8" if recipe else "BF16"
    change = Change(step=self.curve.step, to=to, before=before, after=self.validate())
    self.changes.append(change)
    self.display.note(
      f"goes on in {to}: loss {before:.4f}, then {change.after:.4f} ({change.jump_percent:+.3f} %)"
    )


def hand_over(
  state: fp8.TrainState, parts: Parts, recipe: fp8.Recipe | None, folder: Path
) -> fp8.TrainState:
  """Writes a training state, reads it, and gives it the FP8 state of another recipe, or none."""
  fp8.save_checkpoint(folder, state)
  read: fp8.TrainState = fp8.restore_checkpoint(folder, jax.eval_shape(lambda: state)).tree
  if recipe is None:
    variables = fp8.downgrade_variables(read.params)
  else:
    tokens = jnp.zeros((1, parts.config.seq_len), jnp.int32)
    variables = fp8.upgrade_variables(parts.model(recipe), read.params, tokens)
  new = parts.state(recipe, variables, read)
  for what in (lambda s: s.params["params"], lambda s: s.opt_state, lambda s: s.step):
    require_same_bits(what(new), what(state))
  return new


def require_same_bits(got: Any, want: Any) -> None:
  """Raises where two trees differ in anything."""
  same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), got, want)
  if not all(jax.tree.leaves(same)):
    raise RuntimeError(f"handover: a change must keep every bit; got {same}.")


def train_in_turns(parts: Parts, plan: tuple[fp8.Recipe | None, ...], display: Display) -> Run:
  """Trains with each of the recipes in turn, an equal part of the steps each; BF16 first."""
  run = Run(parts, display)
  with tempfile.TemporaryDirectory() as folder:
    for turn, recipe in enumerate(plan):
      if turn:
        run.change(recipe, Path(folder) / f"step_{run.curve.step}")
      run.train(parts.config.steps * (turn + 1) // len(plan))
  return run


def describe(run: Run, control: Run, corpus: Corpus) -> dict[str, Any]:
  """Everything that was measured, in JSON's types."""
  first = run.changes[0].step
  last, last_of_control = run.curve.validation[-1][1], control.curve.validation[-1][1]
  return {
    "environment": environment(),
    "config": run.parts.config.as_dict(),
    "text": describe_text(corpus),
    "recipe": repr(RECIPE),
    "changes": [dataclasses.asdict(c) | {"jump_percent": c.jump_percent} for c in run.changes],
    "gap_percent": 100.0 * (last / last_of_control - 1.0),
    "same_until_the_first_change": run.curve.train[:first] == control.curve.train[:first],
    "runs": {
      name: {"train_curve": r.curve.train, "validation_curve": r.curve.validation}
      for name, r in {"changing": run, "bf16": control}.items()
    },
  }


def table(found: dict[str, Any]) -> Table:
  """One row a change, and the end."""
  grid = Table(title="Validation loss, nats a byte")
  for heading in ("step", "", "before", "after", "off by"):
    grid.add_column(heading, justify="right" if heading else "left")
  for change in found["changes"]:
    losses = (f"{change[side]:.4f}" for side in ("before", "after"))
    grid.add_row(
      f"{change['step']}", f"to {change['to']}", *losses, f"{change['jump_percent']:+.3f} %"
    )
  ends = [found["runs"][name]["validation_curve"][-1] for name in ("bf16", "changing")]
  losses = (f"{loss:.4f}" for _, loss in ends)
  grid.add_row(
    f"{ends[0][0]}", "BF16 all along; changing", *losses, f"{found['gap_percent']:+.3f} %"
  )
  return grid


def draw(found: dict[str, Any]) -> Figure:
  """Both runs' losses above, how far the changing one is off below."""
  figure = Figure(figsize=(7, 6), layout="constrained")
  curves, gaps = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
  for index, (name, run) in enumerate(found["runs"].items()):
    label = {"changing": "BF16, FP8, BF16", "bf16": "BF16 all along"}[name]
    train = run["train_curve"]
    steps, losses = smooth(train, max(1, len(train) // 30))
    curves.plot(steps, losses, color=f"C{index}", alpha=0.5, label=f"{label}: train, smoothed")
    points = zip(*run["validation_curve"], strict=True)
    mark = {"color": f"C{index}", "fillstyle": "none", "label": f"{label}: validation"}
    curves.plot(*points, "ox"[index], **mark)
  pairs = zip(*(run["validation_curve"] for run in found["runs"].values()), strict=False)
  off = {step: 100 * (loss / other - 1) for (step, loss), (there, other) in pairs if step == there}
  gaps.plot(list(off), list(off.values()), "o-")
  gaps.axhline(0.0, color="gray", linewidth=0.8)
  for change in found["changes"]:
    for axes in (curves, gaps):
      axes.axvline(change["step"], color="gray", linestyle=":", linewidth=1)
    text = f" to {change['to']}\n {change['jump_percent']:+.3f} %"
    curves.annotate(text, (change["step"], 0.97), xycoords=("data", "axes fraction"), va="top")
  curves.set_ylabel("loss, nats a byte")
  curves.legend(loc="center right")
  gaps.set_ylabel("above BF16, %")
  gaps.set_xlabel("steps")
  return figure


def make_parser() -> argparse.ArgumentParser:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--steps", type=positive, default=900, help="of each run")
  parser.add_argument("--batch-size", type=positive, default=16, help="windows a step")
  parser.add_argument("--seed", type=not_negative, default=0, help="of parameters and batches")
  parser.add_argument("--out", type=Path, default=RESULTS, help="folder of JSON and picture")
  return parser


def main(argv: list[str] | None = None) -> int:
  """Runs the benchmark; ``argv`` is the command line, None the process's own."""
  arguments, console, corpus = make_parser().parse_args(argv), Console(), read_corpus()
  sizes = {"steps": arguments.steps, "batch_size": arguments.batch_size, "seed": arguments.seed}
  config = dataclasses.replace(PRESETS["tiny"], **sizes, validate_every=100)
  parts, runs = Parts(config, corpus), list[Run]()
  for name, plan in (("BF16, FP8, BF16", PLAN), ("BF16", (None,))):
    with ConsoleDisplay(console, name, config.steps) as display:
      runs.append(train_in_turns(parts, plan, display))
  changing, control = runs
  found = describe(changing, control, corpus)
  console.print(table(found))
  if emulated():
    console.print(EMULATED, highlight=False, soft_wrap=True)
  arguments.out.mkdir(parents=True, exist_ok=True)
  (arguments.out / "handover.json").write_text(json.dumps(found, indent=1) + "\n")
  draw(found).savefig(arguments.out / "handover.png", dpi=120)
  console.print(f"Wrote handover.json and handover.png to {arguments.out}", highlight=False)
  return 0


if __name__ == "__main__":
  raise SystemExit(main())
