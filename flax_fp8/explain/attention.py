"""Counts the FLOPs of cuDNN's fused attention from its call in a compiled program."""

from __future__ import annotations

from fractions import Fraction

from flax_fp8.explain.hlo import Instruction, Module, product

_TARGET = "__cudnn$fmha"
# Matrix products with all scores: query by key and scores by value. The backward pass computes the
# scores again, and has two products for the gradients of each of the two.
_FORWARD, _BACKWARD = 2, 5


def flops(module: Module, call: Instruction) -> int:
  """Returns the FLOPs of one run of an attention call; 0 for other instructions.

  ``2 * products * batch * heads * queries * keys * head_dim``, times the share of the scores that
  the mask keeps: a causal mask keeps half of them, and a sliding window at most ``window / keys``.

  Args:
    module: the program.
    call: an instruction of it.

  Returns:
    FLOPs of the matrix units. Softmax and dropout do not count.

  References:
    Dao, FlashAttention-2, https://arxiv.org/abs/2307.08691, section 4.1; XLA,
    ``xla/service/gpu/backend_configs.proto``, ``CudnnfMHABackendConfig``.
  """
  config = call.config.get("cudnn_fmha_backend_config", {})
  scores = config.get("intermediate_tensor_shape", {}).get("dimensions", ())
  if not scores or not call.target.startswith(_TARGET):
    return 0
  scores = tuple(int(dim) for dim in scores)
  head_dim = module.operands(call)[0].array.dims[-1]
  products = _BACKWARD if "Backward" in call.target else _FORWARD
  return int(2 * products * product(scores) * head_dim * _kept(config, scores[-1]))


def _kept(config: dict[str, str], keys: int) -> Fraction:
  """Returns the share of the scores that a mask keeps."""
  causal = Fraction(1, 2 if "CAUSAL" in config.get("mask_type", "") else 1)
  window = int(config.get("sliding_window_length", 0))
  return min(causal, Fraction(window, keys)) if window else causal
