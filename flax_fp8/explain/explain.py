"""``explain`` and ``assert_fp8``: compile a function for a GPU and report the result."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flax_fp8 import fields
from flax_fp8.explain import collectives, gemms, hlo, mosaic, reasons, roles, schedule, traffic
from flax_fp8.explain.asked import asked_for
from flax_fp8.explain.compile import AnyMesh, Program, compile_program
from flax_fp8.explain.gemms import Gemm, Site
from flax_fp8.explain.report import Report, require_patterns
from flax_fp8.explain.schedule import Launch
from flax_fp8.explain.target import GpuTarget
from flax_fp8.explain.traffic import Kernel, KernelClass


def explain(
  fn: Callable[..., Any],
  *args: Any,
  target: str | GpuTarget | None = None,
  mesh: AnyMesh | None = None,
  name: str | None = None,
  timeout: float = 600.0,
) -> Report:
  """Compiles a function for a GPU and reports which GEMMs are FP8, and why the others are not.

  The function is compiled but never run. With ``target``, no GPU is needed. The function is
  exported, and a child process compiles it for that GPU. Autotuning and Triton GEMMs are off in the
  child process, because XLA chooses them by timing on a real GPU. The calling process and its
  devices are not affected. Python callbacks (``jax.debug.print``, ``io_callback``) are compiled
  too, but never called.

  Args:
    fn: a function that ``jax.jit`` takes, or a jitted function, such as a train step or a gradient.
      Donated and static arguments of a jitted function are respected.
    *args: its arguments: arrays or ``jax.ShapeDtypeStruct``. Their shardings determine the number
      of devices.
    target: the GPU: ``"h100"``, ``"h200"``, ``"b200"``, ``"a100"``, ``"l40s"``, a ``GpuTarget``, or
      None for the attached GPU.
    mesh: mesh to trace the function under, as with ``jax.set_mesh``. It may have more devices than
      the machine: ``jax.sharding.AbstractMesh((8,), ("data",))``.
    name: name of the program in the report. The default is the name of the function.
    timeout: seconds after which the compiler is stopped.

  Returns:
    The report of GEMMs, kernels, bytes, collectives, memory and roofline.

  Raises:
    ValueError: ``target`` is None and no GPU is attached, or its name is unknown. With ``target``:
      a callback is ordered, or returns a value on an ``AbstractMesh``.
    TypeError: ``fn`` is not a function, an argument can't be exported, ``target`` is not a name or
      ``GpuTarget``, or ``mesh`` is not a mesh.
    ImportError: JAX's GPU compiler is missing or of another version. The message has the command
      that installs it.
    TimeoutError: the compiler took longer than ``timeout``.
    MemoryError: the compiler ran out of memory.
    RuntimeError: the compiler refused the program, or was killed, or has no ptxas for a Pallas
      kernel.

  Numerics:
    Nothing is computed. If XLA finds no FP8 kernel, it multiplies in a wider dtype and also drops
    the rounding to FP8 ("excess precision"). Such a GEMM is not FP8 at all.

    A product of FP8 operands that names no algorithm can be FP8 for a described GPU but not on a
    real one. There, XLA tries Triton GEMMs first, unless ``--xla_gpu_enable_triton_gemm=false`` is
    set. The contractions of ``flax_fp8`` name ``DotAlgorithmPreset.ANY_F8_ANY_F8_F32`` if JAX
    supports it.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> model = nn.Dense(256, dtype=jnp.bfloat16, dot_general_cls=fp8.Fp8DotGeneral)
    >>> x = jnp.ones((512, 128), jnp.bfloat16)
    >>> variables = model.init(jax.random.key(0), x)
    >>> def loss(variables, x):
    ...   return jnp.mean(model.apply(variables, x).astype(jnp.float32) ** 2)
    >>> report = fp8.explain(jax.grad(loss), variables, x, target="h100")
    >>> report.fp8_gemms, report.total_gemms
    (2, 2)

  References:
    XLA, "Deviceless compilation", https://openxla.org/xla/tools; jax.experimental.topologies.
  """
  fields.function("explain", "fn", fn, "Pass a function, and its arguments after it.")
  advice = "It is in seconds, for the child process that compiles."
  fields.number("explain", "timeout", timeout, "a positive number", lambda x: x > 0, advice)
  program = compile_program(fn, args, target=target, mesh=mesh, timeout=timeout)
  return read_program(program, name or getattr(fn, "__name__", type(fn).__name__))


def read_program(program: Program, name: str) -> Report:
  """Builds the report of a compiled program."""
  module, asked = hlo.parse(program.hlo), hlo.parse(program.asked)
  launched = schedule.launches(module)
  sites = gemms.find(module, launched)
  kernels = traffic.kernels(module, launched, sites)
  return Report(
    name=name,
    device_kind=program.device_kind,
    devices=program.devices,
    described=program.described,
    gemms=tuple(_gemms(module, asked, sites, kernels, program)),
    kernels=tuple(kernels),
    collectives=tuple(collectives.find(module, launched, program.devices)),
    memory=program.memory,
    target=program.target,
    doubts=tuple(_doubts(module, asked, launched, kernels)),
    registers=mosaic.read_registers(program.log),
  )


def _gemms(
  module: hlo.Module,
  asked: hlo.Module,
  sites: Sequence[Site],
  kernels: Sequence[Kernel],
  program: Program,
) -> Iterator[Gemm]:
  products = asked_for(asked)
  moved = {kernel.name: kernel.read + kernel.written for kernel in kernels}
  for site, role in zip(sites, roles.roles(module, sites, products), strict=True):
    lhs, rhs = (operand.dtype for operand in gemms.operand_arrays(module, site))
    why_not = ""
    if not gemms.is_fp8(module, site):
      why_not = reasons.reason(asked, products, site, (lhs, rhs), program.fp8_units)
    yield Gemm(
      path=site.path,
      role=role,
      extent=site.extent,
      lhs=lhs,
      rhs=rhs,
      out=site.dot.array.dtype,
      kernel=site.kernel,
      times=site.launch.times,
      bytes=moved[site.launch.instruction.name],
      notes=(*gemms.padding(module, site), *gemms.plain_jax(site)),
      op_name=site.op_name,
      reason=why_not,
    )


def _doubts(
  module: hlo.Module,
  asked: hlo.Module,
  launched: Sequence[Launch],
  kernels: Sequence[Kernel],
) -> Iterator[str]:
  """Yields what the report could not read, or had to assume."""
  for unread, which in ((module.unread, "optimized"), (asked.unread, "original")):
    if unread:
      yield f"{len(unread)} lines of the {which} program could not be read, the first: {unread[0]}"
  doubted: dict[str, list[str]] = {}
  for launch in launched:
    if launch.doubt:
      doubted.setdefault(launch.doubt, []).append(launch.instruction.name)
  for doubt, names in doubted.items():
    yield f"{doubt}: {len(names)} kernels, the first {names[0]}"
  unknown: dict[str, int] = {}
  for kernel in kernels:
    if kernel.kind in (KernelClass.UNKNOWN, KernelClass.LIBRARY):
      unknown[kernel.what] = unknown.get(kernel.what, 0) + kernel.times
  for what, times in unknown.items():
    if "python_gpu_callback" in what:
      yield f"a Python callback, times {times}: its time on the host is not counted"
    else:
      yield f"{what}, times {times}: what it computes is unknown"


def assert_fp8(
  fn: Callable[..., Any],
  *args: Any,
  target: str | GpuTarget | None = None,
  mesh: AnyMesh | None = None,
  exclude: Sequence[str | re.Pattern[str]] = (),
  name: str | None = None,
  timeout: float = 600.0,
) -> Report:
  """Raises AssertionError unless every GEMM of a function is FP8 on a GPU, except excluded ones.

  Args:
    fn: as for ``explain``.
    *args: as for ``explain``.
    target: as for ``explain``.
    mesh: as for ``explain``.
    exclude: patterns of modules whose GEMMs may have any dtype, such as
      ``["*/head", "*/attention"]``. Patterns are those of ``Fp8Config``. A pattern that matches no
      GEMM raises an error.
    name: as for ``explain``.
    timeout: as for ``explain``.

  Returns:
    The report.

  Raises:
    AssertionError: a GEMM is not FP8, or the program has no GEMM. The message lists each GEMM with
      its reason.
    TypeError: ``exclude`` is not a sequence of patterns.
    ValueError: a pattern of ``exclude`` matches no GEMM.
    Exception: any error of ``explain``.

  Numerics:
    As for ``explain``.

  Example:
    A test that runs on any machine:

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> def test_dense_is_fp8():
    ...   layer = nn.Dense(256, dtype=jnp.bfloat16, dot_general_cls=fp8.Fp8DotGeneral)
    ...   variables = layer.init(jax.random.key(0), x := jnp.ones((32, 128), jnp.bfloat16))
    ...   fp8.assert_fp8(layer.apply, variables, x, target="h100")
    >>> test_dense_is_fp8()

  References:
    flax_fp8.explain.
  """
  require_patterns(exclude)
  report = explain(fn, *args, target=target, mesh=mesh, name=name, timeout=timeout)
  report.assert_fp8(exclude)
  return report
