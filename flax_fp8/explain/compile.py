"""Compiles a function for an attached or a described GPU, and returns the optimized program.

For a described GPU, the function is exported and a child process compiles it. So the devices and
flags of the calling process do not change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from flax_fp8._compat import partitioners, uncalled_host_callbacks
from flax_fp8.capability import capability
from flax_fp8.explain import mosaic
from flax_fp8.explain.child import run_child
from flax_fp8.explain.plugin import require_compiler, tools_package
from flax_fp8.explain.target import NAMES, GpuTarget
from flax_fp8.platforms import described_gpu

AnyMesh = Mesh | AbstractMesh
_PACKAGES = Path(__file__).parents[2]  # the folder that flax_fp8 is in


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes that a compiled program needs on each device.

  Attributes:
    argument: bytes of arguments.
    output: bytes of results.
    alias: bytes of results that overwrite donated arguments; also part of ``argument`` and
      ``output``.
    temp: bytes of temporaries.
  """

  argument: int
  output: int
  alias: int
  temp: int

  @property
  def total(self) -> int:
    """Bytes at the peak: arguments, results and temporaries, with aliased bytes counted once."""
    return self.argument + self.output - self.alias + self.temp


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program.

  Attributes:
    hlo: text of the optimized module.
    asked: text of the module before optimization.
    memory: bytes per device.
    target: the GPU that it is compiled for; None if attached and not known by name.
    device_kind: name of the GPU.
    devices: number of devices.
    described: whether it was compiled for a described GPU.
    fp8_units: whether the GPU has FP8 matrix units.
    log: what the compiler's process printed; empty for an attached GPU.
  """

  hlo: str
  asked: str
  memory: Memory
  target: GpuTarget | None
  device_kind: str
  devices: int
  described: bool
  fp8_units: bool
  log: str = ""


def compile_program(
  fn: Callable[..., Any],
  args: tuple[Any, ...],
  *,
  target: str | GpuTarget | None,
  mesh: AnyMesh | None,
  timeout: float,
) -> Program:
  """Compiles for the attached GPU if ``target`` is None, else for the described GPU."""
  jitted = fn if hasattr(fn, "trace") else jax.jit(fn)
  if target is None:
    with _mesh_context(mesh), _tools_advice():
      return compile_for(_attached_gpu(), jitted, args)
  gpu = _target(target)
  require_compiler()
  with _mesh_context(mesh), _device_context(gpu), _tools_advice():
    request, program = _export(jitted, args, gpu)
  request["description"] = gpu.description
  reply = run_child(request, program, timeout)
  return Program(
    hlo=reply["hlo"],
    asked=reply["asked"],
    memory=Memory(**reply["memory"]),
    target=gpu,
    device_kind=gpu.name.upper(),
    devices=math.prod(request["mesh"].values()),
    described=True,
    fp8_units="fp8" in gpu.peak_flops,
    log=reply.get("log", ""),
  )


def _target(target: str | GpuTarget) -> GpuTarget:
  if isinstance(target, str):
    return GpuTarget.named(target)
  if not isinstance(target, GpuTarget):
    raise TypeError(
      f"explain: target must be a name, a GpuTarget or None; got {target!r}. Pass one of "
      f"{list(NAMES)}."
    )
  return target


def _attached_gpu() -> Any:
  device = jax.devices()[0]
  if device.platform != "gpu":
    raise ValueError(
      f"explain: target=None needs an attached GPU; got the default device "
      f"{device.device_kind!r}. Pass target= one of {list(NAMES)}."
    )
  return device


def compile_for(device: Any, jitted: Any, args: tuple[Any, ...]) -> Program:
  """Compiles as a call would, for the devices of the arguments or the default device."""
  lowered = jitted.lower(*args)
  compiled = lowered.compile()
  sizes = compiled.memory_analysis()
  names = (field.name for field in dataclasses.fields(Memory))
  shardings = jax.tree.leaves(compiled.input_shardings)
  return Program(
    hlo=compiled.as_text(),
    asked=lowered.as_text(dialect="hlo", debug_info=True),
    memory=Memory(**{name: getattr(sizes, f"{name}_size_in_bytes") for name in names}),
    target=GpuTarget.of_kind(device.device_kind),
    device_kind=device.device_kind,
    devices=len(shardings[0].device_set) if shardings else 1,
    described=False,
    fp8_units=capability(device)[0],
  )


@contextlib.contextmanager
def _tools_advice() -> Generator[None]:
  """Adds advice to JAX's error for Mosaic kernels without CUDA's tools, which lowering needs."""
  try:
    yield
  except RuntimeError as error:
    if ours := mosaic.missing_tools(str(error), tools_package()):
      raise ours from error
    raise


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


def _device_context(gpu: GpuTarget) -> contextlib.AbstractContextManager[Any]:
  """Sets the described GPU during tracing, so that Pallas kernels see it; older JAX ignores it.

  An active mesh stays unchanged.
  """
  described: Any = getattr(jax.sharding, "AbstractDevice", None)
  if described is None or not jax.sharding.get_abstract_mesh().empty:
    return contextlib.nullcontext()
  known = {"device_kind": gpu.device_kind, "num_cores": None, "platform": "gpu"}
  names = [field.name for field in dataclasses.fields(described)]  # some JAX releases have only two
  device = described(**{name: known.get(name) for name in names})
  mesh: Any = AbstractMesh
  return jax.sharding.use_abstract_mesh(mesh((), (), abstract_device=device))


def _export(jitted: Any, args: tuple[Any, ...], gpu: GpuTarget) -> tuple[dict[str, Any], bytes]:
  """Returns the request and the program for the child, with flat arguments and results."""
  traced = jitted.trace(*args)
  exported = _export_any(jitted, args, gpu)
  _require_serializable([*exported.in_avals, *exported.out_avals])
  if exported.ordered_effects:  # JAX can't serialize them
    raise ValueError(_REFUSALS["ordered effects"])
  flat = dataclasses.replace(
    exported,
    unordered_effects=(),  # JAX can't serialize them; the program still has the callbacks
    in_tree=jax.tree.structure((tuple(range(len(exported.in_avals))), {})),
    out_tree=jax.tree.structure(tuple(range(len(exported.out_avals)))),
  )
  donated = [info.donated for info in jax.tree.leaves(traced.args_info, is_leaf=_is_info)]
  axes, types = _mesh_axes(exported, args)
  request = {
    "mesh": axes,
    "axis_types": types,
    "donated": [index for index, is_donated in enumerate(donated) if is_donated],
    "packages": str(_PACKAGES),
    "partitioners": [
      function
      for name, function in partitioners.items()
      if name.encode() in exported.mlir_module_serialized
    ],
  }
  return request, bytes(flat.serialize())


def _is_info(node: Any) -> bool:
  return hasattr(node, "donated")


def _require_serializable(avals: list[Any]) -> None:
  for aval in avals:
    extended = jnp.issubdtype(aval.dtype, jax.dtypes.extended)
    if extended and not jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
      raise TypeError(
        f"explain: arguments and results must be arrays that jax.export takes; got dtype "
        f"{aval.dtype}. Cast to this dtype, and back, inside the function."
      )


_REFUSALS = {  # keyed by a part of JAX's error text
  "ordered effects": (
    "explain: callbacks must be unordered unless target=None; got io_callback, jax.debug.print or "
    "jax.debug.callback with ordered=True. Pass ordered=False."
  ),
  "require devices to be present": (
    "explain: io_callback and pure_callback need a mesh with devices; got an AbstractMesh, which "
    "has none. Pass a jax.sharding.Mesh; XLA_FLAGS=--xla_force_host_platform_device_count=8 "
    "creates 8 CPU devices for it."
  ),
}


def _refusal(words: str) -> ValueError | None:
  """Returns an error with advice for a known error of JAX's export; None for any other."""
  return next((ValueError(ours) for theirs, ours in _REFUSALS.items() if theirs in words), None)


def _export_any(jitted: Any, args: tuple[Any, ...], gpu: GpuTarget) -> Any:
  """Exports with all custom calls allowed, because the same JAX version reads the program."""
  export: Any = functools.partial(
    jax.export.export,
    jitted,
    platforms=["cuda"],
    _override_lowering_rules=(
      *uncalled_host_callbacks("cuda"),
      described_gpu(gpu.device_kind),
    ),
  )
  try:
    return export()(*args)
  except ValueError as error:
    if "custom calls" not in str(error):
      if refusal := _refusal(str(error)):
        raise refusal from error
      raise
    names = set(re.findall(r"custom_call @\"?([\w.$]+)", str(error)))
  checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]
  return export(disabled_checks=checks)(*args)


def _mesh_axes(exported: Any, args: tuple[Any, ...]) -> tuple[dict[str, int], list[str]]:
  """Returns the axes and axis types of the mesh that a program was traced for.

  This is the active mesh, or the mesh of an argument, or else the mesh that the program names.
  """
  shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(args))
  meshes = [jax.sharding.get_abstract_mesh()]
  meshes += [sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)]
  for mesh in meshes:
    if mesh.axis_names and mesh.size == exported.nr_devices:
      return dict(mesh.shape), [kind.name for kind in mesh.axis_types]
  axes = _named_axes(exported) if exported.nr_devices > 1 else {}
  if math.prod(axes.values()) != exported.nr_devices:
    axes = {"devices": exported.nr_devices}
  axes = axes or {"devices": 1}
  return axes, [AxisType.Auto.name] * len(axes)


def _named_axes(exported: Any) -> dict[str, int]:
  """Returns the axes of the first mesh in the text of a program."""
  found = re.search(r"sdy\.mesh @\S+ = <\[([^\]]*)\]", exported.mlir_module())
  axes = re.findall(r'"([^"]+)"=(\d+)', found[1]) if found else []
  return {name: int(size) for name, size in axes}
