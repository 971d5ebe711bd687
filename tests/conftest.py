"""Configures all tests: eight CPU devices, no implicit rank promotion."""

import functools
import gc
import importlib
import os
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# JAX's CUDA plugin can describe GPUs and compile for them without the CUDA libraries.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
# Tests spend most of their time compiling, mostly in LLVM's optimizations, for programs that run a
# millisecond. XLA's own passes decide all arithmetic, and they do not change. Scripts that are
# tested in a separate process run without these flags, as for users.
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
# JAX keeps its programs alive, so frequent garbage collection finds nothing.
gc.set_threshold(100_000, 50, 50)


def pytest_configure(config: pytest.Config) -> None:
  """Selects XLA's older CPU emitters, where they are correct, unless slow tests run too.

  They compile in half the time. They are wrong for FP8 before JAX 0.10, and removed after 0.11.0.
  In between, they differ only in FNUZ formats and float32 subnormals. Their tests are marked slow.
  """
  is_right = (0, 10) <= jax.__version_info__ < (0, 11, 1) and os.environ["JAX_PLATFORMS"] == "cpu"
  if is_right and config.getoption("markexpr") == "not slow":
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"


@pytest.fixture(scope="session")
def described() -> Callable[[str], jax.Device]:
  """Returns JAX devices for GPUs that are not attached, by ``GpuTarget``'s names."""
  pytest.importorskip("jax_plugins.xla_cuda13", reason="the CUDA plugin supports only Linux")

  @functools.cache
  def describe(name: str) -> jax.Device:
    description = GpuTarget.named(name).description
    topology = {"target_config": description, "topology": "1x1x1"}
    return topologies.get_topology_desc("", "cuda", **topology).devices[0]

  return describe


@pytest.fixture(autouse=True)
def compiled_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
  """Makes ``explain`` compile in this process, since starting a process takes most of the time.

  Tests marked ``child`` use a separate process.
  """
  if request.node.get_closest_marker("child") is None:
    compiling = importlib.import_module("flax_fp8.explain.compile")
    answer = lambda asked, program, timeout: deviceless.answer(asked, program)
    monkeypatch.setattr(compiling, "run_child", answer)
