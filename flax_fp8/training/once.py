"""Quantizes kernels once for all microbatches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.core

from flax_fp8 import _compat
from flax_fp8.ops import saved

_OF_KERNELS = jax.checkpoint_policies.save_only_these_names(*saved.OF_KERNELS)


def kernels_first(
  fun: Callable[[Any, Any], Any], variables: Any, microbatch: Any
) -> Callable[[Any], Any]:
  """Splits ``fun(variables, microbatch)`` so that kernels are quantized before the loop.

  Values that depend on ``variables`` only, and that have one of the checkpoint names
  ``ops.saved.OF_KERNELS``, are computed here. The returned function computes the rest.

  Args:
    fun: differentiates a model.
    variables: first argument of ``fun``.
    microbatch: example of the second argument.

  Returns:
    A function equal to ``lambda microbatch: fun(variables, microbatch)``. It does not quantize
    kernels that are parameters.
  """
  traced, shapes = jax.make_jaxpr(fun, return_shape=True)(variables, microbatch)
  closed_over, known = len(traced.consts), [*traced.consts, *jax.tree.leaves(variables)]
  unknown = jax.tree.leaves(microbatch)
  evaluate = lambda *args: jax.core.eval_jaxpr(
    traced.jaxpr, args[:closed_over], *args[closed_over:]
  )
  whole = jax.make_jaxpr(evaluate)(*known, *unknown)
  once, rest = _compat.split_jaxpr(whole.jaxpr, len(known), len(unknown), _OF_KERNELS)
  kept = jax.core.eval_jaxpr(once, whole.consts, *known)

  def then(microbatch: Any) -> Any:
    leaves = jax.tree.leaves(microbatch)
    out = jax.core.eval_jaxpr(rest, whole.consts, *kept, *known, *leaves)
    return jax.tree.unflatten(jax.tree.structure(shapes), out)

  return then
