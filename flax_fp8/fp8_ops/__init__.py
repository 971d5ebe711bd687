"""A drop-in replacement for ``flax.linen.fp8_ops``.

Replace ``from flax.linen import fp8_ops`` by ``from flax_fp8 import fp8_ops``. Signatures, class
names and variables are those of Flax, so its checkpoints load. Arithmetic and state updates are
those of ``flax_fp8``.
"""

from flax_fp8.fp8_ops.dots import (
  dot_general_transpose_lhs,
  dot_general_transpose_rhs,
  dot_general_with_precision,
  dot_general_with_precision_jvp,
  fp8_scaled_dot_general,
  quantized_dot,
  quantized_dot_bwd,
  quantized_dot_fwd,
)
from flax_fp8.fp8_ops.in_out import (
  in_q,
  in_q_bwd,
  in_q_fwd,
  in_qdq,
  in_qdq_bwd,
  in_qdq_fwd,
  out_dq,
  out_dq_bwd,
  out_dq_fwd,
  out_qdq,
  out_qdq_bwd,
  out_qdq_fwd,
)
from flax_fp8.fp8_ops.modules import (
  DType,
  Fp8DirectDotGeneralOp,
  Fp8DotGeneral,
  Fp8DotGeneralBase,
  Fp8DotGeneralOp,
  Fp8Einsum,
  NANOOFp8DotGeneralOp,
)
from flax_fp8.fp8_ops.quantization import (
  compute_amax_history,
  compute_scale,
  dequantize,
  get_fp8_max,
  qdq,
  quantize,
  quantize_dequantize_update,
  update_fp8_meta,
)
from flax_fp8.linen.state import OVERWRITE_WITH_GRADIENT
from flax_fp8.meta_dtype import MaxGradDType, MaxGradRules, fp32_max_grad, max_grad

CAN_USE_EARRAY = True
Fp8MetaTyRules = MaxGradRules
fp8_meta_dtype = max_grad
fp8_meta_dtype_wrapper = MaxGradDType
fm32 = fp32_max_grad

__all__ = [
  "CAN_USE_EARRAY",
  "DType",
  "Fp8DirectDotGeneralOp",
  "Fp8DotGeneral",
  "Fp8DotGeneralBase",
  "Fp8DotGeneralOp",
  "Fp8Einsum",
  "Fp8MetaTyRules",
  "NANOOFp8DotGeneralOp",
  "OVERWRITE_WITH_GRADIENT",
  "compute_amax_history",
  "compute_scale",
  "dequantize",
  "dot_general_transpose_lhs",
  "dot_general_transpose_rhs",
  "dot_general_with_precision",
  "dot_general_with_precision_jvp",
  "fm32",
  "fp32_max_grad",
  "fp8_meta_dtype",
  "fp8_meta_dtype_wrapper",
  "fp8_scaled_dot_general",
  "get_fp8_max",
  "in_q",
  "in_q_bwd",
  "in_q_fwd",
  "in_qdq",
  "in_qdq_bwd",
  "in_qdq_fwd",
  "out_dq",
  "out_dq_bwd",
  "out_dq_fwd",
  "out_qdq",
  "out_qdq_bwd",
  "out_qdq_fwd",
  "qdq",
  "quantize",
  "quantize_dequantize_update",
  "quantized_dot",
  "quantized_dot_bwd",
  "quantized_dot_fwd",
  "update_fp8_meta",
]
