"""Statistics of pairs: how far an arm's losses are from those of its BF16 arm, seed by seed.

``gap = 100 * (loss / loss of BF16 - 1)``, in percent. Interval and test are Student's, for the mean
of the gaps. Equivalence is shown by two one-sided tests (TOST): the mean is above ``-margin`` and
below ``+margin``, each at level 5 %. Too few pairs show
neither a difference nor equivalence.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

from lm.train import LAST

MARGINS = (0.5, 1.0)  # percent; fixed before the committed gaps were computed
LEVEL = 0.05
LOSSES = ("training", "held_out", "held_out_in_bf16")

Record = Mapping[str, Any]


def losses(record: Record) -> dict[str, float]:
  """The three losses of a trial that are compared."""
  return {
    "training": statistics.fmean(record["training"][-LAST:]),
    "held_out": record["held_out"][-1],
    "held_out_in_bf16": record["held_out_in_bf16"],
  }


def percent(loss: float, base: float) -> float:
  return 100.0 * (loss / base - 1.0)


def p_value(gaps: Sequence[float], mean: float, alternative: str = "two-sided") -> float:
  """The p-value of Student's test that the mean of the gaps is ``mean``."""
  if len(set(gaps)) == 1 and gaps[0] == mean:
    return 1.0
  test: Any = stats.ttest_1samp(gaps, mean, alternative=alternative)
  return float(test.pvalue)


def equivalence(gaps: Sequence[float], margin: float) -> float:
  """The p-value of the two one-sided tests: small if the mean is within ``margin`` of zero."""
  return max(p_value(gaps, -margin, "greater"), p_value(gaps, margin, "less"))


def summarize(gaps: Sequence[float]) -> dict[str, Any]:
  """Mean, spread, interval and tests of the gaps of some seeds; only their mean for one seed."""
  found: dict[str, Any] = {"pairs": len(gaps), "mean": statistics.fmean(gaps)}
  if len(gaps) < 2:
    return found
  test: Any = stats.ttest_1samp(gaps, 0.0)
  interval, inner = test.confidence_interval(1 - LEVEL), test.confidence_interval(1 - 2 * LEVEL)
  return found | {
    "standard_deviation": statistics.stdev(gaps),
    "interval": [float(interval.low), float(interval.high)],
    "p": p_value(gaps, 0.0),
    "p_worse": p_value(gaps, 0.0, "greater"),
    "p_equivalent": {str(margin): equivalence(gaps, margin) for margin in MARGINS},
    # The smallest margin for which equivalence is shown.
    "equivalent_within": float(max(abs(inner.low), abs(inner.high))),
  }


def verdict(summary: Mapping[str, Any]) -> str:
  """The smallest margin within which equivalence is shown; ``-`` where it is not."""
  shown = [margin for margin, p in summary.get("p_equivalent", {}).items() if p < LEVEL]
  return f"{shown[0]} %" if shown else "-"


def compare(arm: Mapping[int, Record], base: Mapping[int, Record]) -> dict[str, Any]:
  """Compares an arm with its BF16 arm over the seeds that both have.

  Returns:
    For each loss the gaps by seed and their summary; ``gates``: of how many gates, all seeds
    together, the held-out losses differ; ``gates_above``: at how many of them the arm's is larger.
  """
  seeds = sorted(arm.keys() & base.keys())
  pairs = {seed: (losses(arm[seed]), losses(base[seed])) for seed in seeds}
  found: dict[str, Any] = {}
  for name in LOSSES:
    gaps = {str(seed): percent(ours[name], theirs[name]) for seed, (ours, theirs) in pairs.items()}
    found[name] = {"gaps": gaps} | summarize(list(gaps.values()))
  differ = [
    ours > theirs
    for seed in seeds
    for ours, theirs in zip(arm[seed]["held_out"], base[seed]["held_out"], strict=True)
    if ours != theirs
  ]
  return found | {"gates_above": sum(differ), "gates": len(differ)}
