"""Policies for ``jax.checkpoint`` and ``nn.remat`` that cover FP8 contractions.

A contraction names the values that it saves: ``fp8_input`` and ``fp8_kernel`` (one byte an
element), ``fp8_scalars`` and ``fp8_amax`` (amaxes and scales), and its result ``fp8_output``
(``fp8_batched_output`` if it has batch axes). JAX's own policies, such as
``jax.checkpoint_policies.dots_saveable``, do not treat an FP8 contraction as a ``dot_general`` and
recompute its result. These policies save it.
"""

from __future__ import annotations

import jax

from flax_fp8.ops import saved
from flax_fp8.quantize import AMAX

__all__ = [
  "dots_saveable",
  "dots_with_no_batch_dims_saveable",
  "save_fp8_inputs",
  "save_fp8_scales",
]

_jax = jax.checkpoint_policies
_named = _jax.save_only_these_names

# Saves results of matrix products, in the dtype of the computation, as in high precision.
dots_saveable = _jax.save_from_both_policies(
  _jax.dots_saveable, _named(saved.OUTPUT, saved.BATCHED_OUTPUT)
)

# Saves results of matrix products without batch axes: projections, but not attention.
dots_with_no_batch_dims_saveable = _jax.save_from_both_policies(
  _jax.dots_with_no_batch_dims_saveable, _named(saved.OUTPUT)
)

# Saves the FP8 inputs of contractions. The backward pass does not recompute the norms, activations
# or attention before a contraction to get its input, and inputs are quantized only once.
save_fp8_inputs = _named(saved.INPUT, saved.SCALARS, AMAX)

# Saves only the amaxes that scales of the same step come from: a float for each tensor, or for each
# of its rows. The backward pass recomputes everything else, but reads no tensor again for its amax.
# Recipes with state need no amax to quantize, and block scaling's kernel reads a tensor once. So
# this saves nothing of theirs.
save_fp8_scales = _named(AMAX)
