"""Runs the child process that compiles without a GPU, and converts its failures to errors.

Request, reply and log are unnamed temporary files. The reply has its own file, because the compiler
may print to stdout, which is part of the log. The child creates a folder for the temporary files of
the compiler. This process removes the folder when the child ends. If this process is killed, the
child removes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any

import jax

from flax_fp8.explain import mosaic
from flax_fp8.explain.plugin import tools_package

_LONGEST = 300  # characters of a quoted message in an error
_CHILD = Path(__file__).with_name("deviceless.py")


def run_child(request: dict[str, Any], program: bytes, timeout: float) -> dict[str, Any]:
  """Compiles in a child process.

  Args:
    request: the request, as ``deviceless.py`` reads it.
    program: the serialized program.
    timeout: seconds until the child is stopped.

  Returns:
    The reply of the child, and what the child printed as ``log``.

  Raises:
    TimeoutError: the child took longer than ``timeout``.
    MemoryError: the child ran out of memory.
    RuntimeError: the compiler refused the program, or misses CUDA's tools, or the child was killed.
  """
  with (
    _standard_streams(),
    tempfile.TemporaryFile() as inbox,
    tempfile.TemporaryFile() as outbox,
    tempfile.TemporaryFile() as log,
    _folder() as folder,
  ):
    inbox.write(json.dumps(request).encode() + b"\n" + program)
    inbox.seek(0)
    code = _wait(_environment(folder), timeout, (inbox, outbox, log))
    reply = _read(outbox)
    if code != 0 or not reply:
      raise _death(code, _read(log))
    words = _read(log)
  return _checked(json.loads(reply), words)


@contextlib.contextmanager
def _standard_streams() -> Generator[None]:
  """Opens closed standard streams, so that no file for the child gets their numbers."""
  opened = [os.open(os.devnull, os.O_RDWR)]
  while opened[-1] < 3:
    opened.append(os.open(os.devnull, os.O_RDWR))
  try:
    yield
  finally:
    for number in opened:
      os.close(number)


@contextlib.contextmanager
def _folder() -> Generator[str]:
  """Yields the name of a folder that the child creates, and removes the folder afterwards."""
  folder = os.path.join(tempfile.gettempdir(), f"flax_fp8_{secrets.token_hex(8)}")
  try:
    yield folder
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def _wait(
  environment: dict[str, str], timeout: float, files: tuple[IO[bytes], IO[bytes], IO[bytes]]
) -> int:
  """Runs the child to its end, and kills it if this process ends or is interrupted."""
  with _lifeline() as lifeline:
    inbox, outbox, log = files
    passed = (lifeline, outbox.fileno())
    process = subprocess.Popen(
      [sys.executable, "-P", str(_CHILD), *map(str, passed)],
      env=environment,
      pass_fds=passed,
      stdin=inbox,
      stdout=log,
      stderr=log,
    )
    try:
      return process.wait(timeout)
    except subprocess.TimeoutExpired as error:
      raise TimeoutError(
        f"explain: compiling must end within timeout={timeout:g} seconds; it did not, and was "
        "stopped. Pass a larger timeout=, or a smaller program: use a scan over layers, which "
        "compiles only one layer."
      ) from error
    finally:
      process.kill()
      process.wait()


@contextlib.contextmanager
def _lifeline() -> Generator[int]:
  """Yields the reading end of a pipe for the child; the writing end closes with this process."""
  reading, writing = os.pipe()
  try:
    yield reading
  finally:
    os.close(reading)
    os.close(writing)


def _environment(folder: str) -> dict[str, str]:
  """Returns the environment of the child: only the CPU as device, and ``folder`` as TMPDIR."""
  config: Any = jax.config  # type checkers do not know its settings
  return os.environ | {
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "JAX_ENABLE_X64": str(config.jax_enable_x64),
    "TMPDIR": folder,
  }


def _read(file: IO[bytes]) -> str:
  file.seek(0)
  return file.read().decode(errors="replace")


_OUT_OF_MEMORY = (
  "std::bad_alloc",
  "memoryerror",
  "out of memory",
  "cannot allocate memory",
  "failed to map segment",
  "pthread_create",
)


def _out_of_memory(words: str) -> MemoryError | None:
  if not any(sign in words.lower() for sign in _OUT_OF_MEMORY):
    return None
  return MemoryError(
    "explain: the compiler's process ran out of memory or threads. Free memory, or pass a smaller "
    "program: use a scan over layers, which compiles only one layer. Its last output:\n"
    f"{_last(words)}"
  )


def _last(words: str) -> str:
  return "\n".join(words.strip().splitlines()[-8:])[-_LONGEST:] or "(it wrote nothing)"


def _death(code: int, log: str) -> Exception:
  """Returns the error for a child that ended without a reply."""
  if error := _out_of_memory(log) or mosaic.missing_tools(log, tools_package()):
    return error
  how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
  hint = " (the system's out-of-memory killer sends this)" if code == -signal.SIGKILL else ""
  return RuntimeError(
    f"explain: the compiler's process must answer; it {how}{hint}. Run it again, or report the "
    f"program that causes this. Its last output:\n{_last(log)}"
  )


def _checked(reply: dict[str, Any], log: str) -> dict[str, Any]:
  """Returns the reply, or raises the error that it contains."""
  if "error" not in reply:
    return reply | {"log": log}
  message = f"{reply['error']}: {reply['message']}"
  if error := _out_of_memory(f"{log}\n{message}"):
    raise error
  if error := mosaic.missing_tools(message, tools_package()):
    raise error
  if "topology not implemented" in message:
    raise RuntimeError(
      "explain: JAX's CUDA plugin must load; it is installed, but did not load. Run "
      f"flax-fp8 doctor. Its last output:\n{_last(log)}"
    )
  raise RuntimeError(
    f"explain: the GPU compiler refused the program: {message[:_LONGEST]}. If it names the "
    "target's description, fix GpuTarget(description=...)."
  )
