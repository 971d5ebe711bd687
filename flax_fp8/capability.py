"""Whether a device multiplies FP8, and why not."""

from __future__ import annotations

from typing import Any

import jax

# Ada (8.9) brought FP8 tensor cores to NVIDIA's GPUs, CDNA3 (gfx94x, fnuz formats) to AMD's.
_FIRST_CUDA = (8, 9)
_ROCM = ("gfx94", "gfx95", "gfx12")


def capability(device: Any = None) -> tuple[bool, str]:
  """Tells whether FP8 contractions run on a device as asked for, and the reason.

  Args:
    device: a JAX device; the default one if None.

  Returns:
    ``(supported, reason)``. A CPU is supported: it emulates FP8 exactly, and says so.

  Example:
    >>> import flax_fp8 as fp8
    >>> fp8.capability()[0]
    True

  References:
    NVIDIA, CUDA C++ Programming Guide, compute capabilities.
  """
  device = device if device is not None else jax.devices()[0]
  if device.platform == "cpu":
    return True, "CPU: FP8 is emulated; right to the bit, no faster than BF16"
  found = getattr(device, "compute_capability", None)
  if found is None:
    return (
      False,
      f"{device.device_kind}: no FP8 matrix units known for platform {device.platform!r}",
    )
  name = f"{device.device_kind} (compute capability {found})"
  if str(found).startswith("gfx"):
    supported = str(found).startswith(_ROCM)
  else:
    supported = tuple(int(part) for part in str(found).split(".")) >= _FIRST_CUDA
  if supported:
    return True, f"{name}: FP8 matrix units present"
  return False, f"{name}: no FP8 matrix units; 8.9 (Ada), 9.0 (Hopper) or newer has them"
