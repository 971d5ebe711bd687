"""Times that may be compared: each round runs every program once, in a rotating order.

A GPU's clock frequency follows its temperature and power. Programs that run in turn meet the same
conditions. So speedups are ratios within a round, and their median and quartiles are reported.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

FASTEST = 800e12  # FLOP/s that a BF16 GEMM hardly exceeds: it bounds a step's time from below
LEAST_SECONDS = 0.02  # of one run: far more than its dispatch takes
MOST_STEPS = 2000


def spread(values: Sequence[float]) -> dict[str, float]:
  """Median and quartiles; all three are the value itself if there is only one."""
  if len(values) < 2:
    return dict.fromkeys(("median", "low", "high"), values[0])
  low, median, high = statistics.quantiles(values, n=4, method="inclusive")
  return {"median": median, "low": low, "high": high}


def interleave(
  runs: Mapping[str, Callable[[], object]],
  rounds: int,
  *,
  warm_up: int = 2,
  now: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
  """Seconds per round of each program; a round begins with another program than the last one.

  ``warm_up`` rounds come before these and are not timed. ``now`` returns seconds.
  """
  names = list(runs)
  for name in names * warm_up:
    runs[name]()
  times: dict[str, list[float]] = {name: [] for name in names}
  for index in range(rounds):
    first = index % len(names)
    for name in names[first:] + names[:first]:
      start = now()
      runs[name]()
      times[name].append(now() - start)
  return times


def speedups(baseline: Sequence[float], times: Sequence[float]) -> list[float]:
  """The baseline's time over the other time, round by round."""
  return [base / own for base, own in zip(baseline, times, strict=True)]


def steps(flops: int, least: int) -> int:
  """How many steps make a run long beside its dispatch, but at least ``least``."""
  return min(max(least, round(LEAST_SECONDS * FASTEST / flops)), MOST_STEPS)


def figures(seconds: Sequence[float], baseline: Sequence[float], flops: int) -> dict[str, Any]:
  """One program's ms, TFLOP/s and speedup over the baseline, from its seconds per step."""
  return {
    "ms": spread([1e3 * each for each in seconds]),
    "tflops": spread([flops / each / 1e12 for each in seconds]),
    "speedup": spread(speedups(baseline, seconds)),
    "ms_rounds": [1e3 * each for each in seconds],
  }


def in_all(cases: Iterable[Mapping[str, Any]]) -> list[str]:
  """The variants that ran in every case, in their order."""
  first, *others = cases
  return [name for name in first if all(name in other for other in others)]


def summarize(layers: Mapping[str, Mapping[str, Any]], baseline: str) -> dict[str, Any]:
  """For a group of layers: the geometric mean of speedups, the speedup of the sum, and its ms."""
  medians = lambda name, key: [each[name][key]["median"] for each in layers.values()]
  total = lambda name: sum(medians(name, "ms"))
  return {
    name: {
      "geometric_mean": statistics.geometric_mean(medians(name, "speedup")),
      "of_the_sum": total(baseline) / total(name),
      "ms": total(name),
    }
    for name in in_all(layers.values())
  }
