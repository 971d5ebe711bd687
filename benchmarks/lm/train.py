"""The training loop: the same seed and batches for every run, with validation and checkpoints.

Between two events (a validation, a checkpoint, ten steps) the loop only feeds batches, and waits
once at the end. The device does not wait for Python, and the time measured is that of the steps.
"""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import flax_fp8 as fp8
from flax_fp8.recipes.base import Role
from lm.checkpoints import Checkpoints, Curve
from lm.config import TrainConfig
from lm.devices import Devices
from lm.runs import Run, recipe_of
from lm.step import ScaledTrainState, create_state, jitted_step, make_model, mean_loss
from lm.text import Corpus

STRETCH = 10
LAST = 300  # steps whose training loss is averaged
Record = dict[str, Any]
Draw = Callable[[int], jax.Array]
Note = Callable[[str], None]


def describe(curve: Curve) -> str:
  """The newest numbers of a curve in one line."""
  parts = [f"loss {loss:.4f}" for loss in curve["train_curve"][-1:]]
  parts += [f"validation {loss:.4f}" for _, loss in curve["validation_curve"][-1:]]
  return ", ".join([*parts, *(f"{rate:.2f} steps/s" for rate in curve["stretch_rates"][-1:])])


def next_stop(step: int, last: int, *intervals: int) -> int:
  """The first step after ``step`` that is ``last`` or a multiple of an interval; 0 is never."""
  return min(last, *((step // every + 1) * every for every in intervals if every))


def is_due(step: int, last: int, every: int) -> bool:
  """Whether an event that happens every so many steps, and at the end, follows ``step``."""
  return every > 0 and (step == last or step % every == 0)


def run_stretch(
  step_fn: Callable[..., Any], state: fp8.TrainState, curve: Curve, draw: Draw, stop: int
) -> fp8.TrainState:
  """Trains until ``stop``; donates ``state`` and adds losses and rate to ``curve``."""
  begun, start, losses = time.perf_counter(), len(curve["train_curve"]), list[jax.Array]()
  for step in range(start, stop):
    state, loss = step_fn(state, draw(step))
    losses.append(loss)
  jax.block_until_ready((state, losses))
  curve["stretch_rates"].append((stop - start) / (time.perf_counter() - begun))
  curve["train_curve"].extend(map(float, losses))
  return state


def tree_bytes(tree: Any) -> int:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def summarize(run: Run, state: fp8.TrainState, curve: Curve) -> Record:
  """Everything that a finished run reports, in JSON's types."""
  record: Record = {
    "run": run,
    "validation_loss": curve["validation_curve"][-1][1],
    "training_loss": statistics.fmean(curve["train_curve"][-LAST:]),
    "steps_per_second": statistics.median(curve["stretch_rates"]),
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params["params"])),
    "state_bytes": tree_bytes(state),
    "fp8_state_bytes": tree_bytes(state.params.get(fp8.OVERWRITE_WITH_GRADIENT, {})),
    **curve,
  }
  if isinstance(state, ScaledTrainState):
    record["loss_scale"] = float(state.dynamic_scale.scale)
    record["skipped_steps"] = int(state.skipped_steps or 0)
  return record


def has_state(run: Run) -> bool:
  """Whether there is FP8 state that calibration can fill."""
  recipe = recipe_of(run)
  return recipe is not None and any(recipe.init_state(role) for role in Role)


def calibrated(
  config: TrainConfig, run: Run, state: fp8.TrainState, draw: Draw, note: Note
) -> fp8.TrainState:
  """Fills the FP8 state from the batches of the first ``config.calibrate`` steps."""
  if not config.calibrate or recipe_of(run) is None:
    return state
  if not has_state(run):
    note("nothing to calibrate, because its recipe has no state")
    return state
  loss_fn = functools.partial(mean_loss, state.apply_fn)
  batches = [draw(step) for step in range(config.calibrate)]
  model = make_model(config, run)
  variables = fp8.calibrate(model, state.params, batches, loss_fn, progress=False)
  note(f"calibrated on the batches of the first {config.calibrate} steps")
  return state.replace(params=variables)


def identify(config: TrainConfig, run: Run, corpus: Corpus) -> dict[str, Any]:
  """Everything that decides the curve of a run, in JSON's types."""
  settings = config.as_dict()
  if not (config.calibrate and has_state(run)):
    del settings["calibrate"]
  return {"run": run, "text": corpus.digest, **settings}


def open_checkpoints(
  config: TrainConfig, run: Run, corpus: Corpus, folder: Path
) -> contextlib.closing[Checkpoints]:
  return contextlib.closing(Checkpoints(folder, identify(config, run, corpus)))


def compiled(state: fp8.TrainState, batch: jax.Array, note: Note) -> tuple[Any, Record]:
  """Returns the compiled step, and how long that took and how much memory it needs."""
  begun = time.perf_counter()
  step_fn = jitted_step.lower(state, batch).compile()
  seconds = time.perf_counter() - begun
  note(f"compiled in {seconds:.1f} s")
  memory: Any = step_fn.memory_analysis()
  return step_fn, {"temp_bytes": memory.temp_size_in_bytes, "compile_seconds": seconds}


def validator(
  config: TrainConfig, apply_fn: Any, corpus: Corpus, devices: Devices
) -> Callable[[Any], float]:
  """Returns the mean loss over the validation batches, as a function of the variables."""
  rows, size = devices.rows(config.batch_size), config.batch_size
  batches = [devices.put(batch[rows], size) for batch in corpus.validation_batches(config)]
  loss_of = jax.jit(functools.partial(mean_loss, apply_fn))
  return lambda variables: float(np.mean([float(loss_of(variables, batch)) for batch in batches]))


def train(
  config: TrainConfig,
  run: Run,
  corpus: Corpus,
  *,
  folder: Path,
  resume: bool = False,
  checkpoint_every: int = 0,
  devices: Devices | None = None,
  note: Note = lambda _: None,
) -> tuple[Record, Any]:
  """Trains one model; returns its record and variables. ``note`` prints a line."""
  devices = devices or Devices.first()
  rows, size, last = devices.rows(config.batch_size), config.batch_size, config.steps
  draw = lambda step: devices.put(corpus.batch(config, step, rows), size)
  state = create_state(config, run, devices)
  validate = validator(config, state.apply_fn, corpus, devices)
  with open_checkpoints(config, run, corpus, folder) as checkpoints:
    state, curve = checkpoints.start(state, resume=resume)
    step = len(curve["train_curve"])
    if resume:
      note(f"continues after step {step}" if step else "no checkpoint, starts at step 0")
    if not step:
      state = calibrated(config, run, state, draw, note)
    step_fn, measured = compiled(state, draw(0), note) if step < last else (jitted_step, {})
    while step < last:
      step = next_stop(step, last, STRETCH, config.validate_every, checkpoint_every)
      state = run_stretch(step_fn, state, curve, draw, step)
      if validated := is_due(step, last, config.validate_every):
        curve["validation_curve"].append([step, validate(state.params)])
      if saved := is_due(step, last, checkpoint_every):
        checkpoints.save(state, curve)
      if validated or saved:
        note(f"step {step}/{last}: {describe(curve)}{', saved' if saved else ''}")
  record = summarize(run, state, curve) | measured
  return record, jax.tree.map(lambda leaf: leaf.addressable_data(0), state.params)
