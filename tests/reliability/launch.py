"""Starts ``train_lm.py`` as several processes of this machine, and reads what they print."""

import os
import re
import socket
import subprocess
import sys
import time

import jax
import numpy as np

from flax_fp8.training.paths import leaves_by_path
from harness.output import ROOT
from lm.checkpoints import Checkpoints
from lm.step import step_shapes

SCRIPT = ROOT / "benchmarks" / "train_lm.py"
SAVED = re.compile(r"step (\d+)/\d+: .*, saved$", re.MULTILINE)
RESUMED = re.compile(r"continues after step (\d+)$", re.MULTILINE)
# Short runs would spend most of their time in LLVM. XLA's own passes decide all arithmetic, and are
# the same; what is compared is compiled alike.
QUICK = "--xla_backend_optimization_level=0"


def free_port():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


class Group:
  """Processes that are one program; a context manager that leaves none of them behind.

  Args:
    options: of ``train_lm.py``.
    out: its ``--out``; logs go there too.
    processes: their number.
    devices: CPU devices of each.
  """

  def __init__(self, options, out, *, processes=1, devices=1):
    out.mkdir(parents=True, exist_ok=True)
    flags = f"{QUICK} --xla_force_host_platform_device_count={devices}"
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    joins = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", str(processes)]
    self.logs = [out / f"process_{index}.log" for index in range(processes)]
    self.processes = []
    for index, log in enumerate(self.logs):
      command = [sys.executable, str(SCRIPT), *options, "--out", str(out), "--explain", "none"]
      command += [*joins, "--process-id", str(index)] if processes > 1 else []
      with log.open("wb") as file:
        streams = {"stdout": file, "stderr": subprocess.STDOUT}
        self.processes.append(subprocess.Popen(command, env=os.environ | own, **streams))

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for process in self.processes:
      process.kill()
      process.wait()

  @property
  def said(self):
    """What process 0 has printed so far."""
    return self.logs[0].read_text()

  @property
  def saved(self):
    """The steps whose checkpoints were reported as saved."""
    return [int(step) for step in SAVED.findall(self.said)]

  @property
  def resumed(self):
    """The step after which it continued; 0 if it started anew or has said nothing yet."""
    found = RESUMED.search(self.said)
    return int(found[1]) if found else 0

  def wait_until(self, happened):
    """Waits for something that must happen while all processes run."""
    while not happened():
      for process, log in zip(self.processes, self.logs, strict=True):
        if process.poll() is not None and not happened():
          raise RuntimeError(
            f"train_lm: a process must run until it is killed; got the end of {log.name} with "
            f"{process.returncode}. It said:\n{log.read_text()[-2000:]}"
          )
      time.sleep(0.02)

  def kill(self, index):
    """Ends one process as a power cut would."""
    self.processes[index].kill()
    self.processes[index].wait()

  def end(self, grace):
    """Waits so many seconds for each process, and kills those that are left; says how many."""
    killed = 0
    for process in self.processes:
      try:
        process.wait(grace)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        killed += 1
    return killed

  def finish(self):
    """Waits until all have ended well."""
    for process, log in zip(self.processes, self.logs, strict=True):
      if code := process.wait():
        raise RuntimeError(
          f"train_lm: every process must end well; got {code} from {log.name}, which said:\n"
          f"{log.read_text()[-2000:]}"
        )


def final_leaves(folder, config, run):
  """The leaves of a run's last checkpoint, whoever wrote it, by path."""
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  checkpoints = Checkpoints(folder, {})
  shapes, _ = step_shapes(config, run)
  state = checkpoints.read(checkpoints.manager.latest_step(), jax.tree.map(place, shapes))
  checkpoints.manager.close()
  return {path: np.asarray(leaf) for path, leaf in leaves_by_path(state).items()}
