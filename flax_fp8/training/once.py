"""What is the same for every microbatch, computed once: kernels in FP8, and their scales."""

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
  """Quantises the kernels among variables, for every microbatch that comes.

  ``fun(variables, microbatch)`` in two parts: what of it has a name of ``ops.saved`` for kernels
  and scalars and hangs on ``variables`` alone is computed here; all the rest is as ever.

  Args:
    fun: differentiates a model.
    variables: the first argument.
    microbatch: an example of the second.

  Returns:
    ``lambda microbatch: fun(variables, microbatch)``, which quantises no kernel that is a
    parameter.
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
