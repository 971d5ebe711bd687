"""Runs a training step and checks how it handles FP8 state.

With delayed scaling, the correct result is known. Each history shifts by one slot, the newest amax
is the maximum over the batch, and the scale follows from the history. The check writes known
histories and scales into the state of the caller. The result shows what the training loop does to
them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flax_fp8 import fields
from flax_fp8.linen.state import require_float32_state
from flax_fp8.training import paths
from flax_fp8.training.check.batch import beside, check_batch
from flax_fp8.training.check.fit import Verdict
from flax_fp8.training.check.report import Finding, TrainStepReport
from flax_fp8.training.check.rows import REPLACED, RIGHT, Row, judge_all, rows
from flax_fp8.training.check.step import HISTORY, SCALE, STEPS, Leaf, Outcome, Step, plant, same

# Planted histories are the amaxes of the step, times a random number in [2, 4], times a factor.
_FACTORS = (1.0, 1.0, 8.0, 64.0)
_SKIPS = 24
_SILENT = {"right", "copy", "replaced", "unmoved"}


def check_train_step(step_fn: Callable[..., Any], state: Any, batch: Any) -> TrainStepReport:
  """Runs a training step on a small batch, and reports how it changes FP8 state.

  Let ``h`` be a history in ``state``. One step must change the state as follows::

      scale = max(h) / fp8_max * 2**margin
      h = roll(h, -1)
      h[0] = amax  # amax: the maximum over the whole batch

  The report names each error that it finds. FP8 state may be summed over microbatches, summed over
  devices by psum, divided by a loss scale, averaged, kept, dropped, decayed, clipped, added to,
  reset, or passed to the optimizer. Its newest amax may cover only a part of the batch.

  Args:
    step_fn: ``step_fn(state, batch)`` returns the new state, or a tuple with it as an element. It
      may be jitted, and may donate its arguments.
    state: any pytree that contains the collection ``_overwrite_with_gradient``: a train state, a
      variables dict, or a tuple of variables and optimizer state. It is not changed.
    batch: pytree of arrays; use a small batch. If its leading axis has more than one element, the
      check also tests that amaxes cover the whole batch. It is not changed.

  Returns:
    The report. In a test, write ``assert report.ok, report``.

  Raises:
    TypeError: ``step_fn`` is not a function, or the FP8 state in ``state`` was cast from float32 to
      another dtype.
    ValueError: ``state`` has no amax histories; ``step_fn`` raises an error or does not return the
      state; it changes neither parameters nor FP8 state; it skips the steps that this check
      runs with test values in the state; or one call shifts histories by all of their slots.

  Numerics:
    The step is called about 15 times. Only the state of delayed scaling is checked, from this
    package or from ``flax.linen.fp8_ops``. A recipe without state has nothing to check.

    The check can't detect every error. In histories of one slot, a factor that is a power of two
    looks like a margin. Such a factor is found too if the kernel parameter is named ``kernel`` and
    belongs to the layer of the state. Means over parts of the batch that overlap its halves, thirds
    and fifths are not found.

    If only some tensors do not move, the report has a note instead of a finding, because the step
    may not use them.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
    >>> import flax_fp8 as fp8
    >>> model = nn.Dense(4, dot_general_cls=fp8.Fp8DotGeneral)
    >>> x = jnp.arange(8.0).reshape(2, 4)
    >>> variables = model.init(jax.random.key(0), x)
    >>> state = fp8.TrainState.create(apply_fn=model.apply, params=variables, tx=optax.sgd(0.1))
    >>> def step(state, x):
    ...   loss = lambda variables: jnp.mean(state.apply_fn(variables, x) ** 2)
    ...   return state.apply_gradients(grads=fp8.grad(loss)(state.params))
    >>> print(fp8.check_train_step(jax.jit(step), state, x))
    FP8 state of 3 tensors: correct. Each call moves histories by 1 slot.

  References:
    flax_fp8.TrainState; flax_fp8.partition_for_grad_overwrite.
  """
  fields.function("check_train_step", "step_fn", step_fn, "Pass step_fn(state, batch).")
  require_float32_state("check_train_step", state)
  step = Step(step_fn, state, batch)
  if not any(leaf.role and leaf.key == HISTORY for leaf in step.leaves):
    raise ValueError(
      "check_train_step: state must hold amax histories in the collection "
      f"'_overwrite_with_gradient'; got none among {len(jax.tree.leaves(state))} leaves. Pass the "
      "whole variables dict. A recipe without state, such as Float8CurrentScaling, has nothing to "
      "check."
    )
  base, first = _until_moved(step, state)
  if missing := [leaf for leaf in step.own if leaf.path not in first.fp8]:
    return _report(step, [_finding("dropped", missing, "is missing from the returned state")])
  shapes = {path: np.shape(leaf) for path, leaf in paths.leaves_by_path(first.state).items()}
  if reshaped := [leaf for leaf in step.own if shapes[leaf.path] != leaf.shape]:
    seen = f"has shape {shapes[reshaped[0].path]}, not {reshaped[0].shape}"
    return _report(step, [_finding("reshaped", reshaped, seen)])
  before, after = _plant_and_run(step, base, first)
  found = rows(step.own, before, after, _kernels(step, base, after[0]))
  verdicts = judge_all(found)
  if all(verdict == REPLACED for _, verdict in verdicts):
    raise ValueError(
      "check_train_step: amax histories must be longer than the number of steps in one call; got "
      f"amax_history_len={found[0].length}, and one call replaces every slot. Use a longer history "
      "or fewer steps per call."
    )
  findings = [*_findings(verdicts), *_in_optimizer(step, base, [first, *after])]
  if any(finding.kind == "summed" for finding in findings):
    findings = _name_psum(findings, _psum_sizes(step_fn, base, batch))
  right = [row for row, verdict in verdicts if verdict in (RIGHT, REPLACED)]
  if not findings:
    findings = _of_batch(step, before[0].state, batch, right)
  return _report(step, findings, verdicts)


def _until_moved(step: Step, state: Any) -> tuple[Any, Outcome]:
  """Calls the step until it is not skipped, because a loss scaler may skip the first steps.

  Returns:
    The state before the last call, and its outcome.
  """
  before = step.starting(state)
  for _ in range(_SKIPS):
    after = step(before.state)
    if not step.skipped(before, after):
      return before.state, after
    before = after
  raise ValueError(
    f"check_train_step: step_fn must train; got {_SKIPS} calls that changed neither parameters nor "
    "FP8 state. Pass the step that updates them, and a batch on which it does not skip."
  )


def _plant_and_run(step: Step, base: Any, first: Outcome) -> tuple[list[Outcome], list[Outcome]]:
  """Runs the step from planted state; returns the states before and after, by run."""
  random = np.random.default_rng(0)
  before: list[Outcome] = []
  after: list[Outcome] = []
  for factor in _FACTORS:
    planted = step.starting(plant(base, dict(_values(step.own, first, factor, random))))
    outcome = step(planted.state)
    if not step.skipped(planted, outcome):
      before.append(planted)
      after.append(outcome)
  if len(before) < 2:
    raise ValueError(
      f"check_train_step: step_fn must not skip steps; got {len(_FACTORS) - len(before)} of "
      f"{len(_FACTORS)} skipped. Pass a batch and a loss scale whose gradients are finite."
    )
  return before, after


def _values(
  leaves: Sequence[Leaf], first: Outcome, factor: float, random: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields distinct values of histories and scales, with magnitudes from the first run."""
  for leaf in leaves:
    amax = first.fp8.get(leaf.history)
    if leaf.key == STEPS:
      yield leaf.path, np.zeros(leaf.shape)
    elif leaf.key in (HISTORY, SCALE) and amax is not None:
      newest = amax[..., :1]
      newest = np.where(np.isfinite(newest) & (newest > 0), newest, 1.0).clip(1e-30, 1e30)
      unit = factor if leaf.key == HISTORY else factor / 448
      old = first.fp8[leaf.path]
      yield leaf.path, leaf.place(newest * unit * random.uniform(2, 4, old.shape))


def _kernels(step: Step, state: Any, after: Outcome) -> dict[str, np.ndarray]:
  """Returns the largest magnitude of each kernel parameter, for each element of a stack."""
  others = {p: x for p, x in paths.leaves_by_path(state).items() if p.endswith("/kernel")}
  found: dict[str, np.ndarray] = {}
  for leaf in step.own:
    if leaf.role != "kernel" or leaf.key != HISTORY:
      continue
    newest = after.fp8[leaf.path][..., 0]
    for path in sorted(beside(leaf.below, leaf.group, others), key=len):
      kernel = np.abs(np.asarray(others[path]).astype(np.float64))
      found.setdefault(leaf.tensor, _by_stack(kernel, newest))
  return found


def _by_stack(kernel: np.ndarray, newest: np.ndarray) -> np.ndarray:
  """Returns the largest magnitude of a kernel for each element of a stack.

  Shapes alone do not determine which axes of the kernel are stacking axes. With the correct axes,
  the recorded amaxes are a constant multiple of the amaxes of the kernel.

  Args:
    kernel: magnitudes.
    newest: recorded amax of each element of the stack.

  Returns:
    Amaxes with the shape of ``newest``. If the kernel lacks a stacking axis, it is shared along it.
  """
  shared = kernel.ndim
  options = [
    [*(axis for axis, other in enumerate(kernel.shape) if other == size), shared]
    for size in newest.shape
  ]
  found = [
    _largest(kernel, axes, newest.shape)
    for axes in itertools.product(*options)
    if len({*axes} - {shared}) == sum(axis != shared for axis in axes)
  ]

  def spread(largest: np.ndarray) -> float:
    if not (np.all(newest > 0) and np.all(largest > 0)):
      return math.inf
    return float(np.ptp(np.log(newest / largest)))

  return min(found, key=spread)


def _largest(kernel: np.ndarray, axes: Sequence[int], shape: tuple[int, ...]) -> np.ndarray:
  """Takes the maximum over all axes of the kernel but ``axes``, which become axes of ``shape``.

  An entry of ``kernel.ndim`` means that the maximum is repeated along that axis of ``shape``.
  """
  own = [axis for axis in axes if axis < kernel.ndim]
  largest = kernel.max(axis=tuple(axis for axis in range(kernel.ndim) if axis not in own))
  largest = largest.transpose([sorted(own).index(axis) for axis in own])
  sizes = [size if axis in own else 1 for axis, size in zip(axes, shape, strict=True)]
  return np.broadcast_to(largest.reshape(sizes), shape)


def _findings(verdicts: Sequence[tuple[Row, Verdict]]) -> list[Finding]:
  """Groups tensors with the same kind of error."""
  wrong = [(row, verdict) for row, verdict in verdicts if verdict.kind not in _SILENT]
  kinds = dict.fromkeys(verdict.kind for _, verdict in wrong)
  findings: list[Finding] = []
  for kind in kinds:
    these = [(row.name, verdict.seen) for row, verdict in wrong if verdict.kind == kind]
    seen = these[0][1] + (" (the first of them)" if len({s for _, s in these}) > 1 else "")
    if kind == "scaled" and len({verdict.seen for _, verdict in verdicts}) == 1:
      seen += ", for every tensor: the whole gradient tree was divided or scaled"
    findings.append(Finding(kind, tuple(name for name, _ in these), seen))
  return findings


def _finding(kind: str, leaves: Sequence[Leaf], seen: str) -> Finding:
  return Finding(kind, tuple(dict.fromkeys(leaf.tensor for leaf in leaves)), seen)


def _in_optimizer(step: Step, base: Any, outcomes: Sequence[Outcome]) -> list[Finding]:
  """Finds copies of FP8 state in the optimizer state that a step changes."""
  before = step.starting(base)
  inside = [leaf for leaf in step.leaves if leaf not in step.own]
  moved = [leaf for leaf in inside if not all(same(leaf.path, before, out) for out in outcomes)]
  seen = "the optimizer state has moments of it, and the step changes them"
  return [_finding("optimizer", moved, seen)] if moved else []


def _name_psum(findings: Sequence[Finding], sizes: Sequence[int]) -> list[Finding]:
  """Renames a sum to a psum if its factor is a product of mesh axis sizes of a shard_map."""
  counts = {math.prod(s) for n in range(1, 4) for s in itertools.combinations(sizes, n)}
  texts = {f"{count} times the correct value" for count in counts}
  return [
    Finding("psum", f.paths, f"{f.seen}: shard_map has as many devices")
    if f.kind == "summed" and f.seen in texts
    else f
    for f in findings
  ]


def _psum_sizes(step_fn: Callable[..., Any], state: Any, batch: Any) -> list[int]:
  """Returns the mesh axis sizes of all shard_maps in the step; empty if it can't be traced."""
  try:
    closed = jax.make_jaxpr(step_fn)(state, batch)
  except Exception:  # the step runs, but not as one traced function
    return []
  sizes: dict[str, int] = {}
  for equation in _equations(closed.jaxpr):
    if equation.primitive.name == "shard_map":
      sizes |= {str(name): int(size) for name, size in equation.params["mesh"].shape.items()}
  return list(sizes.values())


def _equations(jaxpr: Any) -> Iterator[Any]:
  """Yields the equations of a jaxpr and of its inner jaxprs."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from _equations(inner)


def _of_batch(step: Step, state: Any, batch: Any, right: Sequence[Row]) -> list[Finding]:
  """Checks that the newest amaxes of inputs cover the whole batch."""
  inputs = {row.name: row for row in right if row.leaf.role == "input"}

  def newest(outcome: Outcome) -> Mapping[str, float]:
    return {name: row.newest(outcome) for name, row in inputs.items()}

  def trained_by(name: str) -> frozenset[str]:
    return beside(inputs[name].leaf.below, inputs[name].leaf.group, step.others)

  return check_batch(batch, lambda b: step(state, b), newest, trained_by) if inputs else []


def _report(
  step: Step, findings: Sequence[Finding], verdicts: Sequence[tuple[Row, Verdict]] = ()
) -> TrainStepReport:
  tensors = tuple(dict.fromkeys(leaf.tensor for leaf in step.own if leaf.key == HISTORY))
  unmoved = [row.name for row, verdict in verdicts if verdict.kind == "unmoved"]
  text = "Some tensors did not move. This is correct if the step does not use them"
  notes = (f"{text}: {paths.few(unmoved)}.",) if unmoved else ()
  rolls = max((row.rolled() or 0 for row, _ in verdicts), default=0)
  return TrainStepReport(tuple(findings), tensors, rolls, notes)
