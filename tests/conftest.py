"""Every test runs strictly: eight CPU devices, no implicit broadcasting of ranks."""

import functools
import gc
import importlib
import os
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# JAX's CUDA plugin describes GPUs, and compiles for them, without the CUDA libraries.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
# Compiling is most of what a test does, and most of compiling is LLVM optimizing what then runs for
# a millisecond. XLA's own passes, in which all arithmetic is decided, are as ever; scripts that are
# tested in a process of their own run without these flags, as users run them.
if os.environ["JAX_PLATFORMS"] == "cpu":
  os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + " --xla_cpu_parallel_codegen_split_count=1"
  )
else:
  # Workers share a GPU.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import pytest
from jax.experimental import topologies

from flax_fp8.explain import deviceless
from flax_fp8.explain.target import GpuTarget

jax.config.update("jax_numpy_rank_promotion", "raise")
# What JAX keeps of programs lives on: going through all of it often finds nothing.
gc.set_threshold(100_000, 50, 50)


def pytest_configure(config: pytest.Config) -> None:
  """Has XLA emit code for the CPU in its older way, where that is right, unless slow tests run too.

  It takes half the time to compile. Before JAX 0.10 it is wrong in FP8 and after 0.11.0 it is gone;
  between, it differs in FNUZ formats and float32 subnormals alone: what tests them is marked slow.
  """
  is_right = (0, 10) <= jax.__version_info__ < (0, 11, 1) and os.environ["JAX_PLATFORMS"] == "cpu"
  if is_right and config.getoption("markexpr") == "not slow":
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"


@pytest.fixture(scope="session")
def described() -> Callable[[str], jax.Device]:
  """JAX's devices of GPUs that are not there, by ``GpuTarget``'s names."""
  pytest.importorskip("jax_plugins.xla_cuda13", reason="the CUDA plugin exists for Linux alone")

  @functools.cache
  def describe(name: str) -> jax.Device:
    description = GpuTarget.named(name).description
    topology = {"target_config": description, "topology": "1x1x1"}
    return topologies.get_topology_desc("", "cuda", **topology).devices[0]

  return describe


@pytest.fixture(autouse=True)
def compiled_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
  """Has ``explain`` compile in this process: most of what a small program takes is to start one.

  Not so where a test is marked ``child``.
  """
  if request.node.get_closest_marker("child") is None:
    compiling = importlib.import_module("flax_fp8.explain.compile")
    answer = lambda asked, program, timeout: deviceless.answer(asked, program)
    monkeypatch.setattr(compiling, "run_child", answer)
