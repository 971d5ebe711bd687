"""Checks that JAX's GPU compiler is installed. The compiler itself needs no GPU."""

from __future__ import annotations

import contextlib
from importlib import metadata

import jax

_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")


def find_compiler() -> tuple[str, str] | None:
  """Returns the name and version of the installed GPU compiler plugin, or None."""
  for name in _PLUGINS:
    with contextlib.suppress(metadata.PackageNotFoundError):
      return name, metadata.version(name)
  return None


def install_line() -> str:
  """Returns the command that installs the GPU compiler of this JAX, without CUDA libraries."""
  return f"pip install 'jax[cuda13-local]=={_base_version(jax.__version__)}' flatbuffers"


def tools_package() -> str:
  """Returns the package with ptxas and libdevice for the installed plugin's CUDA version."""
  name, _ = find_compiler() or _PLUGINS
  return "nvidia-cuda-nvcc-cu12" if "cuda12" in name else "nvidia-cuda-nvcc"


def _base_version(version: str) -> str:
  return version.split("+")[0].split(".dev")[0]


def require_compiler() -> None:
  """Raises ImportError with an install command if the GPU compiler of this JAX is missing."""
  found = find_compiler()
  if found is None:
    raise ImportError(
      "explain: compiling for a GPU that is not attached needs the compiler of JAX's CUDA plugin; "
      f"got none installed. Run: {install_line()}"
    )
  name, version = found
  if _release(version) != _release(metadata.version("jaxlib")):
    raise ImportError(
      f"explain: JAX's CUDA plugin must have jaxlib's version; got {name} {version} with jaxlib "
      f"{metadata.version('jaxlib')}. Run: {install_line()}"
    )
  try:
    metadata.version("flatbuffers")
  except metadata.PackageNotFoundError as error:
    raise ImportError(
      "explain: exporting a program (jax.export) needs the package flatbuffers; got none "
      "installed. Run: pip install flatbuffers"
    ) from error


def _release(version: str) -> str:
  return ".".join(_base_version(version).split(".")[:3])
