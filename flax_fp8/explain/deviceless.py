"""Child process that compiles one exported program for a described GPU.

This file runs by path as a separate program. It imports JAX, and flax_fp8 only for programs with
custom calls that flax_fp8 partitions. It reads the request from stdin: a line of JSON, then the
serialized program. Its arguments are two file descriptors. The first is a pipe that closes when the
parent ends, which ends this process too. The second is the file for the reply, as JSON. Temporary
files go to the folder TMPDIR, which it creates.
"""

from __future__ import annotations

import contextlib
import json
import os
import pkgutil
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Without a GPU, the compiler can't time kernels. With these options it needs no timing, so the same
# program always gives the same kernels.
OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def end_with_parent(lifeline: int) -> None:
  """Starts a thread that ends this process and removes TMPDIR when the parent ends."""

  def wait() -> None:
    os.read(lifeline, 1)
    folder = os.environ["TMPDIR"]
    with contextlib.suppress(OSError):
      os.rename(folder, f"{folder}_removed")  # so that the running compiler can't write to it
    shutil.rmtree(f"{folder}_removed", ignore_errors=True)
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()


def prefer_for_oom_killer() -> None:
  """Makes the out-of-memory killer end this process before the process of the user."""
  with contextlib.suppress(OSError):
    Path("/proc/self/oom_score_adj").write_text("1000")


def load_partitioners(request: dict[str, Any]) -> None:
  """Registers the partitioners of the parent's flax_fp8 for custom calls of the program."""
  for name in request["partitioners"]:
    sys.path.insert(0, request["packages"])
    pkgutil.resolve_name(name)()
    sys.path.remove(request["packages"])


def described_mesh(request: dict[str, Any]) -> Mesh:
  """Creates the mesh of the request from described GPUs."""
  axes: dict[str, int] = request["mesh"]
  shape = tuple(axes.values())
  topology = topologies.get_topology_desc(
    "", "cuda", target_config=request["description"], topology=f"1x1x{int(np.prod(shape))}"
  )
  types = tuple(AxisType[name] for name in request["axis_types"])
  return Mesh(np.array(topology.devices).reshape(shape), tuple(axes), axis_types=types)


def lower(request: dict[str, Any], program: bytes) -> Any:
  """Lowers the program for the described GPUs, with its shardings and donations."""
  exported = jax.export.deserialize(bytearray(program))
  mesh = described_mesh(request)
  everywhere = NamedSharding(mesh, PartitionSpec())
  arguments = [
    jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding or everywhere)
    for aval, sharding in zip(exported.in_avals, exported.in_shardings_jax(mesh), strict=True)
  ]
  call = jax.jit(exported.call, donate_argnums=tuple(request["donated"]))
  return call.lower(*arguments)


def compile_with_text(lowered: Any) -> tuple[Any, str]:
  """Compiles, and also returns the optimized HLO; from a dump if JAX does not return it."""
  compiled = lowered.compile(compiler_options=OPTIONS)
  if text := compiled.as_text():
    return compiled, text
  with tempfile.TemporaryDirectory() as folder:
    dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    compiled = lowered.compile(compiler_options=OPTIONS | dump)
    (found,) = Path(folder).glob("*gpu_after_optimizations.txt")
    return compiled, found.read_text()


def answer(request: dict[str, Any], program: bytes) -> dict[str, Any]:
  """Compiles the program and returns the reply."""
  load_partitioners(request)
  lowered = lower(request, program)
  compiled, text = compile_with_text(lowered)
  memory = compiled.memory_analysis()
  sizes = {
    name: int(getattr(memory, f"{name}_size_in_bytes"))
    for name in ("argument", "output", "alias", "temp")
  }
  return {"hlo": text, "asked": lowered.as_text(dialect="hlo", debug_info=True), "memory": sizes}


def main() -> None:
  """Reads one request and writes the reply."""
  lifeline, outbox = map(int, sys.argv[1:])
  os.mkdir(os.environ["TMPDIR"], 0o700)
  end_with_parent(lifeline)
  prefer_for_oom_killer()
  request = json.loads(sys.stdin.buffer.readline())
  program = sys.stdin.buffer.read()
  if b"mosaic_gpu" in program:
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"  # prints registers and spills to stdout
  try:
    reply = answer(request, program)
  except Exception as error:  # the parent reports any error to the user
    reply = {"error": type(error).__name__, "message": str(error)}
  with open(outbox, "w", encoding="utf-8") as file:
    json.dump(reply, file)
  os._exit(0)  # skips the teardown of the CUDA plugin, which has no GPU


if __name__ == "__main__":
  main()
