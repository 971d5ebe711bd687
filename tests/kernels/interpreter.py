"""Runs Mosaic GPU kernels on the CPU, in the interpreter of Pallas, which also finds races.

The interpreter does not check layouts, swizzling or registers: ``test_compiled.py`` compiles.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

REASON = "the interpreter of Mosaic GPU kernels runs them since JAX 0.12"
IS_MISSING = jax.__version_info__ < (0, 12)


def interpret(fun: Callable[..., Any], *args: Any) -> Any:
  """Calls ``fun`` with all its kernels interpreted.

  Raises:
    RuntimeError: two threads of a kernel access the same memory and nothing orders them.
  """
  from jax.experimental.pallas import mosaic_gpu as plgpu

  detecting = plgpu.InterpretGPUParams(detect_races=True)
  with jax.sharding.use_abstract_mesh(_mesh_of_h100()), plgpu.force_gpu_interpret_mode(detecting):
    return jax.block_until_ready(fun(*args))


def _mesh_of_h100() -> jax.sharding.AbstractMesh:
  known = {"device_kind": "NVIDIA H100 80GB HBM3", "num_cores": 132, "platform": "gpu"}
  fields = [field.name for field in dataclasses.fields(jax.sharding.AbstractDevice)]
  device = jax.sharding.AbstractDevice(**{name: known.get(name) for name in fields})
  return jax.sharding.AbstractMesh((), (), abstract_device=device)
