"""Several devices and processes: who reads what, what is refused, and the same bits as of one."""

import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from rich.console import Console

import kill_and_resume
import lm.processes
import train_lm
from kill_and_resume import Kill, Runs, plan, require_resumed, total_steps
from lm.checkpoints import Checkpoints, read_newest
from lm.config import PRESETS
from lm.curve import Curve
from lm.devices import Devices, whole
from lm.errors import UsageError
from lm.files import write_text
from lm.launch import Group, environment, free_port
from lm.processes import connect, ending_at_once, require_alone, require_same, require_whole
from lm.progress import ConsoleDisplay
from lm.step import jitted_step, step_shapes
from lm.text import read_corpus, training_batch
from lm.train import feeder

MICRO = PRESETS["micro"]
JOINED = ["--coordinator", "127.0.0.1:1234", "--num-processes", "2", "--process-id", "1"]


def parse(*options):
  return train_lm.make_parser().parse_args(options)


def devices(count):
  return Devices(tuple(jax.devices()[:count]))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_rows_are_the_same_whoever_reads_them(count):
  corpus = read_corpus()
  sizes = {"batch_size": 8, "seq_len": 16, "seed": 3, "step": 5}
  batch = training_batch(corpus, **sizes)
  part = 8 // count
  read = [
    training_batch(corpus, **sizes, rows=slice(first, first + part)) for first in range(0, 8, part)
  ]
  np.testing.assert_array_equal(np.concatenate(read), batch)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_batch_is_shared_out_in_order(count):
  shared, batch = devices(count), np.arange(24, dtype=np.uint8).reshape(8, 3)
  assert shared.rows(8) == slice(0, 8)
  put = shared.put(batch, 8)
  np.testing.assert_array_equal(put, batch)
  shards = sorted(put.addressable_shards, key=lambda shard: shard.device.id)
  assert [shard.device for shard in shards] == jax.devices()[:count]
  np.testing.assert_array_equal(np.concatenate([shard.data for shard in shards]), batch)


def test_a_process_has_the_rows_of_its_devices(monkeypatch):
  """As JAX says which devices are whose: here, of four, the last two."""
  shared = devices(4)
  indices = shared.split.devices_indices_map((8,))
  mine = {device: indices[device] for device in shared.devices[2:]}
  kind = type(shared.split)
  monkeypatch.setattr(kind, "addressable_devices_indices_map", lambda self, shape: mine)
  assert shared.rows(8) == slice(4, 8)


def test_the_state_is_whole_on_each_device():
  shared = devices(4)
  state = shared.create(lambda x: {"x": x, "step": jnp.zeros((), jnp.int32)}, np.arange(3.0))
  assert state["x"].is_fully_replicated
  assert len(state["x"].addressable_shards) == 4
  mine = whole(state)
  assert mine["x"].sharding == SingleDeviceSharding(jax.devices()[0])
  np.testing.assert_array_equal(mine["x"], np.arange(3.0))


def test_one_device_compiles_what_it_always_did():
  """But for the note that each argument is on one device, text for text."""
  config, first = dataclasses.replace(MICRO, batch_size=2), Devices.first()
  state, windows = step_shapes(config, "bf16")
  placed = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=first.replicated), state
  )
  batch = feeder(config, read_corpus(), first)(step=0)
  note = r"sdy\.sharding = #sdy\.sharding<@empty_mesh[^>]*>"
  notes = rf" \{{{note}\}}|{note}, | *sdy\.mesh @empty_mesh.*\n"
  texts = [jitted_step.lower(*args).as_text() for args in ((state, windows), (placed, batch))]
  assert len({re.sub(notes, "", text) for text in texts}) == 1


@pytest.mark.parametrize(
  ("options", "refusal"),
  [
    (["--coordinator", "a:1"], r"--coordinator: .* got no --num-processes, no --process-id"),
    (["--process-id", "0"], r"--process-id: .* got no --coordinator, no --num-processes"),
    (
      ["--coordinator", "a", *JOINED[2:]],
      r"--coordinator: must be HOST:PORT; got a\. Name a port",
    ),
    ([*JOINED[:-1], "2"], r"--process-id: .* fewer than --num-processes; got 2 of 2\."),
    ([*JOINED, "--distributed"], r"--distributed: .* got --coordinator too"),
  ],
  ids=["coordinator", "id", "port", "number", "distributed"],
)
def test_options_that_go_together(options, refusal):
  with pytest.raises(UsageError, match=refusal):
    require_whole(parse(*options))


def test_joining_the_others(monkeypatch):
  asked = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: asked.append(args))
  for options in ([], JOINED, ["--distributed"]):
    connect(parse(*options))
  assert asked == [("127.0.0.1:1234", 2, 1), (None, None, None)]

  def fail(*_, **__):
    raise RuntimeError("DEADLINE_EXCEEDED\nand more")

  monkeypatch.setattr(jax.distributed, "initialize", fail)
  with pytest.raises(UsageError, match=r"^--coordinator: .* find each other; got: DEADLINE_EXC"):
    connect(parse(*JOINED))
  with pytest.raises(UsageError, match=r"^--distributed: "):
    connect(parse("--distributed"))


def test_a_batch_must_be_shared_evenly(tmp_path, capsys, monkeypatch):
  every = devices(4)
  monkeypatch.setattr(Devices, "every", lambda: every)
  options = ["--preset", "micro", "--batch-size", "6", "--out", str(tmp_path / "out")]
  assert train_lm.main(options) == 2
  refusal = "--batch-size: the devices share each batch evenly, so it must be a multiple of their"
  assert f"{refusal} number; got 6 for 4 devices. Use 4, or" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()
  every.require_even(8)


def test_what_one_process_does_alone(monkeypatch):
  require_alone("--export")
  require_same({"seed": 0})
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  with pytest.raises(UsageError, match=r"--export: is for one process; got 3\. Train with these"):
    require_alone("--export")
  with pytest.raises(UsageError, match=r"got 6 for 4 devices of 3 processes"):
    devices(4).require_even(6)


def test_processes_are_asked_for_the_same(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  digests = []

  def gather(mine):
    digests.append(mine)
    return np.stack([digests[0], digests[0], mine])

  monkeypatch.setattr(lm.processes.multihost_utils, "process_allgather", gather)
  require_same({"seed": 0})
  require_same({"seed": 0})
  with pytest.raises(UsageError, match=r"must have the same options .* process 0's in 2\."):
    require_same({"seed": 1})


def test_an_error_of_one_of_several_ends_it_at_once(monkeypatch, capsys):
  ended = []
  monkeypatch.setattr(lm.processes.os, "_exit", ended.append)
  with pytest.raises(RuntimeError, match="alone"), ending_at_once():
    raise RuntimeError("alone")
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(UsageError, match="of all"), ending_at_once():
    raise UsageError("of all")
  with ending_at_once():
    raise RuntimeError("of several")
  assert ended == [1]
  assert "RuntimeError: of several" in capsys.readouterr().err


def test_files_are_there_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / "new" / "results.json"
  write_text(path, "old")

  def half(self, text):
    self.write_bytes(text[:1].encode())
    raise OSError("killed")

  monkeypatch.setattr(Path, "write_text", half)
  with pytest.raises(OSError, match="killed"):
    write_text(path, "new")
  assert path.read_text() == "old"


def test_a_checkpoint_is_reported_once_it_stands():
  shown, curve = io.StringIO(), Curve(train=[2.0, 1.0], rates=[3.0])
  with ConsoleDisplay(Console(file=shown), "FP8 delayed", 9) as display:
    display.update(curve, validated=False)
    display.update(curve, validated=False, saved=True)
  lines = shown.getvalue()
  assert lines.strip() == "FP8 delayed: step 2/9: loss 1.0000, 3.00 steps/s, saved"
  quiet = Console(file=shown, quiet=True, force_terminal=True)
  with ConsoleDisplay(quiet, "process 1", 9) as display:
    display.update(curve, validated=False, saved=True)
    display.note("nothing")
  assert shown.getvalue() == lines


def state_of_many_kinds(sharding):
  """Every kind of leaf that a training state may have."""
  make = lambda: {
    "params": jax.random.normal(jax.random.key(0), (8, 4)),
    "kernel_scale": jnp.full((2, 1), 0.1, jnp.float32),
    "moments": jnp.arange(6, dtype=jnp.bfloat16) / 7,
    "loss_scale": jnp.float32(2.0**15),
    "step": jnp.int32(12),
    "finite": jnp.array(True),
  }
  return jax.jit(make, out_shardings=sharding)()


def test_a_checkpoint_is_of_no_number_of_devices(tmp_path):
  """Written by one, read by four, written by four, read by two: each leaf the same bits."""
  saved = state_of_many_kinds(devices(1).replicated)
  curve = Curve(train=[0.1] * 12, validation=[(12, 0.3)], rates=[1.0])
  state = saved
  for count in (1, 4, 2):
    folder = tmp_path / f"by_{count}"
    with Checkpoints(folder, identity={"seed": 0}) as checkpoints:
      checkpoints.save(state, curve)
      fresh = jax.tree.map(jnp.zeros_like, state)
      target = jax.device_put(fresh, devices(4 if count == 1 else 2).replicated)
      state, found = checkpoints.start(target, resume=True)
    assert found == curve
    assert state["params"].sharding == target["params"].sharding
    jax.tree.map(np.testing.assert_array_equal, state, saved)
    jax.tree.map(np.testing.assert_array_equal, read_newest(folder, fresh), saved)


def test_kills_are_spread_over_the_run():
  kills = plan(20, 2, seed=0)
  assert kills == plan(20, 2, seed=0) != plan(20, 2, seed=1)
  assert {kill.process for kill in kills} == {0, 1}
  assert sum(kill.after_step is None for kill in kills) == 5
  later = [kill.after_step for kill in kills if kill.after_step is not None]
  assert later == sorted(set(later))
  assert later[-1] + 2 * kill_and_resume.CHECKPOINT_EVERY < total_steps(20)


class Said:
  """A group of processes of which only the words matter."""

  def __init__(self, said):
    self.said = said

  resumed = Group.resumed


def test_a_resumed_run_goes_on_from_the_newest(tmp_path):
  folder = kill_and_resume.checkpoints(tmp_path)
  assert (kill_and_resume.newest(tmp_path), kill_and_resume.in_save(tmp_path)) == (0, False)
  for name in ("8", "10", "12.orbax-checkpoint-tmp"):
    (folder / name).mkdir(parents=True)
  assert (kill_and_resume.newest(tmp_path), kill_and_resume.in_save(tmp_path)) == (10, True)
  require_resumed(Said("FP8 delayed: goes on after step 10\n"), 10)
  require_resumed(Said("FP8 delayed: no checkpoint: starts anew\n"), 0)
  require_resumed(Said("\n"), 10)
  with pytest.raises(RuntimeError, match=r"must go on from the newest .* step 8, and 10"):
    require_resumed(Said("FP8 delayed: goes on after step 8\n"), 10)
  with pytest.raises(RuntimeError, match="must not start anew; got 10 on disk"):
    require_resumed(Said("FP8 delayed: no checkpoint: starts anew\n"), 10)


def test_what_dies_early_is_told(tmp_path):
  with (
    Group(["--no-such-option"], tmp_path) as group,
    pytest.raises(RuntimeError, match=r"(?s)got the end of process_0.log with 2\. .*--no-such-opt"),
  ):
    group.wait_until(lambda: False)


# Reads the newest checkpoint onto the devices of all processes, and writes it elsewhere.
COPY = """
import argparse, dataclasses, sys
from pathlib import Path
import jax, jax.numpy as jnp
from lm.config import PRESETS
from lm.devices import Devices
from lm.processes import add_options, connect
from lm.step import step_shapes
from lm.text import read_corpus
from lm.train import open_checkpoints

parser = argparse.ArgumentParser()
add_options(parser)
arguments, (source, target, steps) = parser.parse_known_args()
connect(arguments)
config = dataclasses.replace(PRESETS["micro"], steps=int(steps))
shapes, _ = step_shapes(config, "delayed")
zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
with open_checkpoints(config, "delayed", read_corpus(), Path(source)) as checkpoints:
  state, curve = checkpoints.start(Devices.every().create(zeros), resume=True)
with open_checkpoints(config, "delayed", read_corpus(), Path(target)) as checkpoints:
  checkpoints.save(state, curve)
"""


def copy(source, target, steps, processes):
  """Runs ``COPY`` as so many processes."""
  address = f"127.0.0.1:{free_port()}"
  started = []
  for index in range(processes):
    joins = ["--coordinator", address, "--num-processes", f"{processes}", "--process-id"]
    command = [sys.executable, "-c", COPY, *(str(x) for x in (source, target, steps))]
    command += [*joins, f"{index}"] if processes > 1 else []
    variables = environment(1)
    variables["PYTHONPATH"] += f":{variables['PYTHONPATH']}/benchmarks"
    started.append(subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True))
  for process in started:
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error


@pytest.mark.slow
def test_two_processes_killed_and_resumed_as_one(tmp_path):
  """One of two devices: the same bits as if it had been one process all along.

  The state, copied by one process, by four and by two, is the same as well.
  """
  runs = Runs(2, 1, tmp_path)
  runs.unbroken()
  pace = kill_and_resume.Pace(start=0.0, saves=0.1)
  found = runs.killed(Kill(process=1, after_step=8, delay=0.5), 0, pace)
  assert found.complete >= found.reported >= 8
  runs.processes, runs.devices = 1, 2
  assert runs.to_the_end() == found.complete
  end = kill_and_resume.compare(runs)
  assert (end["differing_leaves"], end["losses_equal"]) == ([], True)
  losses = json.loads((tmp_path / "killed" / "results.json").read_text())
  assert (losses["devices"], losses["processes"]) == (2, 1)
  source = kill_and_resume.checkpoints(tmp_path / "unbroken")
  shapes, _ = step_shapes(dataclasses.replace(MICRO, steps=runs.steps), "delayed")
  want = read_newest(source, shapes)
  for processes in (1, 4, 2):
    target = tmp_path / f"by_{processes}"
    copy(source, target, runs.steps, processes)
    jax.tree.map(np.testing.assert_array_equal, read_newest(target, shapes), want)
    source = target
