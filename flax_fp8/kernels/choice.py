"""Where a kernel of ours runs, and where what XLA makes of plain JAX does."""

from __future__ import annotations

import contextlib
import enum
import re
from typing import Any, Literal, get_args

import jax

from flax_fp8 import _compat
from flax_fp8.capability import capability

Kernels = Literal["auto", "all", "off"]

# Part of the key of JAX's compilation caches.
_chosen: Any = jax.make_user_context("auto")

# Whether what is traced stands in a loop, for which it is a slice of something larger.
_in_loop: Any = jax.make_user_context(False)


class Gpu(enum.Enum):
  """What a GPU is to these kernels."""

  OTHER = "not NVIDIA's, or without FP8 matrix units"
  ROWS_ONLY = "FP8 GEMMs read operands along the axes that they contract, Ada and Hopper"
  ANY_LAYOUT = "FP8 GEMMs read operands as they lie, Blackwell"


# What drivers call NVIDIA's GPUs with FP8 matrix units.
_KINDS = {
  Gpu.ROWS_ONLY: re.compile(r"\b(G?H[12]00|L4|L40S?|RTX 40[5-9]0)"),
  Gpu.ANY_LAYOUT: re.compile(r"\b(G?B[1-3]00|RTX 50[5-9]0|RTX PRO)"),
}


def use_kernels(which: Kernels) -> contextlib.AbstractContextManager[Any]:
  """Chooses what delayed scaling leaves to Pallas kernels, in what is traced inside.

  Kernels run on NVIDIA's GPUs with FP8 matrix units, where JAX has Pallas' Triton backend, in
  programs of one device and inside ``shard_map``. One computes the scales of several tensors.
  Another reads a tensor once and writes it in FP8 in both layouts that GEMMs take, with its amax,
  four bytes an element in bfloat16: XLA takes five, and three where it has the tensor's producer
  write FP8, which a kernel would prevent.

  Args:
    which: "auto", as without this context: scales; and, before Blackwell, whose GEMMs need one
      layout alone, tensors that are read from memory as they are, that is, kernels of layers whose
      parameters have the dtype of the computation. Neither inside lifted transformations of Linen:
      under ``nn.scan`` parameters and state are slices, which XLA's code reads where they are and
      a kernel only as copies. "all": every tensor that a kernel can take, everywhere. "off": plain
      JAX everywhere.

  Returns:
    A context manager.

  Raises:
    ValueError: ``which`` is none of these.

  Numerics:
    The same bits, whatever is chosen.

  Example:
    >>> import flax_fp8 as fp8
    >>> with fp8.use_kernels("off"):
    ...   pass  # trace, or call a compiled function for the first time

  References:
    JAX, jax.experimental.pallas; benchmarks/traffic.py, which counts the bytes.
  """
  if which not in get_args(Kernels):
    raise ValueError(
      f"use_kernels: which must be one of {get_args(Kernels)}; got {which!r}. Pass one of these "
      "strings."
    )
  return _chosen(which)


def takes(*, opaque: bool) -> bool:
  """Tells whether the kernel that casts takes a tensor.

  Args:
    opaque: whether the tensor is read from memory, whatever casts it: nothing elementwise makes it
      that XLA could make write FP8 at once.
  """
  if not available():
    return False
  return _chosen.value == "all" or (opaque and _gpu() is Gpu.ROWS_ONLY)


def in_loop(is_in_loop: bool) -> contextlib.AbstractContextManager[Any]:
  """Makes the context of what is, or is not, traced for the body of a loop."""
  return _in_loop(is_in_loop)


def available() -> bool:
  """Tells whether kernels run on the GPU that is traced for, as far as that is known."""
  wanted = _chosen.value == "all" or (_chosen.value == "auto" and not _in_loop.value)
  return wanted and _compat.HAS_TRITON and _gpu() is not Gpu.OTHER


def _gpu() -> Gpu:
  """Looks at the device that a context describes, as for ahead-of-time compilation, or has."""
  described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
  if described is not None and (gpu := _by_name(described.device_kind)) is not Gpu.OTHER:
    return gpu
  return _attached() if jax.default_backend() == "gpu" else Gpu.OTHER


def lacks_fp8_units() -> bool:
  """Tells whether what is traced for is known to be a GPU without FP8 matrix units."""
  described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
  if described is not None and described.device_kind.startswith("NVIDIA"):
    return _by_name(described.device_kind) is Gpu.OTHER
  return jax.default_backend() == "gpu" and not capability(jax.local_devices(backend="gpu")[0])[0]


def _by_name(kind: str) -> Gpu:
  return next((gpu for gpu, names in _KINDS.items() if names.search(kind)), Gpu.OTHER)


def _attached() -> Gpu:
  device: Any = jax.local_devices(backend="gpu")[0]
  if not device.device_kind.startswith("NVIDIA") or not capability(device)[0]:
    return Gpu.OTHER
  major = int(str(device.compute_capability).split(".", maxsplit=1)[0])
  return Gpu.ANY_LAYOUT if major >= 10 else Gpu.ROWS_ONLY
