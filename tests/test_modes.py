"""The table that ``python -m tests.modes`` prints, several columns at once."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest

from tests import modes
from tests.features import FEATURES

# Each is one kind of program; all features in all modes take the command half an hour.
QUICK = ("current: eager", "accumulated", "unused_state", "frozen_model")


@functools.cache
def plain(name: str) -> modes.Results | str:
  return modes.run([name])[name]


def wrong(mode: str, names: Sequence[str]) -> dict[str, str]:
  """What differs from a plain run, by feature."""
  found = modes.COMBINED[mode](names)
  exact = lambda name: mode not in modes.LOOSE and name != "stochastic_rounding"
  cells = {name: modes.compare(found[name], plain(name), name, exact=exact(name)) for name in names}
  return {name: cell for name, cell in cells.items() if cell != "right"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(QUICK[0], marks=pytest.mark.slow), *QUICK[1:]])
def test_quick_features_in_most_settings(name):
  assert not wrong("settings", [name])


@pytest.mark.parametrize("mode", [pytest.param("disable_jit", marks=pytest.mark.slow), "threads"])
def test_one_feature_in_the_other_settings(mode):
  found = modes.MODES[mode](["accumulated"])
  assert modes.compare(found["accumulated"], plain("accumulated"), "", exact=False) == "right"


def test_a_difference_is_seen(monkeypatch):
  assert plain("capability")
  monkeypatch.setitem(FEATURES, "capability", lambda: "another answer")
  assert wrong("settings", ["capability"])["capability"].startswith("'another answer', not")
  monkeypatch.setitem(FEATURES, "capability", lambda: 1 / 0)
  assert "ZeroDivisionError" in wrong("settings", ["capability"])["capability"]
