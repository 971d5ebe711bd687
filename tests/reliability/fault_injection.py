"""What does a NaN or an infinity do to a run, and how soon does the run recover?

    python -m tests.reliability.fault_injection     # a few minutes on one CPU core

A small decoder (that of ``train_lm.py``, without its scan) learns Python's language reference in
FP8 with delayed scaling for 500 steps. At 40 random steps a fault adds NaN or ±inf to one value: of
an activation, of a kernel as the GEMM reads it, or of an output gradient, in a random projection of
a random layer. The same faults hit every run: ``flax_fp8`` with ``skip_nonfinite=True``, with
``optax.apply_if_finite`` and without a guard; ``flax.linen.fp8_ops`` with ``apply_if_finite`` and
without. Each package has a clean run. One run of ``flax_fp8`` never sees the batches of the faults,
and a run that skips them must end in the same bits.
"""

import dataclasses
import functools
import json
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.linen import fp8_ops as flax_fp8_ops
from flax.training import train_state

import flax_fp8 as fp8
from harness.environment import environment
from harness.names import COLORS, FLAX
from harness.output import make_console, make_parser, positive, read_json, redraw, write_json
from harness.plot import make_figure
from harness.table import Column, print_table
from lm.config import ModelShape, TrainConfig
from lm.devices import Devices
from lm.model import Block, norm
from lm.step import mean_loss, optimizer
from lm.text import Corpus
from lm.train import validator

KINDS = ("activation", "kernel", "output gradient")
VALUES = (np.nan, np.inf, -np.inf)
CONFIG = TrainConfig(
  shape=ModelShape(d_model=32, d_ff=96, layers=2, heads=2, kv_heads=1),
  steps=500,
  batch_size=8,
  seq_len=64,
  learning_rate=4e-3,
  validate_every=10,
  validation_batches=4,
)
OWG = fp8.OVERWRITE_WITH_GRADIENT
COLUMNS = (
  Column("run", "{name}", left=True),
  Column("loss", "{held_out_loss:.4f}"),
  Column("to clean", "{gap_percent:+.2f} %"),
  Column("bad state, steps", "{steps_with_nonfinite_state}"),
  Column("skipped", "{skipped_steps}"),
  Column("one step after", "{median_percent_off_clean_one_step_after:.2f} %"),
)


class Arm(NamedTuple):
  """How a run is trained.

  Attributes:
    ours: with ``flax_fp8``, or with ``flax.linen.fp8_ops``.
    guard: ``"skip"`` for ``skip_nonfinite=True``, ``"optax"`` for ``apply_if_finite``, or empty.
    faults: ``"in"``, ``"none"``, or ``"left out"`` with their batches.
  """

  ours: bool
  guard: str = ""
  faults: str = "in"


ARMS = {
  "flax_fp8, clean": Arm(True, faults="none"),
  "flax_fp8, without those batches": Arm(True, faults="left out"),
  "flax_fp8, skip_nonfinite": Arm(True, "skip"),
  "flax_fp8, apply_if_finite": Arm(True, "optax"),
  "flax_fp8, no guard": Arm(True),
  "fp8_ops, clean": Arm(False, faults="none"),
  "fp8_ops, apply_if_finite": Arm(False, "optax"),
  "fp8_ops, no guard": Arm(False),
}


def spoil(x, fault):
  """Adds ``fault[0]`` to the value at the part ``fault[1]`` of the flat array."""
  place = (fault[1] * x.size).astype(jnp.int32)
  return x.reshape(-1).at[place].add(fault[0].astype(x.dtype)).reshape(x.shape)


@jax.custom_vjp
def spoil_gradient(x, fault):
  return x


spoil_gradient.defvjp(
  lambda x, fault: (x, fault), lambda fault, grad: (spoil(grad, fault), jnp.zeros_like(fault))
)


class Faulty(nn.Module):
  """A contraction with faults; ``fault`` has, per kind, what is added to one value, and where."""

  inner: type[nn.Module]

  @nn.compact
  def __call__(self, lhs, rhs, *args, **kwargs):
    fault = self.variable("faults", "fault", jnp.zeros, (len(KINDS), 2)).value
    out = self.inner()(spoil(lhs, fault[0]), spoil(rhs, fault[1]), *args, **kwargs)
    return spoil_gradient(out, fault[2])


class Model(nn.Module):
  """The decoder of ``train_lm.py`` without a scan, so that each layer can fail by itself."""

  shape: ModelShape
  dot_general_cls: type[nn.Module]

  @nn.compact
  def __call__(self, tokens):
    vocabulary, dtype = self.shape.vocabulary, jnp.bfloat16
    x = nn.Embed(vocabulary, self.shape.d_model, dtype=dtype, name="embedding")(tokens)
    for i in range(self.shape.layers):
      faulty = functools.partial(Faulty, inner=self.dot_general_cls)
      x, _ = Block(self.shape, faulty, name=f"layers_{i}")(x, None)
    head = nn.Dense(vocabulary, use_bias=False, dtype=dtype, name="head")
    return head(norm("final_norm", dtype)(x)).astype(jnp.float32)


class Fault(NamedTuple):
  """One spoiled value: when, in which contraction, of which kind, what, and where."""

  step: int
  site: str
  kind: int
  value: float
  place: float


def draw_faults(sites, steps, count, seed):
  """Draws faults by step, none at the first or the last step."""
  random = np.random.default_rng(seed)
  when = random.choice(np.arange(1, steps - 1), count, replace=False)
  return {
    int(step): Fault(
      int(step),
      str(random.choice(sites)),
      int(random.integers(len(KINDS))),
      float(random.choice(VALUES)),
      float(random.uniform()),
    )
    for step in sorted(when)
  }


def site_of(path):
  return "/".join(entry.key for entry in path[:-1])


def fault_tree(none, fault=None):
  """The collection ``faults`` of a step."""

  def place(path, leaf):
    leaf = np.zeros(leaf.shape, np.float32)
    if fault is not None and site_of(path) == fault.site:
      leaf[fault.kind] = fault.value, fault.place
    return leaf

  return jax.tree_util.tree_map_with_path(place, none)


@functools.cache
def parts(config, ours, guarded):
  """What runs share, to compile their steps once: apply function, optimizer, validation loss."""
  apply_fn = Model(config.shape, (fp8 if ours else flax_fp8_ops).Fp8DotGeneral).apply
  tx = optimizer(config)
  if guarded:
    tx = optax.apply_if_finite(tx, max_consecutive_errors=config.steps)
  return apply_fn, tx, validator(config, apply_fn, Corpus.read(), Devices.first())


def start(config, arm):
  """Makes the training state of an arm, and its collection ``faults``."""
  apply_fn, tx, _ = parts(config, arm.ours, arm.guard == "optax")
  init = jax.jit(apply_fn.__self__.init)
  variables = dict(init(jax.random.key(config.seed), jnp.zeros((1, config.seq_len), int)))
  none = variables.pop("faults")
  made = {"apply_fn": apply_fn, "params": variables, "tx": tx}
  if not arm.ours:
    return train_state.TrainState.create(**made), none
  return fp8.TrainState.create(**made, skip_nonfinite=arm.guard == "skip"), none


def find_sites(config):
  _, none = start(config, ARMS["flax_fp8, clean"])
  return [site_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(none)]


def skipped(state):
  if isinstance(state.opt_state, optax.ApplyIfFiniteState):
    return int(state.opt_state.total_notfinite)
  return int(getattr(state, "skipped_steps", None) or 0)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_step(ours, state, faults, windows):
  """Takes one step; returns the state, its loss, and the part of FP8 state that is not finite."""
  loss_fn = lambda variables: mean_loss(
    state.apply_fn, {**variables, "faults": faults}, windows=windows
  )
  differentiate = fp8.value_and_grad if ours else jax.value_and_grad
  loss, grads = differentiate(loss_fn)(state.params)
  state = state.apply_gradients(grads=grads)
  leaves = jax.tree.leaves(state.params[OWG])
  bad = jnp.mean(jnp.stack([~jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
  return state, jnp.stack([loss, bad])


def run(config, arm, faults):
  """Trains one arm; returns its figures, in JSON's types, and its last state."""
  state, none = start(config, arm)
  corpus, clean, loss_of = Corpus.read(), fault_tree(none), parts(config, arm.ours, False)[2]
  seen, validation = [], []
  for step in range(config.steps):
    fault = faults.get(step)
    if fault is None or arm.faults != "left out":
      tree = fault_tree(none, fault) if arm.faults == "in" else clean
      state, figures = train_step(arm.ours, state, tree, corpus.batch(config, step))
      seen.append([step, *np.asarray(figures).tolist()])
    if (step + 1) % config.validate_every == 0:
      validation.append([step + 1, loss_of({**state.params, "faults": clean})])
  names = ("steps", "train", "nonfinite_state")
  figures = {name: list(each) for name, each in zip(names, zip(*seen, strict=True), strict=True)}
  return figures | {"validation": validation, "skipped_steps": skipped(state)}, state


def summarize(arms, faults):
  """Compares each arm with the clean run of its package."""
  found = {}
  alone = [step + 1 for step in faults if step + 1 not in faults]
  for name, each in arms.items():
    clean = arms[f"{name.split(',')[0]}, clean"]
    losses = [dict(zip(run["steps"], run["train"], strict=True)) for run in (each, clean)]
    after = [100 * abs(losses[0][step] / losses[1][step] - 1) for step in alone]
    loss, clean_loss = (run["validation"][-1][1] for run in (each, clean))
    found[name] = {
      "held_out_loss": loss,
      "gap_percent": 100 * (loss / clean_loss - 1),
      "steps_with_nonfinite_state": int(np.count_nonzero(each["nonfinite_state"])),
      "nonfinite_state_at_the_end": each["nonfinite_state"][-1],
      "steps_with_nonfinite_loss": int(np.count_nonzero(~np.isfinite(each["train"]))),
      "skipped_steps": each["skipped_steps"],
      "median_percent_off_clean_one_step_after": float(np.median(after)),
      "worst_percent_off_clean_one_step_after": float(np.max(after)),
    }
  return found


def measure(config, count, seed):
  """Runs every arm; returns the document."""
  faults, arms, params = draw_faults(find_sites(config), config.steps, count, seed), {}, {}
  for name, arm in ARMS.items():
    print(name)
    arms[name], state = run(config, arm, faults)
    params[name] = jax.device_get(state.params)
  pair = (params[f"flax_fp8, {name}"] for name in ("skip_nonfinite", "without those batches"))
  same = all(jax.tree.leaves(jax.tree.map(np.array_equal, *pair)))
  describe = lambda f: f._asdict() | {"kind": KINDS[f.kind], "value": str(f.value)}
  found = {
    "environment": environment(),
    "config": config.as_dict(),
    "faults": [describe(fault) for fault in faults.values()],
    "skipped_is_as_if_left_out": same,
    "summary": summarize(arms, faults),
    "arms": arms,
  }
  return json.loads(json.dumps(found), parse_constant=str)  # JSON has no NaN


DRAWN = {
  "flax_fp8, clean": ("delayed", ":"),
  "flax_fp8, skip_nonfinite": ("delayed", "-"),
  "fp8_ops, clean": (FLAX, ":"),
  "fp8_ops, apply_if_finite": (FLAX, "-"),
}


def draw(found):
  """Draws validation losses, and the part of FP8 state that is not finite."""
  count, steps = len(found["faults"]), found["config"]["steps"]
  title = f"NaN and infinities in {count} of {steps} steps (vertical lines)"
  figure = make_figure(title, found, (8, 6))
  losses, state = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
  for name, (variant, style) in DRAWN.items():
    each = found["arms"][name]
    looks = {"color": COLORS[variant], "linestyle": style, "label": name.replace("fp8_ops", FLAX)}
    losses.plot(*zip(*each["validation"], strict=True), **looks)
    state.plot(each["steps"], 100 * np.array(each["nonfinite_state"]), **looks)
  for fault in found["faults"]:
    losses.axvline(fault["step"], color="black", alpha=0.12, linewidth=0.8)
  losses.set(ylabel="validation loss, nats per byte", yscale="log")
  losses.legend()
  state.set(ylabel="FP8 state not finite, %", xlabel="steps")
  return figure


def main(argv=None):
  parser = make_parser(__doc__)
  parser.add_argument("--faults", type=positive, default=40, help="number of steps with a fault")
  parser.add_argument("--steps", type=positive, default=CONFIG.steps, help="of each run")
  parser.add_argument("--seed", type=int, default=0, help="of the faults")
  arguments = parser.parse_args(argv)
  if not arguments.redraw:
    config = dataclasses.replace(CONFIG, steps=arguments.steps)
    found = measure(config, arguments.faults, arguments.seed)
    rows = [{"name": name} | each for name, each in found["summary"].items()]
    print_table(make_console(), "Faults in a run in FP8", COLUMNS, rows)
    bits = "the same bits" if found["skipped_is_as_if_left_out"] else "NOT the same bits"
    print(f"skip_nonfinite, and a run without those batches: {bits} at the end")
    write_json(arguments.out, "fault_injection", found)
  redraw(arguments.out, "fault_injection", draw)
  return read_json(arguments.out, "fault_injection")


if __name__ == "__main__":
  main()
