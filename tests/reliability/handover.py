"""Does a run keep its loss when it changes between BF16 and FP8?

    python -m tests.reliability.handover        # no GPU needed; a few minutes on two CPU cores

The model of ``train_lm.py --preset tiny`` trains a third of its steps in BF16, a third in FP8, and
a third in BF16 again. At each change the training state goes through a checkpoint on disk, and
``upgrade_variables`` adds or ``downgrade_variables`` removes the FP8 state. Parameters and
optimizer state must keep every bit. A second run continues in BF16 from the first change::

    jump = 100 * (loss after the change / loss before it - 1), of the same parameters
    gap  = 100 * (last loss / last loss of the run that stays BF16 - 1)
"""

import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import flax_fp8 as fp8
from harness.environment import environment
from harness.names import color, marker
from harness.output import make_console, make_parser, positive, read_json, redraw, write_json
from harness.plot import legend, make_figure
from harness.table import Column, print_table
from lm.checkpoints import new_curve
from lm.config import PRESETS
from lm.devices import Devices
from lm.model import Transformer
from lm.report import draw_curve, draw_gaps
from lm.step import create_state, jitted_step, optimizer
from lm.text import Corpus
from lm.train import STRETCH, is_due, next_stop, run_stretch, validator

# Recommended for fresh state: at its first step, a tensor is scaled by its own amax.
RECIPE = fp8.DelayedScaling(first_step="current")
COLUMNS = (
  Column("step", "{step}"),
  Column("change", "to {to}", left=True),
  Column("before", "{before:.4f}"),
  Column("after", "{after:.4f}"),
  Column("off by", "{jump_percent:+.3f} %"),
)


class Session:
  """What both runs share: batches, models, optimizer."""

  def __init__(self, config):
    self.config, self.tx, corpus = config, optimizer(config), Corpus.read()
    self.draw = lambda step: corpus.batch(config, step)
    cls = {"BF16": None, "FP8": RECIPE.dot_general_cls}
    self.models = {to: Transformer(config.shape, dot_general_cls=cls[to]) for to in cls}
    self.apply = {to: model.apply for to, model in self.models.items()}
    first = Devices.first()
    self.losses = {to: validator(config, self.apply[to], corpus, first) for to in cls}

  def start(self):
    first = create_state(self.config, "bf16")
    return self.state("BF16", first.params, first)

  def state(self, to, variables, like):
    """The training state of some variables, with step and optimizer state of another."""
    state = fp8.TrainState.create(apply_fn=self.apply[to], params=variables, tx=self.tx)
    return state.replace(step=like.step, opt_state=like.opt_state)

  def train(self, to, state, curve, until):
    """Trains to step ``until``, and validates there and on the way."""
    every = self.config.validate_every
    while (step := len(curve["train_curve"])) < until:
      stop = next_stop(step, until, STRETCH, every)
      state = run_stretch(jitted_step, state, curve, self.draw, stop)
      if is_due(stop, until, every):
        curve["validation_curve"].append([stop, self.losses[to](state.params)])
    return state

  def change(self, to, state, folder):
    """Writes a training state, reads it, and adds or removes its FP8 state."""
    fp8.save_checkpoint(folder, state)
    read = fp8.restore_checkpoint(folder, jax.eval_shape(lambda: state)).tree
    if to == "BF16":
      variables = fp8.downgrade_variables(read.params)
    else:
      tokens = jnp.zeros((1, self.config.seq_len), jnp.int32)
      variables = fp8.upgrade_variables(self.models[to], read.params, tokens)
    new = self.state(to, variables, read)
    for what in (lambda s: s.params["params"], lambda s: s.opt_state, lambda s: s.step):
      require_same_bits(what(new), what(state))
    return new


def require_same_bits(got, want):
  same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), got, want)
  if not all(jax.tree.leaves(same)):
    raise RuntimeError(f"handover: a change must keep every bit; got {same}.")


def measure(config):
  """Trains both runs; returns changes, gap and curves in JSON's types."""
  session, curve, changes = Session(config), new_curve(), []
  state = session.train("BF16", session.start(), curve, config.steps // 3)
  runs = {name: {key: list(each) for key, each in curve.items()} for name in ("changing", "bf16")}
  stays, changing = jax.tree.map(jnp.copy, state), state
  with tempfile.TemporaryDirectory() as folder:
    for third, to in ((2, "FP8"), (3, "BF16")):
      step, before = runs["changing"]["validation_curve"][-1]
      changing = session.change(to, changing, Path(folder) / to)
      after = session.losses[to](changing.params)
      jump = {"jump_percent": 100.0 * (after / before - 1.0)}
      changes.append({"step": step, "to": to, "before": before, "after": after} | jump)
      changing = session.train(to, changing, runs["changing"], config.steps * third // 3)
  session.train("BF16", stays, runs["bf16"], config.steps)
  ends = [runs[name]["validation_curve"][-1][1] for name in ("changing", "bf16")]
  return {
    "environment": environment(),
    "config": config.as_dict(),
    "recipe": repr(RECIPE),
    "changes": changes,
    "gap_percent": 100.0 * (ends[0] / ends[1] - 1.0),
    "runs": runs,
  }


def draw(found):
  """Draws both losses; below them, how far the changing run is above BF16."""
  figure = make_figure("Loss of a run that changes to FP8 and back", found, (7, 6))
  curves, gaps = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
  names = {"changing": ("delayed", "BF16, FP8, BF16"), "bf16": ("BF16", "BF16")}
  for run, (variant, name) in names.items():
    draw_curve(curves, found["runs"][run], name, color=color(variant), marker=marker(variant))
  draw_gaps(gaps, found["runs"]["bf16"], {"delayed": found["runs"]["changing"]})
  for change in found["changes"]:
    for axes in (curves, gaps):
      axes.axvline(change["step"], color="gray", linestyle=":", linewidth=1)
    text = f" to {change['to']}\n {change['jump_percent']:+.3f} %"
    curves.annotate(text, (change["step"], 0.97), xycoords=("data", "axes fraction"), va="top")
  gaps.set_xlabel("steps")
  legend(figure)
  return figure


def main(argv=None):
  parser = make_parser(__doc__)
  parser.add_argument("--preset", choices=PRESETS, default="tiny", help="sizes of the model")
  parser.add_argument("--steps", type=positive, default=900, help="of each run")
  parser.add_argument("--seed", type=int, default=0, help="of parameters and batches")
  arguments = parser.parse_args(argv)
  if not arguments.redraw:
    sizes = {"steps": arguments.steps, "seed": arguments.seed, "validate_every": 100}
    found = measure(dataclasses.replace(PRESETS[arguments.preset], **sizes))
    write_json(arguments.out, "handover", found)
    print_table(make_console(), "Validation loss, nats per byte", COLUMNS, found["changes"])
    print(f"The last loss is {found['gap_percent']:+.3f} % off that of the run that stays BF16.")
  redraw(arguments.out, "handover", draw)
  return read_json(arguments.out, "handover")


if __name__ == "__main__":
  main()
