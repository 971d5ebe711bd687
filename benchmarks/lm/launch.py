"""Starts ``train_lm.py`` as several processes of this machine, and listens to what they say."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

SCRIPT = Path(__file__).resolve().parents[1] / "train_lm.py"
POLL_SECONDS = 0.02
SAVED = re.compile(r"step (\d+)/\d+: .*, saved$", re.MULTILINE)
RESUMED = re.compile(r"goes on after step (\d+)$", re.MULTILINE)
# LLVM would spend most of a short run on code that then runs for a millisecond. XLA's own passes,
# in which all arithmetic is decided, are as ever; whatever is compared is compiled alike.
QUICK = "--xla_backend_optimization_level=0"


def free_port() -> int:
  """A port that nothing listens on now."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
  """That of a process with so many CPU devices, whatever this one has."""
  flags = f"{QUICK} --xla_force_host_platform_device_count={devices}"
  root = str(SCRIPT.parents[1])
  return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": root}


class Group:
  """Processes that are one program; a context manager, which leaves none of them behind."""

  def __init__(
    self, options: Sequence[str], logs: Path, *, processes: int = 1, devices: int = 1
  ) -> None:
    """Starts them.

    Args:
      options: of ``train_lm.py``; those of several processes are added.
      logs: folder of what each prints; made when missing, and what is there overwritten.
      processes: their number; one alone needs no coordinator.
      devices: of each.
    """
    logs.mkdir(parents=True, exist_ok=True)
    self.logs = [logs / f"process_{index}.log" for index in range(processes)]
    address = f"127.0.0.1:{free_port()}"
    self.processes = list[subprocess.Popen[bytes]]()
    for index, log in enumerate(self.logs):
      joins = ["--coordinator", address, "--num-processes", f"{processes}"]
      joins += ["--process-id", f"{index}"]
      command = [sys.executable, str(SCRIPT), *options, *(joins if processes > 1 else [])]
      with log.open("wb") as out:
        self.processes.append(
          subprocess.Popen(command, env=environment(devices), stdout=out, stderr=subprocess.STDOUT)
        )

  def __enter__(self) -> "Group":
    """Gives itself."""
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    """Kills what is left."""
    for process in self.processes:
      process.kill()
      process.wait()

  @property
  def said(self) -> str:
    """What process 0 has printed so far."""
    return self.logs[0].read_text()

  @property
  def saved(self) -> list[int]:
    """The steps whose checkpoints were reported to stand."""
    return [int(step) for step in SAVED.findall(self.said)]

  @property
  def resumed(self) -> int:
    """The step after which it went on; 0 where it started anew, or has said nothing yet."""
    found = RESUMED.search(self.said)
    return int(found[1]) if found else 0

  def wait_until(self, happened: Callable[[], bool]) -> None:
    """Waits for something that must happen while all processes run.

    Raises:
      RuntimeError: one ended before; with the end of what it printed.
    """
    while not happened():
      for process, log in zip(self.processes, self.logs, strict=True):
        if process.poll() is not None and not happened():
          raise RuntimeError(
            f"train_lm: a process must run until it is killed; got the end of {log.name} with "
            f"{process.returncode}. It said:\n{log.read_text()[-2000:]}"
          )
      time.sleep(POLL_SECONDS)

  def kill(self, index: int) -> None:
    """Ends one process as a power cut would."""
    self.processes[index].kill()
    self.processes[index].wait()

  def end(self, grace: float) -> int:
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

  def finish(self) -> str:
    """Waits until all have ended, and gives what process 0 said.

    Raises:
      RuntimeError: one ended with an error; with the end of what it printed.
    """
    for process, log in zip(self.processes, self.logs, strict=True):
      if code := process.wait():
        raise RuntimeError(
          f"train_lm: every process must end well; got {code} from {log.name}, which said:\n"
          f"{log.read_text()[-2000:]}"
        )
    return self.said
