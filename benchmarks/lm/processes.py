"""Several processes as one program: each is told its number, and process 0 prints and writes.

    train_lm.py --coordinator HOST:PORT --num-processes 2 --process-id 0    # and, elsewhere,
    train_lm.py --coordinator HOST:PORT --num-processes 2 --process-id 1

The options are those of ``jax.distributed.initialize``, which checks them.
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

from lm.config import UsageError

# Heartbeat: after this time, processes that wait for nothing hear of a dead one. Shutdown: how long
# the first process to finish waits for the last.
TIMEOUTS: dict[str, Any] = {"heartbeat_timeout_seconds": 30, "shutdown_timeout_seconds": 60}


def add_options(parser: argparse.ArgumentParser) -> None:
  add = parser.add_argument_group("several processes, each started separately").add_argument
  add("--coordinator", metavar="HOST:PORT", help="address that process 0 listens on")
  add("--num-processes", type=int, metavar="N", help="number of processes")
  add("--process-id", type=int, metavar="I", help="number of this process, from 0")
  add("--distributed", action="store_true", help="get these three from the cluster (Slurm, MPI)")


def connect(arguments: argparse.Namespace) -> None:
  """Joins the other processes, if there are any, before JAX's backends start."""
  own = (arguments.coordinator, arguments.num_processes, arguments.process_id)
  if arguments.distributed or own != (None, None, None):
    jax.distributed.initialize(*own, **TIMEOUTS)


def speaks() -> bool:
  """Whether this is the process that prints and writes files."""
  return jax.process_index() == 0


@contextmanager
def ending_at_once() -> Generator[None]:
  """Ends one of several processes on an error at once; JAX would wait for the others to end."""
  try:
    yield
  except Exception:
    if jax.process_count() == 1:
      raise
    traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


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
