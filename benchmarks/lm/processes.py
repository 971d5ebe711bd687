"""Several processes as one program: each is told its number, and process 0 prints and writes.

    train_lm.py --coordinator HOST:PORT --num-processes 2 --process-id 0    # and, elsewhere,
    train_lm.py --coordinator HOST:PORT --num-processes 2 --process-id 1

The options are those of ``jax.distributed.initialize``.
"""

import argparse
import hashlib
import json
import os
import sys
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from harness.output import positive
from lm.config import UsageError

TOGETHER = ("--coordinator", "--num-processes", "--process-id")
# Heartbeat: after this time, processes that wait for nothing hear of a dead one. Shutdown: how long
# the first process to finish waits for the last.
TIMEOUTS: dict[str, Any] = {"heartbeat_timeout_seconds": 30, "shutdown_timeout_seconds": 60}


def not_negative(text: str) -> int:
  """Parses an integer that must be at least 0."""
  if (value := int(text)) < 0:
    raise argparse.ArgumentTypeError(f"must be at least 0; got {text}")
  return value


def add_options(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument_group("several processes, each started separately").add_argument
  add("--coordinator", metavar="HOST:PORT", help="address that process 0 listens on")
  add("--num-processes", type=positive, metavar="N", help="number of processes")
  add("--process-id", type=not_negative, metavar="I", help="number of this process, from 0")
  add("--distributed", action="store_true", help="get these three from the cluster (Slurm, MPI)")


def is_one_of_several(arguments: argparse.Namespace) -> bool:
  """Whether this is one of several processes; raises UsageError for contradicting options."""
  given = (arguments.coordinator, arguments.num_processes, arguments.process_id)
  missing = [name for name, value in zip(TOGETHER, given, strict=True) if value is None]
  first = next((name for name in TOGETHER if name not in missing), None)
  if first is None:
    return arguments.distributed
  error = None
  if arguments.distributed:
    error = f"--distributed: takes the other options from the cluster; got {first} too. Give one."
  elif missing:
    got = ", no ".join(missing)
    error = f"{first}: goes with {', '.join(TOGETHER)}; got no {got}. Give all three."
  elif not (":" in given[0] and given[0].rpartition(":")[2].isdecimal()):
    error = f"--coordinator: must be HOST:PORT; got {given[0]}. Name a free port of process 0."
  elif given[2] >= given[1]:
    rule = "--process-id: counts from 0, so it must be below --num-processes"
    error = f"{rule}; got {given[2]} of {given[1]}. Start as many as there are numbers."
  if error:
    raise UsageError(error)
  return True


def connect(arguments: argparse.Namespace) -> None:
  """Joins the other processes, if there are any, before JAX's backends start."""
  if not is_one_of_several(arguments):
    return
  own = (arguments.coordinator, arguments.num_processes, arguments.process_id)
  try:
    jax.distributed.initialize(*own, **TIMEOUTS)
  except (RuntimeError, ValueError) as error:
    name = "--distributed" if arguments.distributed else "--coordinator"
    raise UsageError(
      f"{name}: the processes must find each other; got: {str(error).splitlines()[0]}. Check that "
      "process 0 runs, and its address."
    ) from error


def speaks() -> bool:
  """Whether this is the process that prints and writes files."""
  return jax.process_index() == 0


@contextmanager
def ending_at_once() -> Generator[None]:
  """Ends one of several processes on an error at once; JAX would wait for the others to end."""
  try:
    yield
  except UsageError:  # the same in all processes
    raise
  except Exception:
    if jax.process_count() == 1:
      raise
    traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def require_alone(name: str) -> None:
  """Raises UsageError if an option for one process meets several."""
  if (count := jax.process_count()) > 1:
    raise UsageError(
      f"{name}: is for one process; got {count}. Train with these, then run one process with "
      "--resume: it continues from the last checkpoint."
    )


def require_same(identity: Any) -> None:
  """Raises UsageError, in every process, unless all were asked for the same, in JSON's types."""
  if jax.process_count() == 1:
    return
  digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).digest()
  found = multihost_utils.process_allgather(np.frombuffer(digest, np.uint32))
  if others := np.flatnonzero((found != found[0]).any(axis=1)).tolist():
    raise UsageError(
      "--process-id: all processes must have the same options and read the same text; got others "
      f"than process 0's in {', '.join(map(str, others))}. Start them with one command line."
    )
