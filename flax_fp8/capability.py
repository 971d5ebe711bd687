"""Rules that decide whether a device multiplies FP8 as a recipe needs, and why not, as data."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from flax_fp8 import fields
from flax_fp8.formats import E4M3, E4M3_FNUZ, E5M2, E5M2_FNUZ, Float8, Format


@dataclasses.dataclass(frozen=True)
class Needs:
  """What a recipe requires of a device's matrix units.

  Attributes:
    fp8_format: formats of values and of gradients.
    block_scales: dtype of the block scales that the matrix units must apply themselves, such as
      ``jnp.float8_e8m0fnu``. None if products are scaled in float32 after the GEMM.

  Example:
    >>> import flax_fp8 as fp8
    >>> fp8.DelayedScaling().needs.fp8_format == fp8.Format.HYBRID
    True
  """

  fp8_format: Format
  block_scales: Any = None


class HasNeeds(Protocol):
  """The part of a recipe that ``capability`` reads."""

  @property
  def needs(self) -> Needs:
    """What the recipe requires of a device."""
    ...


@dataclasses.dataclass(frozen=True)
class _Units:
  """What the matrix units of one GPU generation support."""

  formats: tuple[Float8, ...]
  block_scales: tuple[str, ...] = ()


_OCP = _Units((E4M3, E5M2))
_OCP_AND_MX = _Units((E4M3, E5M2), ("float8_e8m0fnu",))
_FNUZ = _Units((E4M3_FNUZ, E5M2_FNUZ))

_CUDA = {(10, 0): _OCP_AND_MX, (8, 9): _OCP}  # lowest compute capability; newest first
_ROCM = {"gfx94": _FNUZ, "gfx95": _OCP_AND_MX, "gfx12": _OCP}  # prefix of the name

# Driver names of NVIDIA GPUs with FP8. An abstract device has a name but no compute capability.
_NVIDIA_WITH_FP8 = re.compile(
  r"\b(G?H[12]00|L4|L40S?|RTX 40[5-9]0|G?B[1-3]00|RTX 50[5-9]0|RTX PRO)"
)

# cuBLASLt does not multiply E5M2 by E5M2, and XLA emits no FP8 GEMM for it on any GPU.
_ONE_OPERAND_IS = (E4M3, E4M3_FNUZ)


def capability(
  device: Any = None, *, fp8_format: Format | None = None, recipe: HasNeeds | None = None
) -> tuple[bool, str]:
  """Tells whether a device supports FP8 contractions, and why.

  Without ``fp8_format`` and ``recipe``, any FP8 format counts as support.

  Args:
    device: a JAX device. If None, the device that JAX uses by default: the one set by
      ``jax.default_device``, else the first local device.
    fp8_format: the formats of values and of gradients that the device must support.
    recipe: the recipe whose formats and scales the device must support.

  Returns:
    ``(supported, reason)``. A CPU counts as supported: it emulates FP8 exactly, and the reason says
    so.

  Raises:
    TypeError: an argument has the wrong type, or both ``fp8_format`` and ``recipe`` are given.

  Example:
    >>> import flax_fp8 as fp8
    >>> fp8.capability()[0]
    True
    >>> fp8.capability(recipe=fp8.DelayedScaling(fp8_format=fp8.Format.E4M3))[0]
    True

  References:
    NVIDIA, cuBLAS documentation, "Narrow Precision Data Types Usage"; AMD, ROCm documentation,
    "Data types and precision support"; OCP Microscaling Formats (MX) Specification, version 1.0.
  """
  needs = _needs(fp8_format, recipe)
  device = _default_device() if device is None else device
  if not (hasattr(device, "platform") and hasattr(device, "device_kind")):
    raise TypeError(
      f"capability: device must be a JAX device; got device={fields.show(device)}. Pass one of "
      "jax.devices(), or omit it to use the default device."
    )
  if device.platform == "cpu":
    return True, "CPU: FP8 is emulated; results are exact, but no faster than BF16"
  found = getattr(device, "compute_capability", None)
  if found is None:
    platform = repr(device.platform)
    return False, f"{device.device_kind}: no FP8 matrix units known on platform {platform}"
  refusal = _refusal(_units(str(found)), needs)
  reason = refusal or "FP8 matrix units present"
  return not refusal, f"{device.device_kind} (compute capability {found}): {reason}"


def lacks_fp8_units() -> bool:
  """Tells whether the program being traced targets an NVIDIA GPU without FP8 matrix units."""
  described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
  if described is not None and described.device_kind.startswith("NVIDIA"):
    return not _NVIDIA_WITH_FP8.search(described.device_kind)
  return jax.default_backend() == "gpu" and not capability(jax.local_devices(backend="gpu")[0])[0]


def _needs(fp8_format: Format | None, recipe: HasNeeds | None) -> Needs | None:
  """Returns what the arguments require; None if any format will do."""
  if fp8_format is not None and recipe is not None:
    raise TypeError(
      f"capability: a recipe has its own formats; got both {fp8_format=} and {recipe=}. Pass only "
      "one of the two."
    )
  if fp8_format is not None:
    if not isinstance(fp8_format, Format):
      raise TypeError(
        f"capability: fp8_format must be a Format; got fp8_format={fields.show(fp8_format)}. "
        "Pass Format.HYBRID, Format.E4M3, or Format(forward, backward)."
      )
    return Needs(fp8_format)
  needs = getattr(recipe, "needs", None)
  if recipe is not None and not isinstance(needs, Needs):
    raise TypeError(
      f"capability: recipe must be a recipe, such as DelayedScaling(); got "
      f"recipe={fields.show(recipe)}. Pass an instance, not its class or name."
    )
  return needs


def _default_device() -> Any:
  """Returns the device that JAX uses by default."""
  config: Any = jax.config  # type checkers do not know its settings
  chosen = config.jax_default_device
  if chosen is None or isinstance(chosen, str):  # a string names a platform
    return jax.local_devices(backend=chosen)[0]
  return chosen


def _units(found: str) -> _Units | None:
  """Looks up matrix units by compute capability, such as "9.0" (NVIDIA) or "gfx942" (AMD)."""
  if version := re.match(r"(\d+)\.(\d+)", found):
    numbers = int(version[1]), int(version[2])
    return next((units for first, units in _CUDA.items() if numbers >= first), None)
  return next((units for prefix, units in _ROCM.items() if found.startswith(prefix)), None)


def _refusal(units: _Units | None, needs: Needs | None) -> str:
  """Returns why the matrix units do not meet the needs; empty if they do."""
  if units is None:
    return (
      "no FP8 matrix units known; NVIDIA GPUs have them from compute capability 8.9 (Ada), "
      "AMD GPUs on gfx94x, gfx95x and gfx12xx"
    )
  if needs is None:
    return ""
  forward, backward = needs.fp8_format.forward, needs.fp8_format.backward
  names = " and ".join(f.name for f in units.formats)
  if missing := [f.name for f in dict.fromkeys((forward, backward)) if f not in units.formats]:
    return f"its FP8 matrix units multiply {names}, not {' or '.join(missing)}"
  if forward not in _ONE_OPERAND_IS:
    return (
      f"fprop would multiply {forward.name} by {forward.name}, but one operand of each FP8 GEMM "
      "must be E4M3"
    )
  if needs.block_scales is not None:
    scales = jnp.dtype(needs.block_scales).name
    if scales not in units.block_scales:
      return (
        f"its matrix units do not apply {scales} block scales; NVIDIA GPUs do from compute "
        "capability 10.0 (Blackwell), AMD GPUs on gfx95x"
      )
  return ""
