"""Where a kernel of ours runs, and where what XLA makes of plain JAX does."""

from __future__ import annotations

import contextlib
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

# What drivers call NVIDIA's GPUs with FP8 matrix units.
_FP8_KINDS = re.compile(r"\b(G?[HB][1-3]00|L4|L40S?|RTX (40|50|PRO))")


def use_kernels(which: Kernels) -> contextlib.AbstractContextManager[Any]:
  """Chooses what delayed scaling leaves to Pallas kernels, in what is traced inside.

  Kernels run on NVIDIA's GPUs with FP8 matrix units, where JAX has Pallas' Triton backend, in
  programs of one device and inside ``shard_map``. One computes the scales of several tensors.
  Another reads a tensor once and writes it in FP8 in both layouts that GEMMs take, with its amax,
  four bytes an element in bfloat16: XLA takes five, and three where it has the tensor's producer
  write FP8, which a kernel would prevent.

  Args:
    which: "auto", as without this context: scales; and tensors that are read from memory as they
      are, that is, kernels of layers whose parameters have the dtype of the computation. Neither
      inside lifted transformations of Linen: under ``nn.scan`` parameters and state are slices,
      which XLA's code reads where they are and a kernel only as copies. "all": every tensor that a
      kernel can take, everywhere. "off": plain JAX everywhere.

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
  return available() and (opaque or _chosen.value == "all")


def in_loop(is_in_loop: bool) -> contextlib.AbstractContextManager[Any]:
  """Makes the context of what is, or is not, traced for the body of a loop."""
  return _in_loop(is_in_loop)


def available() -> bool:
  """Tells whether kernels run on the GPU that is traced for, as far as that is known."""
  wanted = _chosen.value == "all" or (_chosen.value == "auto" and not _in_loop.value)
  return wanted and _compat.HAS_TRITON and _is_fp8_gpu()


def _is_fp8_gpu() -> bool:
  """Looks at the device that a context describes, as for ahead-of-time compilation, or has."""
  described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
  if described is not None and _FP8_KINDS.search(described.device_kind):
    return True
  return jax.default_backend() == "gpu" and _attached_multiplies_fp8()


def _attached_multiplies_fp8() -> bool:
  device: Any = jax.local_devices(backend="gpu")[0]
  return device.device_kind.startswith("NVIDIA") and capability(device)[0]
