"""The experiments with small sizes, and their parts."""

import dataclasses
import json
import os
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from lm.config import ModelShape
from tests.reliability import (
  damaged_checkpoints,
  fault_injection,
  handover,
  kill_and_resume,
  several_processes,
)
from tests.reliability.damaged_checkpoints import DAMAGES
from tests.reliability.fault_injection import ARMS, Fault
from tests.reliability.launch import Group


@pytest.mark.slow
def test_killed_and_resumed_has_the_bits_of_the_unbroken_run(tmp_path):
  """Two processes, killed once; unbroken run and last life are one process of two devices."""
  found = kill_and_resume.measure(2, 1, 0, tmp_path, others=(1, 2))
  assert (found["end"]["differing_leaves"], found["end"]["losses_equal"]) == ([], True)
  (kill,) = found["kills"]
  assert found["last_life_resumed_after"] == kill["complete"] >= kill["reported"]


def test_kills_are_spread_over_the_run():
  kills = kill_and_resume.plan(20, 2, seed=0)
  assert kills == kill_and_resume.plan(20, 2, seed=0) != kill_and_resume.plan(20, 2, seed=1)
  assert {kill["process"] for kill in kills} == {0, 1}
  later = [kill["after_step"] for kill in kills if kill["after_step"] is not None]
  assert len(later) == 15
  assert later == sorted(set(later))
  assert later[-1] + 2 * kill_and_resume.CHECKPOINT_EVERY < kill_and_resume.Runs(2, 20, None).steps


def test_a_resumed_run_continues_from_the_newest_checkpoint(tmp_path):
  assert kill_and_resume.newest(tmp_path / "none") == (0, False)
  for name in ("8", "10", "12.orbax-checkpoint-tmp"):
    (tmp_path / name).mkdir()
  assert kill_and_resume.newest(tmp_path) == (10, True)
  require_resumed = kill_and_resume.require_resumed
  require_resumed("FP8 delayed: continues after step 10\n", 10, 10)
  require_resumed("FP8 delayed: no checkpoint, starts at step 0\n", 0, 0)
  require_resumed("\n", 0, 10)
  with pytest.raises(RuntimeError, match=r"must continue from the newest .* step 8, and 10"):
    require_resumed("FP8 delayed: continues after step 8\n", 8, 10)
  with pytest.raises(RuntimeError, match=r"must continue from the newest .* step 0, and 10"):
    require_resumed("FP8 delayed: no checkpoint, starts at step 0\n", 0, 10)


@pytest.mark.slow
def test_an_early_death_is_reported(tmp_path):
  with (
    Group(["--no-such-option"], tmp_path) as group,
    pytest.raises(RuntimeError, match=r"(?s)got the end of process_0.log with 2\. .*--no-such-opt"),
  ):
    group.wait_until(lambda: False)


def test_setups_are_compared_with_one_process_and_one_device(monkeypatch, tmp_path):
  """The bits of two processes are those of one: above."""

  def train(folder, run, steps, processes, devices):
    path = f"params/{fp8.OVERWRITE_WITH_GRADIENT}/scale"
    return [1.0 + (devices == 2)], {path: np.ones(1), "params/kernel": np.ones(1) * devices}

  monkeypatch.setattr(several_processes, "train", train)
  rows = several_processes.measure(tmp_path, "delayed", 1, ((1, 1), (1, 2), (2, 1)))
  assert [row["off"] for row in rows] == [0, 1, 0]
  assert [row["losses_as_one_process"] for row in rows] == [True, True, False]
  assert [row["state_as_one_process"] for row in rows] == [True, True, False]
  assert all(row["first_fp8_state_as_one_device"] for row in rows)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_handover_keeps_parameters_and_loss(tmp_path):
  found = handover.main(["--preset", "micro", "--steps", "6", "--out", str(tmp_path)])
  assert [(change["step"], change["to"]) for change in found["changes"]] == [
    (2, "FP8"),
    (4, "BF16"),
  ]
  for change in found["changes"]:
    assert abs(change["jump_percent"]) < 1
    assert change["jump_percent"] == pytest.approx(100 * (change["after"] / change["before"] - 1))
  runs = found["runs"]
  assert len(runs["bf16"]["train_curve"]) == len(runs["changing"]["train_curve"]) == 6
  assert abs(found["gap_percent"]) < 1
  assert (tmp_path / "handover.png").read_bytes().startswith(b"\x89PNG")


def test_a_lost_bit_is_an_error():
  with pytest.raises(RuntimeError, match=r"handover: a change must keep every bit; got .*False"):
    handover.require_same_bits({"a": jnp.zeros(2), "b": 0.0}, {"a": jnp.zeros(2), "b": -0.0})


SHAPE = ModelShape(d_model=8, d_ff=16, layers=1, heads=2, kv_heads=1)
SMALL = dataclasses.replace(
  fault_injection.CONFIG, shape=SHAPE, steps=12, batch_size=2, seq_len=16, validation_batches=1
)
SITE = "layers_0/{}/Faulty_0"
FAULTS = {
  3: Fault(3, SITE.format("up"), 0, np.nan, 0.5),
  5: Fault(5, SITE.format("query"), 1, np.inf, 0.0),
  8: Fault(8, SITE.format("down"), 2, -np.inf, 0.9),
}


@pytest.mark.slow
def test_a_skipped_step_is_as_if_its_batch_had_not_come():
  """Each kind of fault is seen; the state stays finite, and so does the next loss."""
  found, states = {}, {}
  for name in ("flax_fp8, clean", "flax_fp8, without those batches", "flax_fp8, skip_nonfinite"):
    found[name], states[name] = fault_injection.run(SMALL, ARMS[name], FAULTS)
  without, figures = states["flax_fp8, without those batches"], found["flax_fp8, skip_nonfinite"]
  state = states["flax_fp8, skip_nonfinite"]
  jax.tree.map(np.testing.assert_array_equal, state.params, without.params)
  summary = fault_injection.summarize(found, FAULTS)["flax_fp8, skip_nonfinite"]
  assert summary["skipped_steps"] == len(FAULTS)
  assert summary["steps_with_nonfinite_state"] == 0
  assert all(np.isfinite(figures["train"][step + 1]) for step in FAULTS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_flax_hides_infinities_and_keeps_what_is_not_finite():
  """Behind optax's guard, two faults of three are taken for good steps."""
  figures, _ = fault_injection.run(SMALL, ARMS["fp8_ops, apply_if_finite"], FAULTS)
  assert figures["skipped_steps"] == 1
  assert all(part > 0 for part in figures["nonfinite_state"][3:])


def test_faults_hit_every_kind_and_projection():
  sites = set(fault_injection.find_sites(SMALL))
  assert {fault.site for fault in FAULTS.values()} <= sites
  drawn = fault_injection.draw_faults(sorted(sites), 500, 40, 0)
  assert len(drawn) == 40
  assert {fault.kind for fault in drawn.values()} == {0, 1, 2}


@pytest.mark.slow
def test_a_damaged_checkpoint_is_restored_right_or_refused(tmp_path):
  assert damaged_checkpoints.main(["--count", "15", "--out", str(tmp_path)]) == 0
  found = json.loads((tmp_path / "damaged_checkpoints.json").read_text())
  assert sum(found["counts"]["all"].values()) == 15
  assert set(found["counts"]["all"]) == {"right", "refused"}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damages(kind, tmp_path):
  older, newer = tmp_path / "older", tmp_path / "newer"
  for folder, step in ((older, b"1"), (newer, b"2")):
    folder.mkdir()
    for name in ("a", "b"):
      (folder / name).write_bytes(40 * (name.encode() + step))
  before = {path.name: path.read_bytes() for path in newer.iterdir()}
  files = damaged_checkpoints.files
  DAMAGES[kind](newer / "a", random.Random(0), files(newer), files(older))
  after = {path.name: path.read_bytes() for path in newer.iterdir()}
  expected = {
    "bits flipped": lambda: len(after["a"]) == 80 and after["b"] == before["b"],
    "cut": lambda: before["a"].startswith(after["a"]) and after["b"] == before["b"],
    "removed": lambda: after == {"b": before["b"]},
    "exchanged": lambda: after == {"a": before["b"], "b": before["a"]},
    "of another step": lambda: after == {**before, "a": (older / "a").read_bytes()},
  }
  assert after != before
  assert expected[kind]()


def test_a_worker_that_dies_or_hangs_is_counted(monkeypatch):
  worker = damaged_checkpoints.Worker()
  assert worker.ask(os._exit, 2)[0] == "crashed"
  monkeypatch.setattr(damaged_checkpoints, "SECONDS", 0.0)
  assert worker.ask(repr)[0] == "hung"
