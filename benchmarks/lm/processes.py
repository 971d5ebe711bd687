"""Several processes as one program: each is told which it is, and process 0 speaks for all.

    train_lm.py --coordinator HOST:PORT --num-processes 2 --process-id 0    # and, elsewhere,
    train_lm.py --coordinator HOST:PORT --num-processes 2 --process-id 1

All options are JAX's own of ``jax.distributed.initialize``. On CPUs, JAX reduces between processes
by gloo, which it has with it.
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

from lm.errors import UsageError
from lm.options import not_negative, positive

TOGETHER = ("coordinator", "num_processes", "process_id")
# Of a process that died the others hear at once where they wait for its numbers, else after this.
HEARTBEAT_SECONDS = 30
# The first process that is done waits so long for the last one.
SHUTDOWN_SECONDS = 60


def add_options(parser: argparse.ArgumentParser) -> None:
  """Adds the options by which several processes find each other."""
  group = parser.add_argument_group("several processes, each started by itself")
  add = group.add_argument
  add("--coordinator", metavar="HOST:PORT", help="address that process 0 listens on")
  add("--num-processes", type=positive, metavar="N", help="number of processes")
  add("--process-id", type=not_negative, metavar="I", help="number of this process, from 0")
  add("--distributed", action="store_true", help="get these three from the cluster (Slurm, MPI)")


def option(name: str) -> str:
  """An attribute's name as it is on the command line."""
  return f"--{name.replace('_', '-')}"


def require_whole(arguments: argparse.Namespace) -> bool:
  """Says whether this is one of several processes.

  Raises:
    UsageError: the options that go together are not all there, or contradict each other.
  """
  given = {name: getattr(arguments, name) for name in TOGETHER}
  named = [name for name, value in given.items() if value is not None]
  if arguments.distributed and named:
    raise UsageError(
      "--distributed: the cluster says what else would have to be named; got "
      f"{option(named[0])} too. Give one of them."
    )
  if not named:
    return arguments.distributed
  if missing := [option(name) for name in TOGETHER if name not in named]:
    raise UsageError(
      f"{option(named[0])}: goes with {', '.join(map(option, TOGETHER))}; got no "
      f"{', no '.join(missing)}. Give all three."
    )
  _, colon, port = given["coordinator"].rpartition(":")
  if not (colon and port.isdecimal()):
    raise UsageError(
      f"--coordinator: must be HOST:PORT; got {given['coordinator']}. Name a port of process 0's "
      "machine that nothing listens on."
    )
  if given["process_id"] >= given["num_processes"]:
    raise UsageError(
      "--process-id: processes are numbered from 0 and must be fewer than --num-processes; got "
      f"{given['process_id']} of {given['num_processes']}. Start as many as there are numbers."
    )
  return True


def connect(arguments: argparse.Namespace) -> None:
  """Joins the other processes, where there are any; before JAX's backends start.

  Raises:
    UsageError: the options don't say how, or the others can't be reached.
  """
  if not require_whole(arguments):
    return
  try:
    jax.distributed.initialize(
      arguments.coordinator,
      arguments.num_processes,
      arguments.process_id,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
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
  """Ends this process on an error at once, where JAX would wait for the others to end as well.

  They may be waiting for its numbers, or the error may be that one of them has died.
  """
  try:
    yield
  except UsageError:  # which all processes have alike
    raise
  except Exception:
    if jax.process_count() == 1:
      raise
    traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def require_alone(name: str) -> None:
  """Raises where an option is for one process, and there are several."""
  if (count := jax.process_count()) > 1:
    raise UsageError(
      f"{name}: is for one process; got {count}. Train with these, and then once more with one and "
      "--resume: it goes on from the last checkpoint."
    )


def require_same(identity: Any) -> None:
  """Raises, in every process, where they were not all asked for the same.

  Args:
    identity: what was asked for, in JSON's types.
  """
  if jax.process_count() == 1:
    return
  digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).digest()
  found = multihost_utils.process_allgather(np.frombuffer(digest, np.uint32))
  if others := np.flatnonzero((found != found[0]).any(axis=1)).tolist():
    raise UsageError(
      "--process-id: all processes must have the same options and read the same text; got others "
      f"than process 0's in {', '.join(map(str, others))}. Start them with one command line."
    )
