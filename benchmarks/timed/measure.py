"""Measures a group of programs that do the same work in different ways."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from timed.clock import Spread, interleave, speedups, spread
from timed.compiling import MIB, Ready
from timed.options import Options
from timed.programs import Arrays
from timed.variants import BF16

FASTEST = 800e12  # FLOP/s that no BF16 GEMM exceeds much: how long a step takes at least
LEAST_SECONDS = 0.02  # of one loop: far above what dispatching it takes
MOST_STEPS = 2000


def steps(flops: int, options: Options) -> int:
  """How many steps a loop has, so that it is long beside its dispatch."""
  if options.tiny:
    return options.repeat
  return min(max(options.repeat, round(LEAST_SECONDS * FASTEST / flops)), MOST_STEPS)


class Deadline:
  """Tells when to begin nothing new."""

  def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
    self._now = now
    self._end = now() + seconds

  def passed(self) -> bool:
    return self._now() > self._end


def measure(
  ready: Mapping[str, Ready], options: Options, arrays: Arrays | None = None
) -> dict[str, Any]:
  """Runs the programs of one case in turn.

  Args:
    ready: the programs, ``BF16`` among them.
    options: the rounds; an FP8 program that does not run is noted there, and left out.
    arrays: gives the programs their arguments; None makes them up.

  Returns:
    Of each program: ms a step, TFLOP/s of its GEMMs, speedup over BF16 (all with quartiles), each
    round's ms, and what is known of the program itself.
  """
  arrays = arrays or Arrays()
  runs = {name: _run(each, arrays.fill(each.program.shapes)) for name, each in ready.items()}
  in_order = sorted(runs, key=lambda name: ready[name].figures.get("temp_mib", 0.0))
  allocated = {name: _allocated(name, runs[name], ready[name], options) for name in in_order}
  able = {name: run for name, run in runs.items() if allocated[name] is not None}
  times = interleave(able, options.rounds)
  per_step = {name: [t / ready[name].program.repeat for t in times[name]] for name in able}
  return {
    name: figures(per_step[name], per_step[BF16], ready[name].program.flops)
    | ready[name].figures
    | {"repeat": ready[name].program.repeat}
    | (allocated[name] or {})
    for name in able
  }


def _run(ready: Ready, arguments: Any) -> Callable[[], object]:
  return lambda: jax.block_until_ready(ready.run(*arguments))


def _allocated(
  name: str, run: Callable[[], object], ready: Ready, options: Options
) -> dict[str, float] | None:
  """Runs a program once, and asks JAX's allocator what that took beside its arguments.

  Returns:
    ``allocated_mib``, of results and temporaries, where the peak so far was exceeded: programs come
    in the order of their temporaries. None where the program does not run, which is noted.
  """
  before = _allocator()
  try:
    run()
  except Exception as error:
    if not ready.program.is_fp8:
      raise
    options.fail(name, error)
    return None
  after = _allocator()
  if after.get("peak_bytes_in_use", 0) <= before.get("peak_bytes_in_use", 0):
    return {}
  return {"allocated_mib": (after["peak_bytes_in_use"] - before["bytes_in_use"]) / MIB}


def _allocator() -> dict[str, int]:
  return jax.devices()[0].memory_stats() or {}


def figures(seconds: list[float], baseline: list[float], flops: int) -> dict[str, Any]:
  """The numbers of one program."""
  return {
    "ms": as_dict(spread([1e3 * each for each in seconds])),
    "tflops": as_dict(spread([flops / each / 1e12 for each in seconds])),
    "speedup": as_dict(spread(speedups(baseline, seconds))),
    "ms_rounds": [1e3 * each for each in seconds],
  }


def as_dict(value: Spread) -> dict[str, float]:
  """For JSON."""
  return dataclasses.asdict(value)
