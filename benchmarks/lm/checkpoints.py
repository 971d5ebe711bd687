"""Checkpoints of training state and losses, so that a killed run continues with the same bits.

Orbax renames a finished checkpoint into place. A kill during a save leaves the one before. The data
order needs no state: batch t depends on (seed, t).
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lm.config import UsageError

Curve = dict[str, list[Any]]
ITEMS = ("state", "progress")


def new_curve() -> Curve:
  """The losses of a run: one per step, ``[step, loss]`` per validation, steps/s per stretch."""
  return {"train_curve": [], "validation_curve": [], "stretch_rates": []}


class Checkpoints:
  """The newest checkpoint of a run; ``identity`` has everything that decides the curve."""

  def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
    self.folder, self.identity = folder, identity
    # Synchronous, because the next step donates the buffers being saved. The old checkpoint is
    # deleted only after the new one is complete.
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    self.manager = ocp.CheckpointManager(folder.absolute(), options=options, item_names=ITEMS)

  def save(self, state: Any, curve: Curve) -> None:
    progress = ocp.args.JsonSave({"identity": self.identity, "curve": curve})
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=progress)
    self.manager.save(len(curve["train_curve"]), args=items)

  def find(self, *, resume: bool) -> Curve | None:
    """Returns the newest checkpoint's curve; None without a checkpoint."""
    step = self.manager.latest_step()
    if step is None:
      return None
    if not resume:
      raise UsageError(
        f"--out: a new run needs a folder without checkpoints; got {self.folder} with "
        f"step {step}. Add --resume to continue, or name another --out."
      )
    items = ocp.args.Composite(progress=ocp.args.JsonRestore())
    progress = self.manager.restore(step, args=items)["progress"]
    what = f"--resume: the checkpoint in {self.folder}"
    require_identity(self.identity, progress["identity"], what)
    return progress["curve"]

  def start(self, state: Any, *, resume: bool) -> tuple[Any, Curve]:
    """Returns state and curve of the newest checkpoint, or the given state and an empty curve."""
    if (curve := self.find(resume=resume)) is None:
      return state, new_curve()
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    return self.read(len(curve["train_curve"]), target), curve

  def close(self) -> None:
    self.manager.close()

  def read(self, step: int, target: Any) -> Any:
    items = ocp.args.Composite(state=ocp.args.StandardRestore(target))
    return self.manager.restore(step, args=items)["state"]


def require_identity(identity: dict[str, Any], saved: dict[str, Any], what: str) -> None:
  """Raises UsageError if what was saved has another curve; names the differing settings."""
  differing = [
    f"{name}={identity.get(name)} (there: {saved.get(name)})"
    for name in sorted(identity.keys() | saved.keys())
    if identity.get(name) != saved.get(name)
  ]
  if differing:
    raise UsageError(
      f"{what} must have the same configuration; got {', '.join(differing)}. Use that one, or "
      "name another --out."
    )
