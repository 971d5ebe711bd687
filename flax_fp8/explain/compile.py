"""From a function to the GPU compiler's optimised program, on the attached GPU or on none.

Without a GPU the function is exported, and a child process compiles it for a described one: the
caller's process keeps its devices and flags, and nothing is written to disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import jax
import jax.export
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from flax_fp8.explain.target import NAMES, GpuTarget

_CHILD = Path(__file__).with_name("deviceless.py")
_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")
AnyMesh = Mesh | AbstractMesh


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes that a compiled program needs on each device.

  Attributes:
    argument: of its inputs.
    output: of its results.
    alias: of results that are written over donated inputs, counted in both.
    temp: of everything in between.
  """

  argument: int
  output: int
  alias: int
  temp: int

  @property
  def total(self) -> int:
    """What is held at the peak: inputs, results and temporaries, shared bytes once."""
    return self.argument + self.output - self.alias + self.temp


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program.

  Attributes:
    hlo: text of the optimised module, what runs.
    asked: text of the module before optimisation, what was asked for.
    memory: per device.
    target: the GPU it is compiled for; None if attached and not known by name.
    device_kind: what the GPU is called.
    devices: how many it runs on.
    described: whether it was compiled for a description, without a GPU.
  """

  hlo: str
  asked: str
  memory: Memory
  target: GpuTarget | None
  device_kind: str
  devices: int
  described: bool


def compile_program(
  fn: Callable[..., Any],
  args: tuple[Any, ...],
  *,
  target: str | GpuTarget | None,
  mesh: AnyMesh | None,
  timeout: float,
) -> Program:
  """Compiles for the attached GPU where ``target`` is None, for the described one otherwise."""
  jitted = fn if hasattr(fn, "trace") else jax.jit(fn)
  with _mesh_context(mesh):
    if target is None:
      return _compile_attached(jitted, args)
    gpu = GpuTarget.named(target) if isinstance(target, str) else target
    require_compiler()
    request, program = _export(jitted, args, mesh)
  request["description"] = gpu.description
  reply = _run_child(request, program, timeout)
  return Program(
    hlo=reply["hlo"],
    asked=reply["asked"],
    memory=Memory(**reply["memory"]),
    target=gpu,
    device_kind=gpu.name.upper(),
    devices=_size(request["mesh"]),
    described=True,
  )


def _compile_attached(jitted: Any, args: tuple[Any, ...]) -> Program:
  device = jax.devices()[0]
  if device.platform != "gpu":
    raise ValueError(
      f"explain: target=None takes the attached GPU; got none, the default device is "
      f"{device.device_kind!r}. Name a GPU to compile for: target= one of {list(NAMES)}."
    )
  lowered = jitted.lower(*args)
  compiled = lowered.compile()
  sizes = compiled.memory_analysis()
  names = (field.name for field in dataclasses.fields(Memory))
  return Program(
    hlo=compiled.as_text(),
    asked=lowered.as_text(dialect="hlo", debug_info=True),
    memory=Memory(**{name: getattr(sizes, f"{name}_size_in_bytes") for name in names}),
    target=GpuTarget.of_kind(device.device_kind),
    device_kind=device.device_kind,
    devices=len(jax.tree.leaves(compiled.input_shardings)[0].device_set) if args else 1,
    described=False,
  )


def _mesh_context(mesh: AnyMesh | None) -> contextlib.AbstractContextManager[Any]:
  if mesh is None:
    return contextlib.nullcontext()
  if isinstance(mesh, AbstractMesh):
    return jax.sharding.use_abstract_mesh(mesh)
  if isinstance(mesh, Mesh):
    return jax.set_mesh(mesh)
  raise TypeError(
    f"explain: mesh must be a jax.sharding.Mesh or AbstractMesh; got {mesh!r}. Pass the mesh that "
    "the shardings of the arguments refer to."
  )


def _export(jitted: Any, args: tuple[Any, ...], mesh: AnyMesh | None) -> tuple[dict[str, Any], bytes]:
  """Makes the child's request and program; in both, arguments and results are flat lists."""
  traced = jitted.trace(*args)
  exported = _export_any(jitted, traced, args)
  flat = dataclasses.replace(
    exported,
    in_tree=jax.tree.structure((tuple(range(len(exported.in_avals))), {})),
    out_tree=jax.tree.structure(tuple(range(len(exported.out_avals)))),
  )
  donated = [info.donated for info in jax.tree.leaves(traced.args_info, is_leaf=_is_info)]
  axes, types = _mesh_axes(exported.nr_devices, mesh, args)
  request = {
    "mesh": axes,
    "axis_types": types,
    "donated": [index for index, is_donated in enumerate(donated) if is_donated],
  }
  return request, bytes(flat.serialize())


def _is_info(node: Any) -> bool:
  return hasattr(node, "donated")


def _export_any(jitted: Any, traced: Any, args: tuple[Any, ...]) -> Any:
  """Exports, custom calls of every kind included: the same JAX reads the program at once."""
  try:
    return jax.export.export(jitted, platforms=["cuda"])(*args)
  except ValueError as error:
    if "custom calls" not in str(error):
      raise
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  names = set(re.findall(r"custom_call @\"?([\w.$]+)", text))
  checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]
  return jax.export.export(jitted, platforms=["cuda"], disabled_checks=checks)(*args)


def _mesh_axes(
  devices: int, mesh: AnyMesh | None, args: tuple[Any, ...]
) -> tuple[dict[str, int], list[str]]:
  """Finds the mesh that the program was traced for: the caller's, or that of an argument."""
  leaves = jax.tree.leaves(args)
  shardings = [getattr(leaf, "sharding", None) for leaf in leaves]
  found = [s.mesh for s in shardings if isinstance(s, NamedSharding) and s.mesh.size == devices]
  if mesh is not None and mesh.size == devices:
    found.insert(0, mesh)
  if found:
    return dict(found[0].shape), [kind.name for kind in found[0].axis_types]
  return {"devices": devices}, [AxisType.Auto.name]


def _size(axes: Mapping[str, int]) -> int:
  total = 1
  for length in axes.values():
    total *= length
  return total


def find_compiler() -> tuple[str, str] | None:
  """Finds the installed GPU compiler plugin; its name and version, or None."""
  for name in _PLUGINS:
    with contextlib.suppress(metadata.PackageNotFoundError):
      return name, metadata.version(name)
  return None


def install_line() -> str:
  """The command that installs the GPU compiler of this JAX, without CUDA's libraries."""
  return f"pip install 'jax[cuda13-local]=={_base_version(jax.__version__)}' flatbuffers"


def _base_version(version: str) -> str:
  return version.split("+")[0].split(".dev")[0]


def require_compiler() -> None:
  """Raises an ImportError that names the cure unless the GPU compiler of this JAX is installed."""
  found = find_compiler()
  if found is None:
    raise ImportError(
      "explain: compiling for a GPU that is not attached needs the compiler of JAX's CUDA plugin; "
      f"got none installed. Run: {install_line()}"
    )
  name, version = found
  if _release(version) != _release(metadata.version("jaxlib")):
    raise ImportError(
      f"explain: JAX's CUDA plugin must be of jaxlib's version; got {name} {version} with jaxlib "
      f"{metadata.version('jaxlib')}. Run: {install_line()}"
    )
  try:
    metadata.version("flatbuffers")
  except metadata.PackageNotFoundError as error:
    raise ImportError(
      "explain: handing a program to another process needs flatbuffers (jax.export); got none "
      "installed. Run: pip install flatbuffers"
    ) from error


def _release(version: str) -> str:
  return ".".join(_base_version(version).split(".")[:3])


def _run_child(request: dict[str, Any], program: bytes, timeout: float) -> dict[str, Any]:
  """Runs the child on files without names: whatever happens to it, none is left behind."""
  with (
    tempfile.TemporaryFile() as inbox,
    tempfile.TemporaryFile() as outbox,
    tempfile.TemporaryFile() as log,
    tempfile.TemporaryDirectory(prefix="flax_fp8_") as folder,
  ):
    inbox.write(json.dumps(request).encode() + b"\n" + program)
    inbox.seek(0)
    code = _wait(_environment(folder), timeout, stdin=inbox, stdout=outbox, stderr=log)
    reply = _read(outbox)
    if code != 0 or not reply:
      raise _death(code, _read(log))
  return _checked(json.loads(reply))


def _wait(environment: dict[str, str], timeout: float, **files: IO[bytes]) -> int:
  """Runs the child to its end; it ends with this process, and where that is interrupted."""
  with _lifeline() as lifeline:
    process = subprocess.Popen(
      [sys.executable, "-P", str(_CHILD), str(lifeline)],
      env=environment,
      pass_fds=(lifeline,),
      **files,
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
def _lifeline() -> Iterator[int]:
  """A pipe whose reading end the child gets, and whose writing end closes with this process."""
  reading, writing = os.pipe()
  try:
    yield reading
  finally:
    os.close(reading)
    os.close(writing)


def _environment(folder: str) -> dict[str, str]:
  """The child's: no device but the CPU, and temporary files where the parent removes them."""
  return os.environ | {
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "JAX_ENABLE_X64": str(jax.config.jax_enable_x64),
    "TMPDIR": folder,
  }


def _read(file: IO[bytes]) -> str:
  file.seek(0)
  return file.read().decode(errors="replace")


_OUT_OF_MEMORY = ("std::bad_alloc", "MemoryError", "Cannot allocate memory", "out of memory")


def _death(code: int, log: str) -> Exception:
  """The error for a child that ended without an answer."""
  last = "\n".join(log.strip().splitlines()[-8:]) or "(it wrote nothing)"
  if any(sign in log for sign in _OUT_OF_MEMORY):
    return MemoryError(
      "explain: the compiler's process ran out of memory. Free some, or explain a smaller program "
      f"(a scan over layers compiles one layer). Its last words:\n{last}"
    )
  how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
  hint = " (the system's out-of-memory killer sends this)" if code == -signal.SIGKILL else ""
  return RuntimeError(
    f"explain: the compiler's process must answer; it {how}{hint}. Run it again, or report the "
    f"program that does this. Its last words:\n{last}"
  )


def _checked(reply: dict[str, Any]) -> dict[str, Any]:
  if "error" not in reply:
    return reply
  message = f"{reply['error']}: {reply['message']}"
  if any(sign in message for sign in _OUT_OF_MEMORY):
    raise MemoryError(
      "explain: the compiler's process ran out of memory. Free some, or explain a smaller program "
      f"(a scan over layers compiles one layer). It said: {message}"
    )
  raise RuntimeError(
    f"explain: the GPU compiler refused the program: {message}. If it names the target's "
    "description, mend GpuTarget(description=...)."
  )
