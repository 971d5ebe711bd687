"""The table that ``python -m tests.modes`` prints, several columns at once."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest

from tests import modes
from tests.features import FEATURES

# Each is one kind of program; the others run with the slow tests.
QUICK = ("delayed: eager", "current: eager", "accumulated", "unused_state", "frozen_model", "updates")
# JAX runs an eager shard_map one operation at a time, for most of a minute.
TOO_SLOW = {"disable_jit": ("sharded",)}


@functools.cache
def plain(name: str) -> modes.Results | str:
  return modes.run([name])[name]


def wrong(mode: str, names: Sequence[str]) -> dict[str, str]:
  """What differs from a plain run, by feature."""
  found = modes.COMBINED[mode](names)
  exact = lambda name: mode not in modes.LOOSE and name != "stochastic_rounding"
  cells = {name: modes.compare(found[name], plain(name), name, exact=exact(name)) for name in names}
  return {name: cell for name, cell in cells.items() if cell != "right"}


@pytest.mark.parametrize("name", QUICK)
def test_quick_features_in_all_settings(name):
  assert not wrong("settings", [name])


@pytest.mark.slow
@pytest.mark.parametrize("mode", modes.COMBINED)
def test_all_features(mode):
  assert not wrong(mode, [name for name in FEATURES if name not in TOO_SLOW.get(mode, ())])


def test_a_difference_is_seen(monkeypatch):
  assert plain("capability")
  monkeypatch.setitem(FEATURES, "capability", lambda: "another answer")
  assert wrong("settings", ["capability"])["capability"].startswith("'another answer', not")
  monkeypatch.setitem(FEATURES, "capability", lambda: 1 / 0)
  assert "ZeroDivisionError" in wrong("settings", ["capability"])["capability"]
