"""What modules that contract in FP8 have in common, and one call of such a module."""

from __future__ import annotations

import dataclasses
import inspect
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
  """Base of the modules that are called as ``lax.dot_general`` or ``jnp.einsum``.

  They have a ``recipe``, and name their operands ``lhs`` and ``rhs``.

  Attributes:
    result_like_kernel: whether the result has the dtype of ``rhs`` unless another is asked for.
  """

  result_like_kernel: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class Call:
  """One call of a module that contracts, the same for both kinds of them.

  Attributes:
    plan: of the contraction.
    input: as the contraction takes it.
    kernel: as the contraction takes it.
    rhs: the kernel as the module was given it.
    reduction: einsum equation that makes the one of the other; None where they are the same.
    permutation: transposition of the contraction's result.
  """

  plan: Plan
  input: jax.Array
  kernel: jax.Array
  rhs: jax.Array
  reduction: str | None
  permutation: tuple[int, ...]

  @classmethod
  def of(cls, module: Any, args: Any, kwargs: Any) -> Call:
    """Reads the arguments of a call."""
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
    """Returns the call without its operands, to be kept when a trace is over."""
    rhs: Any = jax.ShapeDtypeStruct(self.rhs.shape, self.rhs.dtype)
    return dataclasses.replace(self, input=rhs, kernel=rhs, rhs=rhs)

  def takes_kernel_as(self, other: Any) -> bool:
    """Tells whether the kernel stored for another call, or a frozen layer, serves this one."""
    own, theirs = (kernel_operand(each.plan) for each in (self, other))
    same_view = (own.views[0], own.dtype) == (theirs.views[0], theirs.dtype)
    return same_view and (self.dtype, self.reduction) == (other.dtype, other.reduction)

  @property
  def dtype(self) -> Any:
    """In which the kernel is multiplied, but for FP8."""
    return self.rhs.dtype

  def finish(self, out: jax.Array) -> jax.Array:
    """Makes of the contraction's result that of the module."""
    return lax.transpose(out, self.permutation)


def arguments(module: Any, args: Any, kwargs: Any) -> dict[str, Any]:
  """Returns the arguments of a call of a module by their names."""
  return dict(inspect.signature(type(module).__call__).bind(module, *args, **kwargs).arguments)


def blank(tree: Any) -> Any:
  """Puts zeros in the place of arrays, which a traced program then does not read."""
  is_array = lambda x: isinstance(x, jax.Array | np.ndarray)
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if is_array(x) else x, tree)
