"""Damaged checkpoints, killed and concurrent writers, and full disks lose no data."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import flax_fp8 as fp8


def equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def child(script, directory, *arguments):
  """Returns the command and environment of a child process; its script has ``directory``."""
  head = "import os, shutil, signal\nfrom pathlib import Path\nimport numpy as np\n"
  head += f"import flax_fp8 as fp8\ndirectory = {str(directory)!r}\n"
  environment = {**os.environ, "PYTHONPATH": str(Path(fp8.__file__).parents[1])}
  command = [sys.executable, "-c", head + textwrap.dedent(script), *arguments]
  return {"args": command, "env": environment, "text": True}


def run_child(script, directory, **options):
  return subprocess.run(**child(script, directory), capture_output=True, check=False, **options)


def run_children(script, directory):
  """Runs two children at once, with arguments ``0`` and ``1``; returns their outputs."""
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
  children = [subprocess.Popen(**child(script, directory, f"{i}"), **pipes) for i in (0, 1)]
  try:
    ended = [each.communicate(timeout=120) for each in children]
  finally:
    for each in children:
      each.kill()
  assert [each.returncode for each in children] == [0, 0], ended
  return [stdout for stdout, _ in ended]


def noise(seed, size=64):
  """Returns bytes that zstd can't compress, so it stores them unchanged, without a checksum."""
  return np.random.default_rng(seed).integers(0, 256, (size, size), np.uint8)


def data_file(checkpoint):
  """Returns the file of arrays that are too large for the index."""
  return max(checkpoint.rglob("d/*"), key=lambda path: path.stat().st_size)


def flip_one_bit(path):
  data = bytearray(path.read_bytes())
  data[data.index(noise(0)[32].tobytes()) + 5] ^= 16
  path.write_bytes(data)


class TestDamage:
  """``tests/reliability/damaged_checkpoints.py`` damages files in every way."""

  def test_one_flipped_bit(self, tmp_path):
    fp8.save_checkpoint(tmp_path, {"noise": noise(0)})
    flip_one_bit(data_file(tmp_path))
    rule = r"must be complete and undamaged; got .*\['noise'\] differ from what was saved"
    with pytest.raises(ValueError, match=rule):
      fp8.restore_checkpoint(tmp_path, {"noise": noise(0)})

  def test_without_checksums_nothing_is_verified(self, tmp_path):
    with ocp.CheckpointManager(tmp_path) as manager:
      manager.save(0, args=ocp.args.StandardSave({"noise": noise(0)}))
    flip_one_bit(data_file(tmp_path))
    got = fp8.restore_checkpoint(tmp_path, {"noise": noise(0)}).tree
    assert np.count_nonzero(got["noise"] != noise(0)) == 1

  def test_half_a_checkpoint(self, tmp_path):
    """A missing file gives an error, or does not change the result."""
    script = """
      kernel = np.random.default_rng(0).normal(size=(64, 64))  # too large for the index to hold
      state = {"kernel": kernel, "scale": np.ones(1, np.float32)}
      fp8.save_checkpoint(directory, state)
      for path in sorted(path for path in Path(directory).rglob("*") if path.is_file()):
        path.rename("kept")
        try:
          got, *_ = fp8.restore_checkpoint(directory, state)
        except ValueError as error:
          print(str(error))
        else:
          assert all((got[name] == state[name]).all() for name in state), path
        Path("kept").rename(path)
      fp8.restore_checkpoint(directory, state)
    """
    child = run_child(script, tmp_path / "whole", cwd=tmp_path)
    assert child.returncode == 0, child.stderr
    errors = child.stdout.splitlines()
    assert len(errors) >= 4  # without metadata, manifest, index, or the kernel
    assert all(
      "restore_checkpoint: the checkpoint must be complete and undamaged" in error
      for error in errors
    )
    assert max(map(len, errors)) < 1000


@pytest.mark.skipif(os.name != "posix", reason="limits and locks are POSIX's")
class TestFailures:
  """The old checkpoint stays."""

  def test_a_full_disk(self, tmp_path):
    state = {"noise": noise(0)}
    fp8.save_checkpoint(tmp_path, state)
    script = """
      import resource
      resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))  # bytes of a file
      noise = np.random.default_rng(1).integers(0, 256, (64, 64), np.uint8)
      try:
        fp8.save_checkpoint(directory, {"noise": noise}, overwrite=True)
      except OSError as error:
        print(str(error))
    """
    child = run_child(script, tmp_path)
    assert child.returncode == 0, child.stderr
    got = (
      f"save_checkpoint: the checkpoint must be written completely; got {tmp_path}, where writing"
    )
    assert child.stdout.startswith(got)
    assert "File too large" in child.stdout
    assert "An older checkpoint is still there. Fix the cause, such as a full disk" in child.stdout
    assert len(child.stdout) <= 600
    equal(fp8.restore_checkpoint(tmp_path, state).tree, state)
    fp8.save_checkpoint(tmp_path, {"noise": noise(1)}, overwrite=True)
    equal(fp8.restore_checkpoint(tmp_path, state).tree, {"noise": noise(1)})

  @pytest.mark.slow
  @pytest.mark.parametrize("overwrite", [True, False])
  def test_another_program_is_saving(self, overwrite, tmp_path, monkeypatch):
    """A child process tries to save during a save."""
    script = f"""
      try:
        fp8.save_checkpoint(directory, {{"noise": np.zeros(3)}}, overwrite={overwrite})
      except OSError as error:
        print(str(error))
    """
    children, save = [], ocp.CheckpointManager.save

    def save_slowly(self, *args, **kwargs):
      children.append(run_child(script, tmp_path))
      return save(self, *args, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "save", save_slowly)
    fp8.save_checkpoint(tmp_path, {"noise": noise(0)})
    assert children[0].stdout.startswith(
      f"save_checkpoint: only one program may save to a directory at a time; got {tmp_path}, where"
    ), children[0].stderr
    equal(fp8.restore_checkpoint(tmp_path, {"noise": noise(1)}).tree, {"noise": noise(0)})

  @pytest.mark.slow
  def test_two_programs_at_once(self, tmp_path):
    """If both start at the same time, one saves, or both save one after the other."""
    script = """
      import sys, time
      state = {f"{i}": np.full((512, 512), float(sys.argv[1])) for i in range(8)}
      Path(f"{directory}.{sys.argv[1]}").touch()
      while not all(Path(f"{directory}.{i}").exists() for i in (0, 1)):
        time.sleep(0.001)
      try:
        fp8.save_checkpoint(directory, state, overwrite=True)
      except BlockingIOError as error:
        print(str(error))
    """
    said = run_children(script, tmp_path / "new")
    assert all(words.startswith("save_checkpoint: only one program") for words in said if words)
    target = {f"{i}": np.zeros((512, 512)) for i in range(8)}
    got = fp8.restore_checkpoint(tmp_path / "new", target).tree
    (value,) = {float(x) for leaf in got.values() for x in np.unique(leaf)}
    assert not said[int(value)]

  @pytest.mark.slow
  def test_a_program_of_two_processes(self, tmp_path):
    """Both save, restore, and detect a flipped bit in their shards; one process reads all."""
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      address = f"127.0.0.1:{probe.getsockname()[1]}"
    script = f"""
      import sys, jax
      from jax.experimental import multihost_utils
      from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
      jax.config.update("jax_cpu_collectives_implementation", "gloo")
      jax.distributed.initialize({address!r}, 2, int(sys.argv[1]))
      data = np.random.default_rng(0).integers(0, 256, (256, 256), np.uint8)
      mesh = Mesh(jax.devices(), "x")
      put = lambda x, *spec: jax.make_array_from_callback(
        x.shape, NamedSharding(mesh, P(*spec)), lambda index: x[index])
      state = {{"rows": put(data, "x"), "all": put(data), "columns": put(data, None, "x"),
                "numpy": data, "epoch": 3}}
      fp8.save_checkpoint(directory, state)
      got = fp8.restore_checkpoint(directory, state).tree
      for name in ("rows", "columns", "all"):
        for shard in got[name].addressable_shards:
          np.testing.assert_array_equal(shard.data, data[shard.index])
      multihost_utils.sync_global_devices("restored")
      if sys.argv[1] == "0":
        shutil.copytree(directory, directory + ".copy")
        for path in Path(directory).rglob("d/*"):
          whole = path.read_bytes()
          begin = data[0, :8].tobytes()
          path.write_bytes(whole.replace(begin, bytes([begin[0] ^ 1]) + begin[1:]))
      multihost_utils.sync_global_devices("damaged")
      try:
        fp8.restore_checkpoint(directory, state)
      except ValueError as error:
        print(str(error))
      multihost_utils.sync_global_devices("seen")
    """
    first, second = run_children(script, tmp_path / "new")
    assert "['all', 'columns', 'numpy', 'rows'] differ from what was saved" in first
    assert "['all', 'numpy'] differ from what was saved" in second
    state = {name: noise(0, 256) for name in ("rows", "all", "columns", "numpy")} | {"epoch": 3}
    equal(fp8.restore_checkpoint(tmp_path / "new.copy", state).tree, state)

  @pytest.mark.slow
  @pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
  @pytest.mark.parametrize(
    ("killed_by", "survives"),
    [("os.rename = os.replace", 0.0), ("shutil.rmtree", 1.0)],
    ids=["new", "old"],
  )
  def test_killed(self, tmp_path, killed_by, survives):
    """Kills before the new checkpoint is renamed, and while the old one is deleted."""
    fp8.save_checkpoint(tmp_path, {"kernel": jnp.zeros((64, 64))})
    script = f"""
      die = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
      {killed_by} = die
      fp8.save_checkpoint(directory, {{"kernel": np.ones((64, 64), np.float32)}}, overwrite=True)
    """
    child = run_child(script, tmp_path)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert len(list(tmp_path.iterdir())) == 2  # the old checkpoint, and the new one or a part of it
    target = {"kernel": jnp.full((64, 64), 2.0)}
    got, *_ = fp8.restore_checkpoint(tmp_path, target)
    np.testing.assert_array_equal(got["kernel"], np.full((64, 64), survives))
    fp8.save_checkpoint(tmp_path, target, overwrite=True)
    equal(fp8.restore_checkpoint(tmp_path, target).tree, target)
