"""What ``check_train_step`` found: kinds, figures, and what to change."""

from __future__ import annotations

import dataclasses
import os.path

from flax_fp8 import tables
from flax_fp8.tables import Table

_SHOWN = 4
_ADVICE = {
  "summed": (
    "Sum and average gradients of parameters alone; state is the maximum over microbatches and "
    "uses: fp8.accumulate_gradients, and fp8.value_and_grad where one loss uses a layer repeatedly."
  ),
  "psum": (
    "Inside shard_map, psum gradients of parameters alone and pmax the state "
    "(fp8.partition_for_grad_overwrite); or differentiate around shard_map."
  ),
  "scaled": (
    "Scale gradients of parameters alone, be it by a loss scale or by a number of tokens: "
    "fp8.DynamicScale, fp8.accumulate_gradients(..., weights=tokens), or "
    "fp8.partition_for_grad_overwrite before the division."
  ),
  "averaged": (
    "Average parameters alone, variables['params'], and evaluate with the newest state beside them."
  ),
  "kept": (
    "Write the gradient of the state over the state: fp8.TrainState, or fp8.apply_updates(variables"
    ", updates, overwrite); merge the new collections over the old, not the old over the new."
  ),
  "dropped": (
    "Return the collection _overwrite_with_gradient too: fp8.TrainState with the whole variables "
    "dict as params, or fp8.apply_updates."
  ),
  "decayed": (
    "Decay parameters alone: take state out with fp8.partition_for_grad_overwrite before weight "
    "decay, or use fp8.TrainState."
  ),
  "clipped": (
    "Take state out with fp8.partition_for_grad_overwrite before the norm and the clipping, or use "
    "fp8.TrainState, whose optimiser never sees it."
  ),
  "added": (
    "The gradient of state is its new value, no direction: overwrite with it (fp8.TrainState, "
    "fp8.apply_updates), and give the optimiser parameters alone."
  ),
  "reset": (
    "Carry state from step to step. State that a step did not use has a gradient of zero: "
    "fp8.TrainState and fp8.apply_updates keep the old one there."
  ),
  "optimiser": (
    "Give tx.init and tx.update parameters alone: fp8.TrainState, or "
    "fp8.partition_for_grad_overwrite."
  ),
  "partial": (
    "The amax of a step is the largest over all of its microbatches and devices: "
    "fp8.accumulate_gradients; lax.pmax over devices."
  ),
  "mean": (
    "The amax of a step is the largest over all of its microbatches and devices, not their mean: "
    "fp8.accumulate_gradients; lax.pmax over devices, not lax.pmean."
  ),
  "rounded": "Keep state float32: leave it out of casts of gradients and parameters.",
  "reshaped": "Return state in the shape that it came in.",
  "not finite": "Compute state from finite histories; leave it out of whatever made this NaN.",
  "unexplained": (
    "Only the model's own gradient may become the new state: take it out with "
    "fp8.partition_for_grad_overwrite before anything else is done to gradients."
  ),
}


@dataclasses.dataclass(frozen=True)
class Finding:
  """One thing that a training step does wrong to FP8 state.

  Attributes:
    kind: "summed", "psum", "scaled", "averaged", "kept", "dropped", "decayed", "clipped", "added",
      "reset", "optimiser", "partial", "mean", "rounded", "reshaped", "not finite" or "unexplained".
    paths: the tensors whose state it is, by their paths in the training state.
    seen: what was seen, with its figure.
  """

  kind: str
  paths: tuple[str, ...]
  seen: str

  @property
  def advice(self) -> str:
    """What to change."""
    return _ADVICE[self.kind]


@dataclasses.dataclass(frozen=True)
class TrainStepReport:
  """What ``check_train_step`` found; ``print`` it.

  Attributes:
    findings: what is wrong; empty if nothing is.
    tensors: paths of all tensors with state.
    rolls: by how many slots one call of the step moves a history; 0 if none could be followed.
    notes: what is not wrong, but was not checked, or is worth knowing.

  Example:
    >>> import flax_fp8 as fp8
    >>> report = fp8.TrainStepReport(findings=(), tensors=("dense/input",), rolls=1, notes=())
    >>> print(report)
    FP8 state of 1 tensor: right. It moves by 1 slot a call.

  References:
    flax_fp8.check_train_step.
  """

  findings: tuple[Finding, ...]
  tensors: tuple[str, ...]
  rolls: int
  notes: tuple[str, ...]

  @property
  def ok(self) -> bool:
    """Tells whether nothing was found."""
    return not self.findings

  @property
  def kinds(self) -> frozenset[str]:
    """The kinds of all findings."""
    return frozenset(finding.kind for finding in self.findings)

  def __str__(self) -> str:
    """The findings as text, as wide as the terminal."""
    where = os.path.commonpath(self.tensors) if self.tensors else ""
    head = f"FP8 state of {_count(len(self.tensors), 'tensor')}"
    if self.ok:
      moves = f" It moves by {_count(self.rolls, 'slot')} a call." if self.rolls else ""
      return tables.terminal((f"{head}: right.{moves}", *self.notes))
    head += f" in {where}" if where else ""
    rows = tuple((each.kind, each.seen, self._tensors(each, where)) for each in self.findings)
    advice = {each.kind: each.advice for each in self.findings}
    parts: list[Table | str] = [f"{head}: {_count(len(self.findings), 'finding')}."]
    parts.append(Table(("<finding", "<seen", "<state of"), rows))
    parts.extend(f"{kind}: {line}" for kind, line in advice.items())
    return tables.terminal((*parts, *self.notes))

  def _tensors(self, finding: Finding, where: str) -> str:
    """The first paths, and how many more there are."""
    if set(finding.paths) == set(self.tensors):
      return f"all {_count(len(self.tensors), 'tensor')}"
    names = [path.removeprefix(where).removeprefix("/") for path in finding.paths]
    more = [f"... and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return "\n".join(names[:_SHOWN] + more)


def _count(number: int, what: str) -> str:
  return f"{number} {what}{'' if number == 1 else 's'}"
