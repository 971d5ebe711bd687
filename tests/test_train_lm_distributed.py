"""``train_lm.py`` on several devices and processes: who reads what, and what is refused.

``tests/reliability`` runs several processes, and kills them.
"""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

import lm.processes
import train_lm
from harness.output import write_text
from lm.checkpoints import Checkpoints, require_identity
from lm.config import PRESETS, UsageError
from lm.devices import AXIS, Devices
from lm.processes import connect, ending_at_once, require_same
from lm.step import jitted_step, step_shapes
from lm.text import Corpus

MICRO = dataclasses.replace(PRESETS["micro"], batch_size=8, seq_len=16)
JOINED = ["--coordinator", "127.0.0.1:1234", "--num-processes", "2", "--process-id", "1"]


def parse(*options):
  return train_lm.make_options().parse_args(options)


def devices(count):
  return Devices(tuple(jax.devices()[:count]))


def curve(*losses):
  return {"train_curve": list(losses), "validation_curve": [[1, 0.3]], "stretch_rates": [3.0]}


@pytest.mark.parametrize("count", [1, 2, 4])
def test_rows_are_the_same_whoever_reads_them(count):
  corpus, part = Corpus.read(), 8 // count
  rows = [slice(first, first + part) for first in range(0, 8, part)]
  read = [corpus.batch(MICRO, 5, each) for each in rows]
  np.testing.assert_array_equal(np.concatenate(read), corpus.batch(MICRO, 5))


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
  """As JAX says which devices belong to whom: here the last two of four."""
  shared = devices(4)
  split = shared.sharding(AXIS)
  indices = split.devices_indices_map((8,))
  mine = {device: indices[device] for device in shared.devices[2:]}
  monkeypatch.setattr(type(split), "addressable_devices_indices_map", lambda self, shape: mine)
  assert shared.rows(8) == slice(4, 8)


def test_the_state_is_whole_on_each_device():
  state = devices(4).create(lambda x: {"x": x}, np.arange(3.0))
  assert state["x"].is_fully_replicated
  assert len(state["x"].addressable_shards) == 4
  mine = state["x"].addressable_data(0)
  assert mine.sharding == SingleDeviceSharding(jax.devices()[0])
  np.testing.assert_array_equal(mine, np.arange(3.0))


@pytest.mark.slow
def test_one_device_compiles_the_program_without_shardings():
  """Except for the note that each argument is on one device, text for text."""
  first = Devices.first()
  state, windows = step_shapes(MICRO, "bf16")
  placed = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=first.sharding()), state
  )
  batch = first.put(Corpus.read().batch(MICRO, 0), MICRO.batch_size)
  note = r"sdy\.sharding = #sdy\.sharding<@empty_mesh[^>]*>"
  notes = rf" \{{{note}\}}|{note}, | *sdy\.mesh @empty_mesh.*\n"
  texts = [jitted_step.lower(*args).as_text() for args in ((state, windows), (placed, batch))]
  assert len({re.sub(notes, "", text) for text in texts}) == 1


def test_joining_the_others(monkeypatch):
  asked = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: asked.append(args))
  for options in ([], JOINED, ["--distributed"]):
    connect(parse(*options))
  assert asked == [("127.0.0.1:1234", 2, 1), (None, None, None)]


def test_what_one_process_does_alone(tmp_path, monkeypatch):
  require_same({"seed": 0})
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  monkeypatch.setattr(lm.processes, "require_same", lambda _: None)
  with pytest.raises(UsageError, match=r"--export: is for one process; got 3\. Train with these"):
    train_lm.check(parse("--export", str(tmp_path)), MICRO, Corpus.read())


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


def test_a_checkpoint_belongs_to_no_number_of_devices(tmp_path):
  """Written by one, read by four, written by four, read by two: each leaf has the same bits."""
  saved = state = state_of_many_kinds(devices(1).sharding())
  for count in (1, 4, 2):
    checkpoints = Checkpoints(tmp_path / f"by_{count}", {"seed": 0})
    checkpoints.save(state, curve(*[0.1] * 12))
    fresh = jax.tree.map(jnp.zeros_like, state)
    target = jax.device_put(fresh, devices(4 if count == 1 else 2).sharding())
    state, found = checkpoints.start(target, resume=True)
    checkpoints.manager.close()
    assert found == curve(*[0.1] * 12)
    assert state["params"].sharding == target["params"].sharding
    jax.tree.map(np.testing.assert_array_equal, state, saved)


def test_what_was_saved_must_have_the_same_configuration():
  require_identity({"a": 1}, {"a": 1}, "x")
  with pytest.raises(UsageError, match=r"x must have the same configuration; got a=1 \(there: 2\)"):
    require_identity({"a": 1}, {"a": 2}, "x")
