"""Times that may be compared: every round runs each program once, in an order that moves on.

A GPU's clock follows its temperature and power. Programs that run in turn see the same of it, so
ratios are taken round by round, and their median and quartiles are what is reported.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Spread:
  """Median and quartiles."""

  median: float
  low: float
  high: float


def spread(values: Sequence[float]) -> Spread:
  """Median and quartiles of one value a round; of fewer than two, that value."""
  if len(values) < 2:
    return Spread(*3 * [values[0]])
  low, median, high = statistics.quantiles(values, n=4, method="inclusive")
  return Spread(median, low, high)


def interleave(
  runs: Mapping[str, Callable[[], object]],
  rounds: int,
  *,
  warm_up: int = 2,
  now: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
  """Times programs in turn.

  Args:
    runs: run a program, and return when it is done.
    rounds: in each, every program runs once; the first of them is another each time.
    warm_up: rounds before, which are not timed.
    now: seconds.

  Returns:
    Seconds a round, of each program.
  """
  names = list(runs)
  for _ in range(warm_up):
    for run in runs.values():
      run()
  times: dict[str, list[float]] = {name: [] for name in names}
  for index in range(rounds):
    first = index % len(names)
    for name in names[first:] + names[:first]:
      start = now()
      runs[name]()
      times[name].append(now() - start)
  return times


def speedups(baseline: Sequence[float], times: Sequence[float]) -> list[float]:
  """How many times as fast as the baseline, in each round."""
  return [base / own for base, own in zip(baseline, times, strict=True)]


def geometric_mean(values: Iterable[float]) -> float:
  """Of positive numbers."""
  return math.exp(statistics.fmean(math.log(value) for value in values))
