"""What does a NaN or an infinity do to a run, and how soon is the run back?

    python benchmarks/fault_injection.py        # a few minutes on one CPU core

A small decoder (that of ``train_lm.py``, its layers unrolled) learns Python's language reference
in FP8 with delayed scaling for 500 steps. At 40 random steps one value is spoiled, by NaN or by
±inf: of an activation, of a kernel as the GEMM reads it, or of an output gradient, in a random
projection of a random layer. The same faults hit every run: with ``flax_fp8`` and ``TrainState``'s
``skip_nonfinite=True``, with ``optax.apply_if_finite`` instead, and without a guard; and with
``flax.linen.fp8_ops``, with ``apply_if_finite`` and without. Beside them are a clean run of each,
and one of ours to which the batches of the faults never came: what a skipped step should be like.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.linen import fp8_ops as flax_fp8_ops
from flax.training import train_state
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import flax_fp8 as fp8
from lm.config import TrainConfig
from lm.model import Block, ModelShape, norm
from lm.report import environment
from lm.step import mean_loss, optimizer
from lm.text import Corpus, read_corpus, training_batch, validation_batches

RESULTS = Path(__file__).resolve().parent / "results"
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
FAULTS = 40
OWG = fp8.OVERWRITE_WITH_GRADIENT


def spoil(x: jax.Array, fault: jax.Array) -> jax.Array:
  """Adds ``fault[0]`` to one value, that at ``fault[1]`` of all its length."""
  place = (fault[1] * x.size).astype(jnp.int32)
  return x.reshape(-1).at[place].add(fault[0].astype(x.dtype)).reshape(x.shape)


@jax.custom_vjp
def spoil_gradient(x: jax.Array, fault: jax.Array) -> jax.Array:
  """Returns ``x``; its gradient is spoiled."""
  del fault
  return x


def _spoil_gradient_fwd(x: jax.Array, fault: jax.Array) -> tuple[jax.Array, jax.Array]:
  return x, fault


def _spoil_gradient_bwd(fault: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
  return spoil(grad, fault), jnp.zeros_like(fault)


spoil_gradient.defvjp(_spoil_gradient_fwd, _spoil_gradient_bwd)


class Faulty(nn.Module):
  """A contraction whose operands and output gradient may be spoiled.

  Attributes:
    inner: makes the contraction.

  Variables (collection ``faults``):
    fault: for each of ``KINDS``, what is added to one value, and where; zeros without a fault.
  """

  inner: Any

  @nn.compact
  def __call__(self, lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """Contracts; arguments as ``lax.dot_general``."""
    fault = self.variable("faults", "fault", jnp.zeros, (len(KINDS), 2)).value
    out = self.inner()(spoil(lhs, fault[0]), spoil(rhs, fault[1]), *args, **kwargs)
    return spoil_gradient(out, fault[2])


class Model(nn.Module):
  """The decoder of ``train_lm.py``, without a scan, so that each layer can fail by itself.

  Attributes:
    shape: the sizes.
    dot_general_cls: what makes the contractions that may fail.
  """

  shape: ModelShape
  dot_general_cls: Any

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Tokens ``[B, T]`` to float32 logits ``[B, T, vocabulary]``."""
    dtype = jnp.bfloat16
    x = nn.Embed(self.shape.vocabulary, self.shape.d_model, dtype=dtype, name="embedding")(tokens)
    faulty = functools.partial(Faulty, inner=self.dot_general_cls)
    for i in range(self.shape.layers):
      x, _ = Block(self.shape, faulty, name=f"layers_{i}")(x, None)
    x = norm("final_norm", dtype)(x)
    head = nn.Dense(self.shape.vocabulary, use_bias=False, dtype=dtype, name="head")
    return head(x).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Arm:
  """How a run is trained.

  Attributes:
    ours: with ``flax_fp8``, or with ``flax.linen.fp8_ops``.
    guard: "skip", ``skip_nonfinite=True``; "optax", ``optax.apply_if_finite``; or "none".
    faults: "in", "none", or "left out": their steps are, with their batches.
  """

  ours: bool
  guard: str = "none"
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


@dataclasses.dataclass(frozen=True)
class Fault:
  """One spoiled value.

  Attributes:
    step: when.
    site: path of the contraction.
    kind: index of ``KINDS``.
    value: NaN or ±inf.
    place: which value of the tensor, as a part of its length.
  """

  step: int
  site: str
  kind: int
  value: float
  place: float


def draw_faults(sites: list[str], steps: int, count: int, seed: int) -> dict[int, Fault]:
  """Draws faults, by step, none at the first or the last step."""
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


def site_of(path: Any) -> str:
  """The contraction's path, of its variable's."""
  return "/".join(entry.key for entry in path[:-1])


def fault_tree(none: Any, fault: Fault | None) -> Any:
  """The collection ``faults`` of a step."""

  def place(path: Any, leaf: np.ndarray) -> np.ndarray:
    leaf = np.zeros(leaf.shape, np.float32)
    if fault is not None and site_of(path) == fault.site:
      leaf[fault.kind] = fault.value, fault.place
    return leaf

  return jax.tree_util.tree_map_with_path(place, none)


@functools.cache
def parts(config: TrainConfig, ours: bool, guarded: bool) -> tuple[Any, Any, Any]:
  """What runs have in common, so that their steps are compiled once.

  Returns:
    What applies the model, the optimiser, and the model's compiled loss.
  """
  apply_fn = Model(config.shape, (fp8 if ours else flax_fp8_ops).Fp8DotGeneral).apply
  tx = optimizer(config)
  if guarded:
    tx = optax.apply_if_finite(tx, max_consecutive_errors=config.steps)
  return apply_fn, tx, jax.jit(functools.partial(mean_loss, apply_fn))


def start(config: TrainConfig, arm: Arm) -> tuple[Any, Any]:
  """Makes the training state of an arm, and its collection ``faults``."""
  apply_fn, tx, _ = parts(config, arm.ours, arm.guard == "optax")
  init: Any = jax.jit(apply_fn.__self__.init)
  variables = dict(init(jax.random.key(config.seed), jnp.zeros((1, config.seq_len), int)))
  none = variables.pop("faults")
  made: dict[str, Any] = {"apply_fn": apply_fn, "params": variables, "tx": tx}
  if not arm.ours:
    return train_state.TrainState.create(**made), none
  return fp8.TrainState.create(**made, skip_nonfinite=arm.guard == "skip"), none


def nonfinite_part(state: Any) -> jax.Array:
  """Part of the FP8 state's leaves with a value that is not finite."""
  leaves = jax.tree.leaves(state.params[OWG])
  return jnp.mean(jnp.stack([~jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def skipped(state: Any) -> int:
  """How many steps the guard did not take."""
  if isinstance(state.opt_state, optax.ApplyIfFiniteState):
    return int(state.opt_state.total_notfinite)
  return int(getattr(state, "skipped_steps", None) or 0)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_step(ours: bool, state: Any, faults: Any, windows: jax.Array) -> tuple[Any, jax.Array]:
  """Takes one step; returns the state, and loss and ``nonfinite_part``."""

  def loss_fn(variables: Any) -> jax.Array:
    return mean_loss(state.apply_fn, {**variables, "faults": faults}, windows)

  differentiate = fp8.value_and_grad if ours else jax.value_and_grad
  loss, grads = differentiate(loss_fn)(state.params)
  state = state.apply_gradients(grads=grads)
  return state, jnp.stack([loss, nonfinite_part(state)])


def run(config: TrainConfig, arm: Arm, corpus: Corpus, faults: Mapping[int, Fault]) -> Any:
  """Trains one arm.

  Returns:
    Its figures, in JSON's types, and its last state.
  """
  state, none = start(config, arm)
  sizes = {"batch_size": config.batch_size, "seq_len": config.seq_len}
  draw: Callable[..., np.ndarray] = functools.partial(
    training_batch, corpus, seed=config.seed, **sizes
  )
  held_out = validation_batches(corpus, limit=config.validation_batches, **sizes)
  clean = fault_tree(none, None)
  loss_of = parts(config, arm.ours, False)[2]
  seen, validation = [], []
  for step in range(config.steps):
    fault = faults.get(step)
    if fault is None or arm.faults != "left out":
      tree = fault_tree(none, fault) if arm.faults == "in" else clean
      state, figures = train_step(arm.ours, state, tree, draw(step=step))
      seen.append([step, *np.asarray(figures).tolist()])
    if (step + 1) % config.validate_every == 0:
      variables = {**state.params, "faults": clean}
      losses = [float(loss_of(variables, batch)) for batch in held_out]
      validation.append([step + 1, float(np.mean(losses))])
  steps, losses, nonfinite = zip(*seen, strict=True)
  figures = {
    "steps": list(steps),
    "train": list(losses),
    "validation": validation,
    "nonfinite_state": list(nonfinite),
    "skipped_steps": skipped(state),
  }
  return figures, state


def summarize(arms: Mapping[str, Any], faults: Mapping[int, Fault]) -> dict[str, Any]:
  """What the figures say: of each arm, against the clean run of its package."""
  found = {}
  for name, each in arms.items():
    clean = arms[f"{name.split(',')[0]}, clean"]
    at = dict(zip(each["steps"], each["train"], strict=True))
    of_clean = dict(zip(clean["steps"], clean["train"], strict=True))
    alone = [s + 1 for s in faults if s + 1 not in faults]
    after = [abs(at[s] / of_clean[s] - 1) for s in alone]
    state = np.asarray(each["nonfinite_state"])
    found[name] = {
      "held_out_loss": each["validation"][-1][1],
      "gap_percent": 100 * (each["validation"][-1][1] / clean["validation"][-1][1] - 1),
      "steps_with_nonfinite_state": int(np.count_nonzero(state)),
      "nonfinite_state_at_the_end": float(state[-1]),
      "steps_with_nonfinite_loss": int(np.count_nonzero(~np.isfinite(each["train"]))),
      "skipped_steps": each["skipped_steps"],
      "median_percent_off_clean_one_step_after": 100 * float(np.median(after)),
      "worst_percent_off_clean_one_step_after": 100 * float(np.max(after)),
    }
  return found


def show(found: Mapping[str, Any], console: Console) -> None:
  """Prints one row an arm."""
  grid = Table(title="Faults in a run in FP8")
  grid.add_column("")
  for heading in ("loss", "to clean", "bad state, steps", "at end", "skipped", "one step after"):
    grid.add_column(heading, justify="right")
  for name, each in found.items():
    grid.add_row(
      name,
      f"{each['held_out_loss']:.4f}",
      f"{each['gap_percent']:+.2f} %",
      str(each["steps_with_nonfinite_state"]),
      f"{100 * each['nonfinite_state_at_the_end']:.0f} %",
      str(each["skipped_steps"]),
      f"{each['median_percent_off_clean_one_step_after']:.2f} %",
    )
  console.print(grid)


def draw(arms: Mapping[str, Any], faults: Mapping[int, Fault], path: Path) -> None:
  """Draws held-out losses, and the part of the FP8 state that is not finite."""
  figure = Figure(figsize=(9, 7), layout="constrained")
  losses, state = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
  for i, (name, each) in enumerate(arms.items()):
    looks: Any = {"color": f"C{i}", "linestyle": ":" if "clean" in name else "-", "label": name}
    losses.plot(*zip(*each["validation"], strict=True), **looks)
    state.plot(each["steps"], 100 * np.asarray(each["nonfinite_state"]), **looks)
  for step in faults:
    losses.axvline(step, color="black", alpha=0.12, linewidth=0.8)
  losses.set_ylabel("held-out loss, nats a byte")
  losses.set_yscale("log")
  losses.legend(fontsize="small")
  state.set_ylabel("FP8 state not finite, %")
  state.set_xlabel("steps; each line a fault")
  figure.savefig(path, dpi=120)


def main() -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--faults", type=int, default=FAULTS)
  parser.add_argument("--seed", type=int, default=0, help="of the faults")
  parser.add_argument("--out", type=Path, default=RESULTS, help="folder of JSON and picture")
  arguments = parser.parse_args()
  console, corpus = Console(), read_corpus()
  _, none = start(CONFIG, ARMS["flax_fp8, clean"])
  sites = [site_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(none)]
  faults = draw_faults(sites, CONFIG.steps, arguments.faults, arguments.seed)
  arms: dict[str, Any] = {}
  states: dict[str, Any] = {}
  for name, arm in ARMS.items():
    with console.status(name):
      arms[name], states[name] = run(CONFIG, arm, corpus, faults)
  one, other = (states[f"flax_fp8, {n}"] for n in ("skip_nonfinite", "without those batches"))
  same = jax.tree.map(np.array_equal, one.params, other.params)
  summary = summarize(arms, faults)
  show(summary, console)
  bits = "the same bits" if all(jax.tree.leaves(same)) else "NOT the same bits"
  console.print(f"skip_nonfinite, and a run without those batches: {bits} at the end")
  arguments.out.mkdir(parents=True, exist_ok=True)
  document = {
    "environment": environment(),
    "config": CONFIG.as_dict(),
    "faults": [
      {**dataclasses.asdict(f), "kind": KINDS[f.kind], "value": str(f.value)}
      for f in faults.values()
    ],
    "skipped_is_as_if_left_out": bool(all(jax.tree.leaves(same))),
    "summary": summary,
    "arms": arms,
  }
  text = json.dumps(document, indent=1).replace("NaN", '"NaN"')
  (arguments.out / "fault_injection.json").write_text(text + "\n")
  draw(arms, faults, arguments.out / "fault_injection.png")


if __name__ == "__main__":
  main()
