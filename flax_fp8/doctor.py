"""What this machine can do with FP8, what is missing or broken, and what to install.

``examine`` looks and returns lines of text; a line says whether it tells of something broken.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_fp8.capability import capability
from flax_fp8.explain.explain import explain
from flax_fp8.explain.plugin import find_compiler, require_compiler
from flax_fp8.formats import Format
from flax_fp8.recipes import DelayedScaling

DRIVER = Path("/proc/driver/nvidia/version")  # which NVIDIA's kernel module writes
CUDA13_DRIVER = 580  # the first series of drivers that runs CUDA 13
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "flax-fp8")
QUESTIONS: Mapping[str, Mapping[str, Any]] = {
  "HYBRID": {"fp8_format": Format.HYBRID},
  "E4M3": {"fp8_format": Format.E4M3},
  "HYBRID_FNUZ": {"fp8_format": Format.HYBRID_FNUZ},
  "DelayedScaling()": {"recipe": DelayedScaling()},
}


@dataclasses.dataclass(frozen=True)
class Line:
  """One thing that was looked at.

  Attributes:
    label: what.
    text: what it is like.
    cure: the command that mends it or adds it; empty where there is nothing to do.
    broken: whether it must be mended; a cure of what is not broken is advice.
  """

  label: str
  text: str
  cure: str = ""
  broken: bool = False


def examine() -> list[Line]:
  """Looks at this machine; compiles a small program for an H100, which takes some seconds."""
  found, error = find_devices()
  sees_gpu = any(device.platform == "gpu" for device in found)
  compiler = plugin()
  lines = [*versions(), *devices(found, error), driver(sees_gpu=sees_gpu), compiler]
  can_compile = found and find_compiler() is not None and not compiler.cure
  return [*lines, trial()] if can_compile else lines


def render(lines: Sequence[Line]) -> str:
  """The lines as text, the commands on lines of their own, and the verdict."""
  width = max(len(line.label) for line in lines)
  rows = [row for line in lines for row in _rows(line, width + 2)]
  broken = [line.label for line in lines if line.broken]
  verdict = f"Broken: {', '.join(broken)}." if broken else "Nothing is broken."
  return "\n".join([*rows, "", verdict])


def _rows(line: Line, indent: int) -> Iterator[str]:
  text = f"BROKEN: {line.text}" if line.broken else line.text
  yield f"{line.label:<{indent}}{text}"
  if line.cure:
    yield f"{'':<{indent}}-> {line.cure}"


def version(package: str) -> str:
  """The version of an installed package."""
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return "not installed"


def versions() -> list[Line]:
  """Python's version, and those of the packages that matter."""
  return [
    Line("Python", platform.python_version()),
    *(Line(package, version(package)) for package in PACKAGES),
    matplotlib(),
  ]


def matplotlib() -> Line:
  """matplotlib, which only ``Report.plot`` and ``--plot`` need."""
  found = version("matplotlib")
  return Line("matplotlib", found, "pip install matplotlib" if found == "not installed" else "")


def find_devices() -> tuple[list[Any], str]:
  """The devices that JAX sees, or none and why."""
  try:
    return jax.devices(), ""
  except (AssertionError, RuntimeError) as error:  # of which JAX raises either
    return [], f"{type(error).__name__} {error}".strip()


def devices(found: Sequence[Any], error: str) -> Iterator[Line]:
  """Each kind of device, and which FP8 it multiplies; or why JAX has none."""
  if not found:
    platforms = _platforms()
    asked = f" with JAX_PLATFORMS={platforms}" if platforms else ""
    cure = "unset JAX_PLATFORMS" if platforms else ""
    yield Line("device", f"JAX finds no device{asked}: {error}", cure, broken=True)
  for kind in dict.fromkeys(device.device_kind for device in found):
    alike = [device for device in found if device.device_kind == kind]
    yield Line("device", f"{len(alike)} x {kind}")
    for name, question in QUESTIONS.items():
      supported, reason = capability(alike[0], **question)
      yield Line(f"  {name}", f"{'yes' if supported else 'no'}; {reason}")


def _platforms() -> str:
  config: Any = jax.config  # of which no type checker knows the settings
  return config.jax_platforms or ""


def driver_version() -> str | None:
  """The version of NVIDIA's driver, None without one; empty if its file does not say."""
  if not DRIVER.exists():
    return None
  found = re.search(r"\s(\d+\.[\d.]+)\s", DRIVER.read_text())
  return found[1] if found else ""


def allow_missing_cuda() -> None:
  """Keeps JAX's CUDA plugin from complaining of missing CUDA libraries where there is no driver.

  To be called before JAX's backends start. With a driver, complaints are worth reading.
  """
  if driver_version() is None:
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def driver(*, sees_gpu: bool) -> Line:
  """NVIDIA's driver, and whether JAX makes use of it."""
  found = driver_version()
  if found is None:
    return Line("NVIDIA driver", "none")
  name = found or "unknown version"
  if sees_gpu:
    return Line("NVIDIA driver", f"{name}; JAX sees the GPU")
  if reason := _hidden():
    return Line("NVIDIA driver", f"{name}; {reason} hides the GPU from JAX")
  cuda = "cuda12" if found and int(found.split(".")[0]) < CUDA13_DRIVER else "cuda13"
  text = f"{name}, but JAX sees no GPU"
  return Line("NVIDIA driver", text, f"pip install 'jax[{cuda}]'", broken=True)


def _hidden() -> str:
  """The setting that hides NVIDIA's GPUs from JAX; empty without one."""
  platforms = _platforms()
  if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
    return f"JAX_PLATFORMS={platforms}"
  visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
  return f"CUDA_VISIBLE_DEVICES={visible}" if visible in ("", "-1") else ""


def plugin() -> Line:
  """The GPU compiler that ``explain`` needs where no GPU is attached."""
  if platform.system() != "Linux":
    return Line("GPU compiler", "none; JAX's CUDA plugin is for Linux only")
  try:
    require_compiler()
  except ImportError as error:
    text, _, cure = str(error).removeprefix("explain: ").partition(" Run: ")
    # That flatbuffers is missing, too, is raised from an error; a wrong version is not.
    missing = find_compiler() is None or error.__cause__ is not None
    return Line("GPU compiler", text, cure, broken=not missing)
  return Line("GPU compiler", " ".join(find_compiler() or ()))


def trial() -> Line:
  """Compiles an FP8 product for an H100 that need not be there."""
  x = jax.ShapeDtypeStruct((256, 256), jnp.float8_e4m3fn)
  started = time.perf_counter()
  try:
    report = explain(_product, x, x, target="h100", timeout=120)
  except Exception as error:  # whatever it is, it is what was to be found out
    return Line("trial", f"{type(error).__name__}: {error}", broken=True)
  seconds, is_fp8 = time.perf_counter() - started, report.fp8_gemms == report.total_gemms == 1
  what = f"compiled a 256 x 256 product of E4M3 for an H100 in {seconds:.1f} s"
  return Line("trial", f"{what}; it is {'' if is_fp8 else 'not '}FP8", broken=not is_fp8)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
  return lax.dot(x, y, preferred_element_type=jnp.float32)
