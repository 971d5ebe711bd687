"""The child process that compiles without a GPU: how it is run, and every way in which it can end.

Request, reply and log are files without names. The child makes a folder for the compiler's
temporary files. This process removes it after the child; the child does where this process was
killed. What the compiler prints on stdout goes to the log: the reply has a file of its own.
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

_LONGEST = 300  # characters of others' words in an error
_CHILD = Path(__file__).with_name("deviceless.py")


def run_child(request: dict[str, Any], program: bytes, timeout: float) -> dict[str, Any]:
  """Compiles in a child process.

  Args:
    request: what ``deviceless.py`` reads besides the program.
    program: serialized.
    timeout: seconds until it is stopped.

  Returns:
    The child's reply.

  Raises:
    TimeoutError: it took longer.
    MemoryError: it ran out of memory.
    RuntimeError: the compiler refused the program, or the child was killed.
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
  """Opens those that are closed: a file passed to the child must not have their numbers."""
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
  """The name of a folder that the child makes, and that is removed when the child has ended."""
  folder = os.path.join(tempfile.gettempdir(), f"flax_fp8_{secrets.token_hex(8)}")
  try:
    yield folder
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def _wait(
  environment: dict[str, str], timeout: float, files: tuple[IO[bytes], IO[bytes], IO[bytes]]
) -> int:
  """Runs the child to its end; it ends with this process, and where that is interrupted."""
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
        "stopped. Pass a larger timeout=, or a smaller program (a scan over layers compiles one)."
      ) from error
    finally:
      process.kill()
      process.wait()


@contextlib.contextmanager
def _lifeline() -> Generator[int]:
  """A pipe whose reading end the child gets, and whose writing end closes with this process."""
  reading, writing = os.pipe()
  try:
    yield reading
  finally:
    os.close(reading)
    os.close(writing)


def _environment(folder: str) -> dict[str, str]:
  """The child's: no device but the CPU, and temporary files in a folder that is removed."""
  config: Any = jax.config  # of which no type checker knows the settings
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
    "explain: the compiler's process ran out of memory, or of threads. Free some, or explain a "
    f"smaller program (a scan over layers compiles one). Its last words:\n{_last(words)}"
  )


def _last(words: str) -> str:
  return "\n".join(words.strip().splitlines()[-8:])[-_LONGEST:] or "(it wrote nothing)"


def _death(code: int, log: str) -> Exception:
  """The error for a child that ended without an answer."""
  if error := _out_of_memory(log):
    return error
  how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
  hint = " (the system's out-of-memory killer sends this)" if code == -signal.SIGKILL else ""
  return RuntimeError(
    f"explain: the compiler's process must answer; it {how}{hint}. Run it again, or report the "
    f"program that does this. Its last words:\n{_last(log)}"
  )


def _checked(reply: dict[str, Any], log: str) -> dict[str, Any]:
  """The reply, unless it tells of an error."""
  if "error" not in reply:
    return reply
  message = f"{reply['error']}: {reply['message']}"
  if error := _out_of_memory(f"{log}\n{message}"):
    raise error
  if "topology not implemented" in message:
    raise RuntimeError(
      "explain: JAX's CUDA plugin must load; it is installed, but did not. Run "
      f"flax-fp8 doctor. Its last words:\n{_last(log)}"
    )
  raise RuntimeError(
    f"explain: the GPU compiler refused the program: {message[:_LONGEST]}. If it names the "
    "target's description, fix GpuTarget(description=...)."
  )
