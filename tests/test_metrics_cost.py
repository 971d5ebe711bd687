"""The cost benchmark of metrics on a small layer; and that they cost nothing where they are not."""

import json

import pytest
from rich.console import Console

import metrics_cost
from flax_fp8.ops import metrics

SIZES = (256, 128, 128)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found():
  return metrics_cost.measure(("delayed",), SIZES, Console(quiet=True))


def test_counts(found):
  each = found["delayed"]
  assert each["without"]["fp8_gemms"] == each["with"]["fp8_gemms"] == 3
  assert each["extra"]["kernels"] > 0
  assert each["extra"]["mib_outside_gemms"] > 0
  assert json.loads(json.dumps(found)) == found


def test_table(found):
  assert metrics_cost.table(found).row_count == 1


def test_nothing_where_absent(found, monkeypatch):
  """Compiled for the GPU, with the measuring taken out: the same kernels, bytes and memory."""
  calls = []
  monkeypatch.setattr(metrics, "split", lambda state: calls.append(1) or (dict(state), {}))
  monkeypatch.delattr(metrics, "measure")
  out = metrics_cost.figures(metrics_cost.explain_step("delayed", "h100", SIZES))
  assert calls
  assert out == found["delayed"]["without"]
