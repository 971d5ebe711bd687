"""The base class of the FP8 contraction modules, and a description of one call."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_fp8.ops.dot_general import plan_dot_general
from flax_fp8.ops.einsum import plan_einsum
from flax_fp8.ops.frozen import kernel_operand
from flax_fp8.ops.plan import Plan


class FP8Contraction:
  """Base of the modules that are called like ``lax.dot_general`` or ``jnp.einsum``.

  Subclasses have a field ``recipe`` and call their operands ``lhs`` and ``rhs``.

  Attributes:
    result_like_kernel: whether the default dtype of the result is that of ``rhs``.
  """

  result_like_kernel: ClassVar[bool] = False

  def __init_subclass__(cls, **kwargs: Any) -> None:
    super().__init_subclass__(**kwargs)
    for name, explain in {"__init__": _explain_init, "__call__": _explain_call}.items():
      if name in vars(cls):
        setattr(cls, name, explain(vars(cls)[name]))


def _explain_init(init: Callable[..., None]) -> Callable[..., None]:
  """Raises a clear error if arrays are passed to the class instead of an instance."""

  @functools.wraps(init)
  def explained(self: Any, *args: Any, **kwargs: Any) -> None:
    if not any(isinstance(x, jax.Array | np.ndarray) for x in (*args, *kwargs.values())):
      init(self, *args, **kwargs)
      return
    name, (operands, option) = type(self).__name__, _usage(self)
    raise TypeError(
      f"{name}: arrays must be passed to the call, not to the constructor; got arrays among the "
      f"fields. Write {name}()({operands}), or {option}={name} in a layer."
    )

  return explained


def _explain_call(call: Callable[..., Any]) -> Callable[..., Any]:
  """Raises a clear error if arguments are missing, as when a layer gets an instance."""

  @functools.wraps(call)
  def explained(self: Any, *args: Any, **kwargs: Any) -> Any:
    try:
      inspect.signature(call).bind(self, *args, **kwargs)
    except TypeError as error:
      name, (operands, option) = type(self).__name__, _usage(self)
      raise TypeError(
        f"{name}: the module must be called as {name}()({operands}); got a call with {error}. In a "
        f"layer, pass the class, {option}={name}, not an instance."
      ) from None
    return call(self, *args, **kwargs)

  return explained


def _usage(module: Any) -> tuple[str, str]:
  """Returns the arguments of a module's call, and the option by which layers take its class."""
  names = [*inspect.signature(type(module).__call__).parameters][1:4]
  return ", ".join(names), "dot_general_cls" if "dimension_numbers" in names else "einsum_cls"


@dataclasses.dataclass(frozen=True)
class Call:
  """One call of a contraction module, in the same form for ``dot_general`` and ``einsum``.

  Attributes:
    plan: the plan of the contraction.
    input: the input operand of the contraction.
    kernel: the kernel operand of the contraction.
    rhs: the kernel as passed to the module.
    reduction: einsum equation that computes ``kernel`` from ``rhs``; None if they are the same.
    permutation: permutation of the axes of the contraction's result.
  """

  plan: Plan
  input: jax.Array
  kernel: jax.Array
  rhs: jax.Array
  reduction: str | None
  permutation: tuple[int, ...]

  @classmethod
  def of(cls, module: Any, args: Any, kwargs: Any) -> Call:
    """Creates the description from the arguments of a call."""
    given = arguments(module, args, kwargs)
    lhs, rhs = jnp.asarray(given["lhs"]), jnp.asarray(given["rhs"])
    preferred = given.get("preferred_element_type")
    if module.result_like_kernel:
      preferred = preferred or rhs.dtype
    asked = given.get("out_sharding")
    how = {
      "preferred_element_type": preferred,
      "out_sharding": getattr(module, "out_sharding", None) if asked is None else asked,
    }
    name, equation = type(module).__name__, given.get("equation", given.get("eqn"))
    if equation is None:
      plan = plan_dot_general(name, module.recipe, lhs, rhs, given["dimension_numbers"], **how)
      return cls(plan, lhs, rhs, rhs, None, tuple(range(len(plan.fprop.gemm.shape))))
    parts = plan_einsum(name, module.recipe, equation, lhs, rhs, **how)
    first, second = parts.operands
    x, kernel = (second, first) if parts.plan.kernel_is_left else (first, second)
    return cls(parts.plan, x, kernel, rhs, parts.kernel_reduction, parts.permutation)

  def without_arrays(self) -> Call:
    """Returns the call without its operands, so that it can outlive the trace."""
    rhs: Any = jax.ShapeDtypeStruct(self.rhs.shape, self.rhs.dtype)
    return dataclasses.replace(self, input=rhs, kernel=rhs, rhs=rhs)

  def takes_kernel_as(self, other: Any) -> bool:
    """Returns whether this call can use the kernel stored for another call or frozen layer."""
    own, theirs = (kernel_operand(each.plan) for each in (self, other))
    same_view = (own.views[0], own.dtype) == (theirs.views[0], theirs.dtype)
    return same_view and (self.dtype, self.reduction) == (other.dtype, other.reduction)

  @property
  def dtype(self) -> Any:
    """Dtype of the kernel before quantization."""
    return self.rhs.dtype

  def finish(self, out: jax.Array) -> jax.Array:
    """Converts the result of the contraction to the result of the module."""
    return lax.transpose(out, self.permutation)


def arguments(module: Any, args: Any, kwargs: Any) -> dict[str, Any]:
  """Returns the arguments of a module's call by name."""
  return dict(inspect.signature(type(module).__call__).bind(module, *args, **kwargs).arguments)


def blank(tree: Any) -> Any:
  """Replaces arrays by zeros, so that a traced program does not read them."""
  is_array = lambda x: isinstance(x, jax.Array | np.ndarray)
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if is_array(x) else x, tree)
