"""The report of ``check_train_step``: findings with numbers and advice."""

from __future__ import annotations

import dataclasses
import os.path

from flax_fp8 import tables
from flax_fp8.tables import Table

_SHOWN = 4
_ADVICE = {
  "summed": (
    "Sum or average only gradients of parameters. Take the maximum of state over microbatches with "
    "fp8.accumulate_gradients, and over several uses of a layer in one loss with "
    "fp8.value_and_grad."
  ),
  "psum": (
    "Inside shard_map, psum only gradients of parameters, and pmax the state "
    "(fp8.partition_for_grad_overwrite). Or differentiate outside shard_map."
  ),
  "scaled": (
    "Divide only gradients of parameters by a loss scale or a number of tokens. Use "
    "fp8.DynamicScale, fp8.accumulate_gradients(..., weights=tokens), or "
    "fp8.partition_for_grad_overwrite before the division."
  ),
  "averaged": (
    "Average only parameters, variables['params'], and evaluate them with the newest state."
  ),
  "kept": (
    "Overwrite the state with its gradient: use fp8.TrainState, or fp8.apply_updates(variables, "
    "updates, overwrite). When you merge collections, the new ones must replace the old ones."
  ),
  "dropped": (
    "Return the collection _overwrite_with_gradient too. Use fp8.TrainState with the whole "
    "variables dict as params, or fp8.apply_updates."
  ),
  "decayed": (
    "Decay only parameters: pass grads['params'] and variables['params'] to the optimizer, or use "
    "fp8.TrainState."
  ),
  "clipped": (
    "Split off the state with fp8.partition_for_grad_overwrite before the norm and the clipping, "
    "or use fp8.TrainState, which never passes state to the optimizer."
  ),
  "added": (
    "The gradient of state is its new value, not a direction. Overwrite the state with it "
    "(fp8.TrainState, fp8.apply_updates), and pass only parameters to the optimizer."
  ),
  "reset": (
    "Carry state from step to step. State that a step did not use has a gradient of zero. "
    "fp8.TrainState and fp8.apply_updates then keep the old state."
  ),
  "optimizer": (
    "Pass only parameters to the optimizer: variables['params'] to tx.init and tx.update, and "
    "grads['params'] to tx.update. Or use fp8.TrainState."
  ),
  "partial": (
    "Take the maximum of amaxes over all microbatches and devices of a step: use "
    "fp8.accumulate_gradients for microbatches, and lax.pmax for devices."
  ),
  "mean": (
    "Take the maximum of amaxes over all microbatches and devices of a step, not the mean: use "
    "fp8.accumulate_gradients for microbatches, and lax.pmax, not lax.pmean, for devices."
  ),
  "rounded": "Keep state float32: exclude it from casts of gradients and parameters.",
  "reshaped": "Return state in its original shape.",
  "not finite": "Exclude state from the computation that made it NaN or infinite.",
  "unexplained": (
    "Overwrite the state with its unchanged gradient: split it off with "
    "fp8.partition_for_grad_overwrite before any other change of gradients."
  ),
}


@dataclasses.dataclass(frozen=True)
class Finding:
  """One error of a training step in its handling of FP8 state.

  Attributes:
    kind: "summed", "psum", "scaled", "averaged", "kept", "dropped", "decayed", "clipped", "added",
      "reset", "optimizer", "partial", "mean", "rounded", "reshaped", "not finite" or "unexplained".
    paths: paths of the affected tensors in the training state.
    seen: observed values, with a number.
  """

  kind: str
  paths: tuple[str, ...]
  seen: str

  @property
  def advice(self) -> str:
    """Advice: what to change in the training step."""
    return _ADVICE[self.kind]


@dataclasses.dataclass(frozen=True)
class TrainStepReport:
  """Report of ``check_train_step``. Print it to see findings and advice.

  Attributes:
    findings: errors of the training step; empty if it is correct.
    tensors: paths of all tensors with state.
    rolls: number of slots by which one call of the step shifts histories; 0 if unknown.
    notes: remarks that are not errors, such as tensors that were not checked.

  Example:
    >>> import flax_fp8 as fp8
    >>> report = fp8.TrainStepReport(findings=(), tensors=("dense/input",), rolls=1, notes=())
    >>> print(report)
    FP8 state of 1 tensor: correct. Each call moves histories by 1 slot.

  References:
    flax_fp8.check_train_step.
  """

  findings: tuple[Finding, ...]
  tensors: tuple[str, ...]
  rolls: int
  notes: tuple[str, ...]

  @property
  def ok(self) -> bool:
    """Whether there are no findings."""
    return not self.findings

  @property
  def kinds(self) -> frozenset[str]:
    """Kinds of all findings."""
    return frozenset(finding.kind for finding in self.findings)

  def __str__(self) -> str:
    """Returns the findings as text, at the width of the terminal."""
    where = os.path.commonpath(self.tensors) if self.tensors else ""
    head = f"FP8 state of {_count(len(self.tensors), 'tensor')}"
    if self.ok:
      moves = f" Each call moves histories by {_count(self.rolls, 'slot')}." if self.rolls else ""
      return tables.terminal((f"{head}: correct.{moves}", *self.notes))
    head += f" in {where}" if where else ""
    rows = tuple((each.kind, each.seen, self._tensors(each, where)) for each in self.findings)
    advice = {each.kind: each.advice for each in self.findings}
    parts: list[Table | str] = [f"{head}: {_count(len(self.findings), 'finding')}."]
    parts.append(Table(("<finding", "<seen", "<state of"), rows))
    parts.extend(f"{kind}: {line}" for kind, line in advice.items())
    return tables.terminal((*parts, *self.notes))

  def _tensors(self, finding: Finding, where: str) -> str:
    """Returns the first paths and the number of paths left out."""
    if set(finding.paths) == set(self.tensors):
      return f"all {_count(len(self.tensors), 'tensor')}"
    names = [path.removeprefix(where).removeprefix("/") for path in finding.paths]
    more = [f"... and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return "\n".join(names[:_SHOWN] + more)


def _count(number: int, what: str) -> str:
  return f"{number} {what}{'' if number == 1 else 's'}"
