"""A run that was killed goes on as if it had not been: orbax checkpoints of state and curve.

A checkpoint holds the training state, the losses so far and the configuration. The data order
needs nothing more: batch t is a function of (seed, t). Orbax renames a finished checkpoint into
place, so a kill in the middle of a save leaves the one before.
"""

import dataclasses
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from lm.curve import Curve
from lm.errors import UsageError


class Checkpoints:
  """The checkpoints of one run, in one folder; a context manager."""

  def __init__(self, folder: Path, *, identity: dict[str, Any]) -> None:
    """Opens ``folder``.

    Args:
      folder: made when missing.
      identity: everything that decides the curve, in JSON's types.
    """
    self.folder, self.identity = folder, identity
    # Saves are synchronous: the next step donates, and so overwrites, the buffers being saved.
    # The last checkpoint is deleted only once its successor stands, so one is enough to keep.
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    self.manager = ocp.CheckpointManager(
      folder.absolute(), options=options, item_names=("state", "progress")
    )

  def __enter__(self) -> "Checkpoints":
    """Gives itself."""
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    """Closes the manager."""
    self.manager.close()

  def save(self, state: Any, curve: Curve) -> None:
    """Writes a checkpoint of the step that ``curve`` has reached."""
    progress = {"identity": self.identity, "curve": dataclasses.asdict(curve)}
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)
    )
    self.manager.save(curve.step, args=items)

  def find(self, *, resume: bool) -> Curve | None:
    """Finds the curve to go on from.

    Args:
      resume: go on from the newest checkpoint, if there is one.

    Returns:
      The newest checkpoint's curve; None where there is no checkpoint.

    Raises:
      UsageError: there are checkpoints and ``resume`` is off, or they are of another run.
    """
    step = self.manager.latest_step()
    if step is None:
      return None
    if not resume:
      raise UsageError(
        f"--out: a new run needs a folder without checkpoints; got {self.folder} with "
        f"step {step}. Add --resume to go on, or name another --out."
      )
    saved = self.manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))[
      "progress"
    ]
    check_identity(
      self.identity, saved["identity"], what=f"--resume: the checkpoint in {self.folder}"
    )
    return Curve.from_dict(saved["curve"])

  def start(self, state: Any, *, resume: bool) -> tuple[Any, Curve]:
    """Gives what the run begins with.

    Args:
      state: the fresh training state.
      resume: go on from the newest checkpoint, if there is one.

    Returns:
      The state and the curve, from the checkpoint or fresh.

    Raises:
      UsageError: as ``find``.
    """
    if (curve := self.find(resume=resume)) is None:
      return state, Curve()
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    items = ocp.args.Composite(state=ocp.args.StandardRestore(target))
    return self.manager.restore(curve.step, args=items)["state"], curve


def read_newest(folder: Path, shapes: Any) -> Any:
  """Reads the newest checkpoint's state onto this process's first device, whoever wrote it.

  Args:
    folder: of a run's checkpoints.
    shapes: the state's shapes and dtypes.
  """
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  items = ocp.args.Composite(state=ocp.args.StandardRestore(jax.tree.map(place, shapes)))
  with ocp.CheckpointManager(folder.absolute(), item_names=("state", "progress")) as manager:
    return manager.restore(manager.latest_step(), args=items)["state"]


def check_identity(identity: dict[str, Any], saved: dict[str, Any], *, what: str) -> None:
  """Raises when what was saved is of a run with another curve, naming what differs.

  Args:
    identity: everything that decides the curve.
    saved: the same of the run that was saved.
    what: begins the message: the option to change, and where the saved run is.
  """
  differing = [
    f"{name}={identity.get(name)} (there: {saved.get(name)})"
    for name in sorted(identity.keys() | saved.keys())
    if identity.get(name) != saved.get(name)
  ]
  if differing:
    raise UsageError(
      f"{what} must be of the same configuration; got {', '.join(differing)}. Use that one, or "
      "name another --out."
    )
