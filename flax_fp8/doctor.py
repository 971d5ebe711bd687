"""Reports what this machine can do with FP8, what is missing or broken, and what to install.

``examine`` returns one ``Line`` per finding. A line says whether its subject is broken.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import time
from collections.abc import Iterator, Sequence
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
from flax_fp8.recipes import RECIPES, Recipe

DRIVER = Path("/proc/driver/nvidia/version")  # written by NVIDIA's kernel module
CUDA13_DRIVER = 580  # first driver series that supports CUDA 13
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "flax-fp8")
FNUZ_VARIANTS = {
  Format.HYBRID: ("HYBRID_FNUZ", Format.HYBRID_FNUZ),
  Format.E4M3: ("E4M3_FNUZ", Format.E4M3_FNUZ),
}


@dataclasses.dataclass(frozen=True)
class Line:
  """One finding.

  Attributes:
    label: what was examined.
    text: what was found.
    cure: the command that repairs or installs it; empty if there is nothing to do.
    broken: whether it must be repaired. If False, ``cure`` is only advice.
  """

  label: str
  text: str
  cure: str = ""
  broken: bool = False


def examine() -> list[Line]:
  """Examines this machine. Compiles a small program for an H100, which takes some seconds."""
  found, error = find_devices()
  sees_gpu = any(device.platform == "gpu" for device in found)
  compiler = plugin()
  lines = [*versions(), *devices(found, error), driver(sees_gpu=sees_gpu), compiler]
  can_compile = found and find_compiler() is not None and not compiler.cure
  return [*lines, trial()] if can_compile else lines


def render(lines: Sequence[Line]) -> str:
  """Formats the findings as text, with commands on their own lines and a verdict at the end."""
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
  """Returns the version of a package, or that it is not installed."""
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return "not installed"


def versions() -> list[Line]:
  """Reports the versions of Python and of the relevant packages."""
  return [
    Line("Python", platform.python_version()),
    *(Line(package, version(package)) for package in PACKAGES),
    matplotlib(),
  ]


def matplotlib() -> Line:
  """Reports matplotlib, which only ``Report.plot``, ``Stats.plot`` and ``--plot`` need."""
  found = version("matplotlib")
  return Line("matplotlib", found, "pip install matplotlib" if found == "not installed" else "")


def find_devices() -> tuple[list[Any], str]:
  """Returns the devices that JAX finds, and the error if it finds none."""
  try:
    return jax.devices(), ""
  except (AssertionError, RuntimeError) as error:  # JAX raises either
    return [], f"{type(error).__name__} {error}".strip()


def devices(found: Sequence[Any], error: str) -> Iterator[Line]:
  """Reports each kind of device and the recipes that it computes in FP8, or why there is none."""
  if not found:
    platforms = _platforms()
    asked = f" with JAX_PLATFORMS={platforms}" if platforms else ""
    cure = "unset JAX_PLATFORMS" if platforms else ""
    yield Line("device", f"JAX finds no device{asked}: {error}", cure, broken=True)
  for kind in dict.fromkeys(device.device_kind for device in found):
    alike = [device for device in found if device.device_kind == kind]
    yield Line("device", f"{len(alike)} x {kind}")
    for name, recipe in RECIPES.items():
      yield Line(f"  {name}", support(alike[0], recipe()))


def support(device: Any, recipe: Recipe) -> str:
  """Says whether a device computes a recipe in FP8, and why or why not."""
  supported, reason = capability(device, recipe=recipe)
  reason = reason.partition(": ")[2]  # without the name of the device
  if device.platform == "cpu":
    return reason
  if supported:
    return f"yes; {reason}"
  name, fnuz = FNUZ_VARIANTS[recipe.fp8_format]
  if capability(device, recipe=dataclasses.replace(recipe, fp8_format=fnuz))[0]:
    return f"yes, with fp8_format=Format.{name}; {reason}"
  return f"no; {reason}"


def _platforms() -> str:
  config: Any = jax.config  # type checkers do not know its settings
  return config.jax_platforms or ""


def driver_version() -> str | None:
  """Returns the version of NVIDIA's driver: None without a driver, empty if unknown."""
  if not DRIVER.exists():
    return None
  found = re.search(r"\s(\d+\.[\d.]+)\s", DRIVER.read_text())
  return found[1] if found else ""


def allow_missing_cuda() -> None:
  """Silences JAX's warnings about missing CUDA libraries on a machine without a driver.

  Call it before JAX initializes its backends. With a driver, the warnings stay, as they matter.
  """
  if driver_version() is None:
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def driver(*, sees_gpu: bool) -> Line:
  """Reports NVIDIA's driver, and whether JAX uses it."""
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
  """Returns the setting that hides NVIDIA GPUs from JAX; empty if there is none."""
  platforms = _platforms()
  if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
    return f"JAX_PLATFORMS={platforms}"
  visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
  return f"CUDA_VISIBLE_DEVICES={visible}" if visible in ("", "-1") else ""


def plugin() -> Line:
  """Reports the GPU compiler, which ``explain`` needs if no GPU is attached."""
  if platform.system() != "Linux":
    return Line("GPU compiler", "none; JAX's CUDA plugin supports only Linux")
  try:
    require_compiler()
  except ImportError as error:
    text, _, cure = str(error).removeprefix("explain: ").partition(" Run: ")
    # A missing flatbuffers package sets __cause__; a wrong version does not.
    missing = find_compiler() is None or error.__cause__ is not None
    return Line("GPU compiler", text, cure, broken=not missing)
  return Line("GPU compiler", " ".join(find_compiler() or ()))


def trial() -> Line:
  """Compiles an FP8 product for an H100, which need not be attached."""
  x = jax.ShapeDtypeStruct((256, 256), jnp.float8_e4m3fn)
  started = time.perf_counter()
  try:
    report = explain(_product, x, x, target="h100", timeout=120)
  except Exception as error:  # any error is the finding
    return Line("trial", f"{type(error).__name__}: {error}", broken=True)
  seconds, is_fp8 = time.perf_counter() - started, report.fp8_gemms == report.total_gemms == 1
  what = f"compiled a 256 x 256 E4M3 product for an H100 in {seconds:.1f} s"
  return Line("trial", f"{what}; it is {'' if is_fp8 else 'not '}FP8", broken=not is_fp8)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
  return lax.dot(x, y, preferred_element_type=jnp.float32)
