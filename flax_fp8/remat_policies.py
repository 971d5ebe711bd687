"""Policies of ``jax.checkpoint`` and ``nn.remat`` that know what FP8 contractions save.

A contraction names what it saves: ``fp8_input`` and ``fp8_kernel``, one byte an element;
``fp8_scalars``, new states; ``fp8_output``, or ``fp8_batched_output`` with batch axes, its result.
To policies of JAX's own, a contraction in FP8 is no ``dot_general``: under
``jax.checkpoint_policies.dots_saveable`` its result is computed again. Those here save it.
"""

from __future__ import annotations

import jax

from flax_fp8.ops import saved

__all__ = ["dots_saveable", "dots_with_no_batch_dims_saveable", "save_fp8_inputs"]

_jax = jax.checkpoint_policies
_named = _jax.save_only_these_names

# Results of matrix products, in the dtype of the computation, as in high precision.
dots_saveable = _jax.save_from_both_policies(
  _jax.dots_saveable, _named(saved.OUTPUT, saved.BATCHED_OUTPUT)
)

# Results of matrix products without batch axes: of projections, not of attention.
dots_with_no_batch_dims_saveable = _jax.save_from_both_policies(
  _jax.dots_with_no_batch_dims_saveable, _named(saved.OUTPUT)
)

# Inputs of FP8 contractions, in FP8: neither norms, activations nor attention before a contraction
# are computed again for it, and inputs are quantised once.
save_fp8_inputs = _named(saved.INPUT, saved.SCALARS)
