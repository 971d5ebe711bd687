"""The training loop: the same seed and batches for every run, validated and checkpointed.

Between two events (a validation, a checkpoint, ten steps) the loop only feeds batches and waits
once at the end: the device does not wait for Python, and the time between is that of the steps.
"""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import flax_fp8 as fp8
from flax_fp8.recipes.base import Role
from lm.checkpoints import Checkpoints
from lm.config import TrainConfig
from lm.curve import Curve, Result
from lm.devices import Devices, whole
from lm.progress import Display, Silent
from lm.runs import Run, recipe_of
from lm.step import ScaledTrainState, compile_step, create_state, make_model, mean_loss
from lm.text import Corpus, training_batch, validation_batches

STRETCH = 10


def next_stop(step: int, last: int, *intervals: int) -> int:
  """The first step after ``step`` that is ``last`` or a multiple of an interval; 0 is none."""
  return min(last, *((step // every + 1) * every for every in intervals if every))


def due(step: int, last: int, every: int) -> bool:
  """Whether what comes every so many steps, and at the end, comes after ``step``; 0 is never."""
  return every > 0 and (step == last or step % every == 0)


def run_stretch(
  step_fn: Callable[..., tuple[fp8.TrainState, jax.Array]],
  state: fp8.TrainState,
  curve: Curve,
  draw: Callable[..., jax.Array | np.ndarray],
  stop: int,
) -> fp8.TrainState:
  """Trains until ``stop``, and adds the losses and the rate to ``curve``.

  Args:
    step_fn: the compiled step.
    state: the training state after ``curve.step`` steps; donated.
    curve: the losses so far; added to in place.
    draw: gives the batch of a step, asked as ``draw(step=...)``.
    stop: the steps taken when this returns.

  Returns:
    The new training state.
  """
  begun, start, losses = time.perf_counter(), curve.step, []
  for step in range(start, stop):
    state, loss = step_fn(state, draw(step=step))
    losses.append(loss)
  jax.block_until_ready((state, losses))
  curve.rates.append((stop - start) / (time.perf_counter() - begun))
  curve.train.extend(float(loss) for loss in losses)
  return state


def validate(
  loss_of: Callable[[Any, Any], jax.Array],
  variables: Any,
  batches: Sequence[jax.Array | np.ndarray],
) -> float:
  """Mean loss over the validation batches."""
  return float(np.mean([float(loss_of(variables, batch)) for batch in batches]))


def tree_bytes(tree: Any) -> int:
  """Bytes of all arrays in a tree."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def summarize(
  run: Run,
  state: fp8.TrainState,
  curve: Curve,
  compiled: tuple[Any, float],
) -> Result:
  """Gathers what a finished run is reported by; ``compiled`` is what ``compile_step`` gave."""
  step_fn, compile_seconds = compiled
  params = state.params["params"]
  scaled = isinstance(state, ScaledTrainState)
  return Result(
    run=run,
    curve=curve,
    parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
    state_bytes=tree_bytes(state),
    fp8_state_bytes=tree_bytes(state.params.get(fp8.OVERWRITE_WITH_GRADIENT, {})),
    temp_bytes=step_fn.memory_analysis().temp_size_in_bytes,
    compile_seconds=compile_seconds,
    loss_scale=float(state.dynamic_scale.scale) if scaled else None,
    skipped_steps=None if state.skipped_steps is None else int(state.skipped_steps),
  )


def has_state(run: Run) -> bool:
  """Whether there is FP8 state, which calibration could fill."""
  recipe = recipe_of(run)
  return recipe is not None and any(recipe.init_state(role) for role in Role)


def calibrated(
  config: TrainConfig,
  run: Run,
  state: fp8.TrainState,
  draw: Callable[..., jax.Array],
  display: Display,
) -> fp8.TrainState:
  """Fills the FP8 state from the batches of the first steps, as many as are configured."""
  if not config.calibrate or recipe_of(run) is None:
    return state
  if not has_state(run):
    display.note("nothing to calibrate: its recipe has no state")
    return state
  batches = [draw(step=step) for step in range(config.calibrate)]
  loss_fn = functools.partial(mean_loss, state.apply_fn)
  model = make_model(config, run)
  variables = fp8.calibrate(model, state.params, batches, loss_fn, progress=False)
  display.note(f"calibrated on the batches of the first {config.calibrate} steps")
  return state.replace(params=variables)


def identify(config: TrainConfig, run: Run, corpus: Corpus) -> dict[str, Any]:
  """Everything that decides the curve of a run, in JSON's types."""
  settings = config.as_dict()
  if not (config.calibrate and has_state(run)):
    del settings["calibrate"]
  return {"run": run, "text": corpus.digest, **settings}


def open_checkpoints(config: TrainConfig, run: Run, corpus: Corpus, folder: Path) -> Checkpoints:
  """Opens the checkpoints of a run in ``folder``."""
  return Checkpoints(folder, identity=identify(config, run, corpus))


def require_startable(
  config: TrainConfig, run: Run, corpus: Corpus, *, folder: Path, resume: bool
) -> None:
  """Raises, before anything is compiled, where ``folder`` is none that ``train`` can begin with."""
  with open_checkpoints(config, run, corpus, folder) as checkpoints:
    checkpoints.find(resume=resume)


def feeder(config: TrainConfig, corpus: Corpus, devices: Devices) -> Callable[..., jax.Array]:
  """Gives what draws the batch of a step, ``draw(step=...)``: of each process, its own rows."""
  rows, size = devices.rows(config.batch_size), config.batch_size
  sizes = {"batch_size": size, "seq_len": config.seq_len}
  read = functools.partial(training_batch, corpus, seed=config.seed, rows=rows, **sizes)
  return lambda *, step: devices.put(read(step=step), size)


def held_out(config: TrainConfig, corpus: Corpus, devices: Devices) -> list[jax.Array]:
  """The validation batches, shared out as those of training."""
  rows, size = devices.rows(config.batch_size), config.batch_size
  sizes = {"batch_size": size, "seq_len": config.seq_len}
  batches = validation_batches(corpus, limit=config.validation_batches, **sizes)
  return [devices.put(batch[rows], size) for batch in batches]


def train(
  config: TrainConfig,
  run: Run,
  corpus: Corpus,
  *,
  folder: Path,
  resume: bool = False,
  checkpoint_every: int = 0,
  devices: Devices | None = None,
  display: Display | None = None,
) -> tuple[Result, Any]:
  """Trains one model.

  Args:
    config: what to train.
    run: BF16 or a recipe.
    corpus: the text.
    folder: where this run's checkpoints are.
    resume: go on from the newest checkpoint there, if there is one.
    checkpoint_every: steps between checkpoints; 0 writes none.
    devices: that share each batch; None is this process's first.
    display: is told what happens; None shows nothing.

  Returns:
    The whole curve, also the part before a resumption, and how the run went; and the trained
    variables, on this process's first device.
  """
  display, devices = display or Silent(), devices or Devices.first()
  draw, batches = feeder(config, corpus, devices), held_out(config, corpus, devices)
  state = create_state(config, run, devices)
  loss_of = jax.jit(functools.partial(mean_loss, state.apply_fn))
  with open_checkpoints(config, run, corpus, folder) as checkpoints:
    state, curve = checkpoints.start(state, resume=resume)
    if resume:
      display.note(
        f"goes on after step {curve.step}" if curve.step else "no checkpoint: starts anew"
      )
    if not curve.step:
      state = calibrated(config, run, state, draw, display)
    compiled = compile_step(state, draw(step=0))
    display.note(f"compiled in {compiled[1]:.1f} s")
    while curve.step < config.steps:
      stop = next_stop(curve.step, config.steps, STRETCH, config.validate_every, checkpoint_every)
      state = run_stretch(compiled[0], state, curve, draw, stop)
      if validated := due(stop, config.steps, config.validate_every):
        curve.validation.append((stop, validate(loss_of, state.params, batches)))
      if saved := due(stop, config.steps, checkpoint_every):
        checkpoints.save(state, curve)
      display.update(curve, validated=validated, saved=saved)
  return summarize(run, state, curve, compiled), whole(state.params)
