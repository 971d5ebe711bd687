"""Selects code by platform, CUDA or other, when a program is lowered.

``jax.lax.platform_dependent`` is not sufficient. In a program for several platforms it lowers every
branch for all of them, and the CPU rejects a dot_general with an explicit FP8 algorithm.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core
from jax.experimental.layout import Layout, with_layout_constraint
from jax.interpreters import ad, batching, mlir


def by_platform(*args: Any, cuda: Callable[..., Any], default: Callable[..., Any]) -> Any:
  """Calls ``cuda`` on NVIDIA GPUs, and ``default`` on other platforms.

  Args:
    *args: pytrees of arrays.
    cuda: function of ``args`` that returns one array.
    default: function of ``args`` that returns an array of the same shape and dtype.

  Returns:
    The array. It has the derivative of ``default``.
  """
  leaves, tree = jax.tree.flatten(args)
  flat = lambda fun: lambda *leaves: fun(*jax.tree.unflatten(tree, leaves))
  return _bind(leaves, cuda=flat(cuda), default=flat(default))


def _bind(leaves: Any, **functions: Callable[..., Any]) -> jax.Array:
  jaxprs = {name: jax.make_jaxpr(fun)(*leaves) for name, fun in functions.items()}
  (out,) = _by_platform.bind(*leaves, **jaxprs)
  return out


def _as_function(jaxpr: Any) -> Callable[..., Any]:
  fun: Any = jax.extend.core.jaxpr_as_fun(jaxpr)
  return lambda *args: fun(*args)[0]


_by_platform: Any = jax.extend.core.Primitive("by_platform")
_by_platform.multiple_results = True
_by_platform.def_impl(lambda *args, **given: _compiled(_call(given), args))
_by_platform.def_abstract_eval(lambda *avals, default, **_: default.out_avals)


def _compiled(call: Callable[..., Any], args: Any) -> Any:
  """Compiles even under ``jax.disable_jit``, since the platform is known only when lowering."""
  with jax.disable_jit(False):
    return jax.jit(call)(*args)


def _call(given: dict[str, Any]) -> Callable[..., Any]:
  return lambda *args: _by_platform.bind(*args, **given)


def _jvp(primals: Any, tangents: Any, *, default: Any, **_: Any) -> Any:
  fun: Any = jax.extend.core.jaxpr_as_fun(default)
  return jax.jvp(fun, tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))


def _batch(args: Any, axes: Any, **jaxprs: Any) -> tuple[list[jax.Array], list[int]]:
  mapped = {name: jax.vmap(_as_function(jaxpr), axes) for name, jaxpr in jaxprs.items()}
  return [_bind(args, **mapped)], [0]


def _lower_by_platform(context: Any, *args: Any, which: str, **jaxprs: Any) -> Any:
  fun: Any = jax.extend.core.jaxpr_as_fun(jaxprs[which])
  return mlir.lower_fun(fun, multiple_results=True)(context, *args)


ad.primitive_jvps[_by_platform] = _jvp
batching.primitive_batchers[_by_platform] = _batch
mlir.register_lowering(_by_platform, functools.partial(_lower_by_platform, which="default"))
mlir.register_lowering(
  _by_platform, functools.partial(_lower_by_platform, which="cuda"), platform="cuda"
)


def in_rows(x: jax.Array) -> jax.Array:
  """Constrains an array to row-major layout on CUDA, so the last axis is contiguous in memory.

  The constraint applies on one device, and inside a ``shard_map`` over all mesh axes. Otherwise
  this function is the identity, because XLA's partitioner would gather an array with a fixed
  layout. The number of devices is known only when the program is lowered. The function is also the
  identity on other platforms and in exported programs, since JAX does not serialize the constraint.
  Programs that ``explain`` exports for a described GPU keep it.

  Args:
    x: array of any shape and dtype.

  Returns:
    The same array.
  """
  return _in_rows.bind(x)


_in_rows: Any = jax.extend.core.Primitive("in_rows")
_in_rows.def_impl(lambda x: x)
_in_rows.def_abstract_eval(lambda aval: aval)
ad.deflinear2(_in_rows, lambda cotangent, _: [cotangent])


def _constrain(x: jax.Array) -> jax.Array:
  return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def _lower_in_rows(context: Any, x: Any) -> Any:
  module = context.module_context
  if _is_exported(module) or not is_alone(module.axis_context):
    return [x]
  return mlir.lower_fun(_constrain, multiple_results=False)(context, x)


def _is_exported(module: Any) -> bool:
  described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
  return module.lowering_parameters.for_export and described is None


def is_alone(context: Any) -> bool:
  """Tells whether a program is lowered for one device, as inside a ``shard_map`` over all axes."""
  if hasattr(context, "num_devices"):
    return context.num_devices == 1
  return set(context.manual_axes) == set(context.mesh.axis_names)


def _batch_in_rows(args: Any, axes: Any) -> tuple[jax.Array, int]:
  """Moves the mapped axis to the front, where a batch of GEMMs has it."""
  return in_rows(jax.numpy.moveaxis(args[0], axes[0], 0)), 0


batching.primitive_batchers[_in_rows] = _batch_in_rows
mlir.register_lowering(_in_rows, lambda _, x: [x])
mlir.register_lowering(_in_rows, _lower_in_rows, platform="cuda")


def hopper_refusal(module: Any) -> str:
  """Returns why a program that is being lowered does not run on Hopper GPUs; empty if it does.

  Args:
    module: the context of the module, from a lowering rule.
  """
  kind, capability = _described(module), None
  if not kind:
    if module.lowering_parameters.for_export:
      return "an exported program may run on any GPU"
    devices = getattr(module.axis_context, "device_assignment", None) or _cuda_devices()
    if not devices:
      return "no GPU is attached, and none is described"
    kind, capability = devices[0].device_kind, getattr(devices[0], "compute_capability", None)
  is_hopper = _HOPPER.search(kind) if capability is None else str(capability) == "9.0"
  return "" if is_hopper else f"there is no kernel for {kind}"


def _cuda_devices() -> Sequence[Any]:
  with contextlib.suppress(RuntimeError):  # there are none
    return jax.local_devices(backend="cuda")
  return ()


_HOPPER = re.compile(r"\bG?H(20|[128]00)\b")
_described_gpu: Any = jax.extend.core.Primitive("described_gpu")


def described_gpu(device_kind: str) -> tuple[Any, Callable[..., Any]]:
  """Returns an entry for JAX's override of lowering rules that names the GPU of the program."""
  return _described_gpu, lambda *_: device_kind


def _described(module: Any) -> str:
  rules = module.lowering_parameters.override_lowering_rules or ()
  return next((rule() for primitive, rule in rules if primitive is _described_gpu), "")
