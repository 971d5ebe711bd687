"""Does a training step treat FP8 state rightly? Run it, and see what comes back.

With delayed scaling the right answer is known: each history moves by a slot, the newest amax is the
largest of the batch, and the scale follows the history. Histories and scales of known values are
put into the caller's state; what the step makes of them says what the loop around the model does.
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

# Planted histories are 2 to 4 times these times the amaxes of the step.
_FACTORS = (1.0, 1.0, 8.0, 64.0)
_SKIPS = 24
_SILENT = {"right", "copy", "replaced", "unmoved"}


def check_train_step(step_fn: Callable[..., Any], state: Any, batch: Any) -> TrainStepReport:
  """Runs a training step on a small batch and says what it does to FP8 state.

  With ``h`` a history put into ``state``, oldest first, the state after one step must hold::

      [*h[1:], amax]  # amax: the largest of the whole batch
      scale = max(h) / fp8_max * 2**margin

  What it holds instead is told apart: state that is summed over microbatches, psum-ed, divided by a
  loss scale, averaged, kept, dropped, decayed, clipped, added to, reset, given to the optimiser, or
  that has the amax of a part of the batch.

  Args:
    step_fn: ``step_fn(state, batch)``, returning the new state, or a tuple with it as an element;
      jitted or not; it may donate its arguments.
    state: any pytree with the collection ``_overwrite_with_gradient`` in it: a train state, a
      variables dict, a tuple of variables and optimiser state. Not changed.
    batch: pytree of arrays, small; with more than one element along its leading axis, whether
      amaxes are those of the whole batch is seen too. Not changed.

  Returns:
    The report. ``assert report.ok, report`` makes a test of it.

  Raises:
    TypeError: the FP8 state in ``state`` was cast to another dtype than float32.
    ValueError: ``state`` holds no FP8 state, ``step_fn`` raises or returns no state, it changes
      neither parameters nor FP8 state, or one call moves histories by all of their slots.

  Numerics:
    The step is called about 15 times. State of delayed scaling is judged, that of ours and of
    ``flax.linen.fp8_ops``; a recipe without state leaves nothing to judge. Not seen: a factor
    that is a power of two, as a margin is, in histories of one slot whose kernels are not found as
    parameters ``kernel`` beside the state; means over parts of the batch that overlap its halves,
    thirds and fifths.
    Tensors that do not move beside others that do are notes, not findings: the step may not use
    them.

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
    FP8 state of 3 tensors: right. It moves by 1 slot a call.

  References:
    flax_fp8.TrainState; flax_fp8.partition_for_grad_overwrite.
  """
  fields.function("check_train_step", "step_fn", step_fn, "Pass step_fn(state, batch).")
  require_float32_state("check_train_step", state)
  step = Step(step_fn, state, batch)
  if not any(leaf.role and leaf.key == HISTORY for leaf in step.leaves):
    raise ValueError(
      "check_train_step: state must hold amax histories, in the collection "
      f"'_overwrite_with_gradient'; got none among {len(jax.tree.leaves(state))} leaves. Pass the "
      "whole variables; a recipe without state, such as Float8CurrentScaling, has nothing to check."
    )
  base, first = _until_moved(step, state)
  if missing := [leaf for leaf in step.own if leaf.path not in first.fp8]:
    return _report(step, [_finding("dropped", missing, "is not in the state that came back")])
  shapes = {path: np.shape(leaf) for path, leaf in paths.leaves_by_path(first.state).items()}
  if reshaped := [leaf for leaf in step.own if shapes[leaf.path] != leaf.shape]:
    seen = f"has shape {shapes[reshaped[0].path]}, not {reshaped[0].shape}"
    return _report(step, [_finding("reshaped", reshaped, seen)])
  before, after = _plant_and_run(step, base, first)
  found = rows(step.own, before, after, _kernels(step, base, after[0]))
  verdicts = judge_all(found)
  if all(verdict == REPLACED for _, verdict in verdicts):
    raise ValueError(
      "check_train_step: a history must be longer than the steps of one call; got "
      f"amax_history_len={found[0].length}, of which one call leaves nothing. Check with longer "
      "histories, or fewer steps a call."
    )
  findings = [*_findings(verdicts), *_in_optimiser(step, base, [first, *after])]
  if any(finding.kind == "summed" for finding in findings):
    findings = _name_psum(findings, _psum_sizes(step_fn, base, batch))
  right = [row for row, verdict in verdicts if verdict in (RIGHT, REPLACED)]
  if not findings:
    findings = _of_batch(step, before[0].state, batch, right)
  return _report(step, findings, verdicts)


def _until_moved(step: Step, state: Any) -> tuple[Any, Outcome]:
  """Steps until one is not skipped, as a loss scaler may skip the first ones.

  Returns:
    The state before that step, and its outcome.
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
  """Runs the step from planted state; returns what went in and what came out, by run."""
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
  """Makes histories and scales near those of a first run, all of them different."""
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
  """Finds the kernel parameter of each kernel tensor: its largest magnitude, by stack."""
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
  """Takes the maximum of a kernel for each of a stack.

  Shapes alone do not say which axes of the kernel are those of the stack. Where they are chosen
  rightly, the recorded amaxes are one multiple of the kernel's.

  Args:
    kernel: magnitudes.
    newest: what a step recorded for each of the stack.

  Returns:
    Of the shape of ``newest``. An axis of the stack that the kernel lacks shares one kernel.
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
  """Takes the maximum along all axes but some, which become axes of ``shape``.

  One beyond the kernel's axes stands for an axis of ``shape`` along which the maximum is the same.
  """
  own = [axis for axis in axes if axis < kernel.ndim]
  largest = kernel.max(axis=tuple(axis for axis in range(kernel.ndim) if axis not in own))
  largest = largest.transpose([sorted(own).index(axis) for axis in own])
  sizes = [size if axis in own else 1 for axis, size in zip(axes, shape, strict=True)]
  return np.broadcast_to(largest.reshape(sizes), shape)


def _findings(verdicts: Sequence[tuple[Row, Verdict]]) -> list[Finding]:
  """Gathers tensors with the same trouble."""
  wrong = [(row, verdict) for row, verdict in verdicts if verdict.kind not in _SILENT]
  kinds = dict.fromkeys(verdict.kind for _, verdict in wrong)
  findings: list[Finding] = []
  for kind in kinds:
    these = [(row.name, verdict.seen) for row, verdict in wrong if verdict.kind == kind]
    seen = these[0][1] + (" (the first of them)" if len({s for _, s in these}) > 1 else "")
    if kind == "scaled" and len({verdict.seen for _, verdict in verdicts}) == 1:
      seen += ", of every tensor: the gradient tree was divided or scaled as a whole"
    findings.append(Finding(kind, tuple(name for name, _ in these), seen))
  return findings


def _finding(kind: str, leaves: Sequence[Leaf], seen: str) -> Finding:
  return Finding(kind, tuple(dict.fromkeys(leaf.tensor for leaf in leaves)), seen)


def _in_optimiser(step: Step, base: Any, outcomes: Sequence[Outcome]) -> list[Finding]:
  """Finds copies of the state inside the optimiser's, and whether a step changes them."""
  before = step.starting(base)
  inside = [leaf for leaf in step.leaves if leaf not in step.own]
  moved = [leaf for leaf in inside if not all(same(leaf.path, before, out) for out in outcomes)]
  seen = "the optimiser has moments of it, which the step changes"
  return [_finding("optimiser", moved, seen)] if moved else []


def _name_psum(findings: Sequence[Finding], sizes: Sequence[int]) -> list[Finding]:
  """Names sums by as many devices as a shard_map of the step sums over."""
  counts = {math.prod(s) for n in range(1, 4) for s in itertools.combinations(sizes, n)}
  texts = {f"{count} times the right value" for count in counts}
  return [
    Finding("psum", f.paths, f"{f.seen}: as many as shard_map sums over")
    if f.kind == "summed" and f.seen in texts
    else f
    for f in findings
  ]


def _psum_sizes(step_fn: Callable[..., Any], state: Any, batch: Any) -> list[int]:
  """Sizes of the mesh axes of all shard_maps in the step; none if it can't be traced whole."""
  try:
    closed = jax.make_jaxpr(step_fn)(state, batch)
  except Exception:  # it runs, but not as one traced function: there is no more to learn
    return []
  sizes: dict[str, int] = {}
  for equation in _equations(closed.jaxpr):
    if equation.primitive.name == "shard_map":
      sizes |= {str(name): int(size) for name, size in equation.params["mesh"].shape.items()}
  return list(sizes.values())


def _equations(jaxpr: Any) -> Iterator[Any]:
  """Yields the equations of a jaxpr and of all jaxprs in it."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from _equations(inner)


def _of_batch(step: Step, state: Any, batch: Any, right: Sequence[Row]) -> list[Finding]:
  """Asks whether the newest amaxes of inputs are those of the whole batch."""
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
  text = "Some did not move beside others that did, which is right if the step does not use them"
  notes = (f"{text}: {paths.few(unmoved)}.",) if unmoved else ()
  rolls = max((row.rolled() or 0 for row, _ in verdicts), default=0)
  return TrainStepReport(tuple(findings), tensors, rolls, notes)
