"""Calls a kernel on GPUs that have it, and plain JAX elsewhere.

A program is traced with the plain code, which also defines shapes, dtypes and mesh axes. Only when
it is lowered for CUDA, the kernel is chosen. A program for a CPU therefore never imports Pallas.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal, get_args

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.interpreters import batching, mlir, partial_eval

from flax_fp8 import fields, scopes
from flax_fp8.kernels.base import Kernel
from flax_fp8.kernels.partition import lower_partitioned, register
from flax_fp8.platforms import hopper_refusal, is_alone

Kernels = Literal["auto", "all", "off"]

_FIRST_JAX = (0, 10, 2)  # whose Mosaic GPU compiles all kernels

_use: Any = jax.make_user_context("auto")  # jax.jit traces again if it changes


def use_kernels(which: Kernels) -> contextlib.AbstractContextManager[Any]:
  """Selects which hand-written kernels to use in code that is traced inside the context.

  ``Float8BlockScaling`` has kernels for NVIDIA GPUs of compute capability 9.0 (Hopper). The other
  recipes have none: XLA's code was measured to be as fast.

  Args:
    which: "auto" uses kernels that were measured to be faster, as without this context. "all" uses
      every kernel that can run. At present this is the same. "off" uses plain JAX everywhere.

  Returns:
    A context manager.

  Raises:
    ValueError: ``which`` is not one of these strings.

  Numerics:
    Quantized values and scales are the same bits. Sums of products may be added in another order.

  Example:
    >>> import flax_fp8 as fp8
    >>> with fp8.use_kernels("off"):
    ...   pass  # trace, or call a compiled function

  References:
    docs/results.md, "Timed on an H100".
  """
  fields.choice("use_kernels", "which", which, get_args(Kernels))
  return _use(which)


def call(kernel: Kernel, *args: jax.Array) -> tuple[jax.Array, ...]:
  """Runs a kernel where the program's GPU has it, and its plain code elsewhere.

  It has no derivative.
  """
  with jax.named_scope(kernel.name):
    if _use.value == "off":
      return kernel.plain(*args)
    plain = jax.make_jaxpr(kernel.plain)(*args)
    return tuple(_kernel.bind(*args, kernel=kernel, plain=plain))


_kernel: Any = jax.extend.core.Primitive("kernel")
_kernel.multiple_results = True
_kernel.def_abstract_eval(lambda *avals, plain, **_: plain.out_avals)


@_kernel.def_impl
def _run_now(*args: jax.Array, kernel: Kernel, plain: Any) -> Any:
  """Compiles even under ``jax.disable_jit``, since the platform is known only when lowering."""
  del plain
  with jax.disable_jit(False):
    return _compiled(kernel)(*args)


@functools.cache
def _compiled(kernel: Kernel) -> Any:
  return jax.jit(functools.partial(call, kernel))


def _batch(args: Any, axes: Any, *, kernel: Kernel, plain: Any) -> tuple[Any, list[int]]:
  is_mapped = [axis is not None for axis in axes]
  (size,) = {x.shape[axis] for x, axis in zip(args, axes, strict=True) if axis is not None}
  if size == 0:
    empty = [jnp.zeros((0, *aval.shape), aval.dtype) for aval in plain.out_avals]
    return empty, [0] * len(empty)
  first = [
    x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(args, axes, strict=True)
  ]
  out = kernel.batch(size, first, is_mapped)
  return out, [0] * len(out)


def _drop_unused(used: Sequence[bool], *rest: Any) -> tuple[list[bool], Any]:
  """Tells a kernel which of its results the program uses."""
  *_, equation = rest  # newer JAX has an argument more
  if not any(used):
    return [False] * len(equation.invars), None
  params = equation.params | {"kernel": equation.params["kernel"].using(used)}
  return [True] * len(equation.invars), equation.replace(params=params)


def _lower_plain(context: Any, *args: Any, kernel: Kernel, plain: Any) -> Any:
  del kernel
  fun: Any = jax.extend.core.jaxpr_as_fun(plain)
  return mlir.lower_fun(fun, multiple_results=True)(context, *args)


def _lower_on_cuda(context: Any, *args: Any, kernel: Kernel, plain: Any) -> Any:
  """Lowers to the kernel, or to plain code under a name scope that says why."""
  if reason := _refusal(context, kernel):
    return mlir.lower_fun(_because(reason, plain), multiple_results=True)(context, *args)
  if not is_alone(context.module_context.axis_context):
    return lower_partitioned(context, *args, kernel=kernel)
  with _advice():
    return mlir.lower_fun(_jitted(kernel), multiple_results=True)(context, *args)


@functools.cache
def _jitted(kernel: Kernel) -> Any:
  """Jits a kernel, so that a program with many equal calls lowers it once."""
  return jax.jit(kernel.run)


@contextlib.contextmanager
def _advice() -> Generator[None]:
  """Adds advice to JAX's error for a machine without the tools that compile kernels."""
  try:
    yield
  except RuntimeError as error:
    if "PTX compilation provider" not in str(error):
      raise
    raise RuntimeError(
      "Float8BlockScaling: its kernels need ptxas of the CUDA toolkit; JAX did not find it. Run "
      'pip install nvidia-cuda-nvcc, or trace inside fp8.use_kernels("off").'
    ) from error


def _because(reason: str, plain: Any) -> Callable[..., Any]:
  fun: Any = jax.extend.core.jaxpr_as_fun(plain)

  def named(*args: jax.Array) -> Any:
    with jax.named_scope(scopes.plain_jax(reason)):
      return fun(*args)

  return named


def _refusal(context: Any, kernel: Kernel) -> str:
  """Returns why a program that is being lowered can't use a kernel; empty if it can."""
  if jax.__version_info__ < _FIRST_JAX:
    return f"JAX {jax.__version__} is older than {'.'.join(map(str, _FIRST_JAX))}"
  module = context.module_context
  if not is_alone(module.axis_context) and not register():
    return "this JAX can't shard custom calls"
  return hopper_refusal(module) or kernel.refusal(*context.avals_in)


batching.primitive_batchers[_kernel] = _batch
partial_eval.dce_rules[_kernel] = _drop_unused
mlir.register_lowering(_kernel, _lower_plain)
mlir.register_lowering(_kernel, _lower_on_cuda, platform="cuda")
