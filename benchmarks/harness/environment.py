"""The hardware and the versions that a JSON file names."""

from importlib import metadata
from typing import Any

import flax
import jax

import flax_fp8 as fp8
from harness.output import host


def on_cpu() -> bool:
  """Whether FP8 is emulated: a CPU computes FP8 GEMMs in a wider type."""
  return jax.default_backend() == "cpu"


def environment() -> dict[str, Any]:
  """Where, when and by which command numbers were made."""
  return host() | {
    "device": jax.devices()[0].device_kind,
    "backend": jax.default_backend(),
    "fp8_emulated": on_cpu(),
    "jax": jax.__version__,
    "flax": flax.__version__,
    "optax": metadata.version("optax"),
    "orbax-checkpoint": metadata.version("orbax-checkpoint"),
    "flax_fp8": fp8.__version__,
  }
