"""A kernel beside its plain twin: which of the two runs is decided where a program is lowered."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
from jax.custom_batching import custom_vmap
from jax.interpreters import ad, mlir


def kernel_unless_mapped(
  kernel: Callable[..., Any], plain: Callable[..., Any], is_mapped: Callable[..., Any]
) -> Callable[..., Any]:
  """Makes a function that is ``kernel`` where that can run, but ``plain`` under a mapping vmap.

  Args:
    kernel: takes and gives pytrees of arrays.
    plain: gives the same.
    is_mapped: from a boolean for each array given, whether it is mapped, to a pytree of booleans
      for the results of ``plain``.

  Returns:
    The function.
  """

  @custom_vmap
  def either(*args: Any) -> Any:
    return kernel_or_plain(kernel, plain, *args)

  @either.def_vmap
  def rule(axis_size: int, in_batched: Any, *args: Any) -> tuple[Any, Any]:
    axis = lambda mapped: jax.tree.map(lambda each: 0 if each else None, mapped)
    out = is_mapped(*in_batched)
    mapped = jax.vmap(plain, axis(tuple(in_batched)), axis(out), axis_size=axis_size)
    return mapped(*args), out

  return either


def kernel_or_plain(kernel: Callable[..., Any], plain: Callable[..., Any], *args: Any) -> Any:
  """Calls ``kernel`` where it can run, and ``plain``, which gives the same, elsewhere.

  It can run on CUDA, in what computes on one device alone, or where a ``shard_map`` over all mesh
  axes leaves no sharding to the compiler, which knows not how to shard a kernel. On how many
  devices a program runs is known no sooner than it is lowered.
  """
  leaves, tree = jax.tree.flatten(args)
  flat = lambda fun: lambda *leaves: jax.tree.leaves(fun(*jax.tree.unflatten(tree, leaves)))
  jaxprs = {
    name: jax.make_jaxpr(flat(fun))(*leaves) for name, fun in (("kernel", kernel), ("plain", plain))
  }
  out = _kernel_or_plain.bind(*leaves, **jaxprs)
  return jax.tree.unflatten(jax.tree.structure(jax.eval_shape(plain, *args)), out)


_kernel_or_plain: Any = jax.extend.core.Primitive("kernel_or_plain")
_kernel_or_plain.multiple_results = True
_kernel_or_plain.def_impl(lambda *args, **given: jax.jit(_bind_kernel(given))(*args))
_kernel_or_plain.def_abstract_eval(lambda *avals, plain, **_: plain.out_avals)


def _bind_kernel(given: dict[str, Any]) -> Callable[..., Any]:
  return lambda *args: _kernel_or_plain.bind(*args, **given)


def _lower(context: Any, *args: Any, kernel: Any, plain: Any, cuda: bool) -> Any:
  runs = cuda and _is_alone(context.module_context.axis_context)
  fun: Any = jax.extend.core.jaxpr_as_fun(kernel if runs else plain)
  return mlir.lower_fun(fun, multiple_results=True)(context, *args)


def _is_alone(context: Any) -> bool:
  if hasattr(context, "num_devices"):
    return context.num_devices == 1
  return set(context.manual_axes) == set(context.mesh.axis_names)


def _jvp(primals: Any, tangents: Any, *, plain: Any, **_: Any) -> Any:
  fun: Any = jax.extend.core.jaxpr_as_fun(plain)
  return jax.jvp(fun, tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))


mlir.register_lowering(_kernel_or_plain, functools.partial(_lower, cuda=False))
mlir.register_lowering(_kernel_or_plain, functools.partial(_lower, cuda=True), platform="cuda")
ad.primitive_jvps[_kernel_or_plain] = _jvp
