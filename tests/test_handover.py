"""The benchmark that changes between BF16 and FP8, with steps that only nudge the parameters."""

import json

import jax
import jax.numpy as jnp
import pytest

import handover


@jax.jit
def nudge(state, windows):
  """Stands for the train step, whose compilation is tested elsewhere and is most of the cost."""
  params = {**state.params, "params": jax.tree.map(lambda x: x * 1.001, state.params["params"])}
  return state.replace(step=state.step + 1, params=params), jnp.mean(windows) / 100


@pytest.mark.slow
def test_a_short_run(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(handover, "compile_step", lambda *_: (nudge, 0.0))
  assert handover.main(["--steps", "6", "--batch-size", "2", "--out", str(tmp_path)]) == 0
  found = json.loads((tmp_path / "handover.json").read_text())
  assert [(c["step"], c["to"]) for c in found["changes"]] == [(2, "FP8"), (4, "BF16")]
  into, back = found["changes"]
  assert 0 < abs(into["jump_percent"]) < 1.0
  assert back["jump_percent"] == pytest.approx(100 * (back["after"] / back["before"] - 1))
  runs = found["runs"]
  assert found["same_until_the_first_change"]
  assert len(runs["bf16"]["train_curve"]) == len(runs["changing"]["train_curve"]) == 6
  # The steps do the same to both runs, and the changes nothing to the parameters.
  assert found["gap_percent"] == 0
  assert runs["changing"]["validation_curve"][-1] == runs["bf16"]["validation_curve"][-1]
  assert (tmp_path / "handover.png").read_bytes().startswith(b"\x89PNG")
  assert "BF16 all along" in capsys.readouterr().out


def test_a_lost_bit_is_an_error():
  with pytest.raises(RuntimeError, match=r"handover: a change must keep every bit; got .*False"):
    handover.require_same_bits({"a": jnp.zeros(2), "b": 0.0}, {"a": jnp.zeros(2), "b": -0.0})
