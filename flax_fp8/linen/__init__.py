"""Linen modules in FP8."""

from flax_fp8.linen.dot_general import Fp8DotGeneral, Fp8Einsum
from flax_fp8.linen.fused import Fp8FusedQKV, Fp8SwiGLU

__all__ = ["Fp8DotGeneral", "Fp8Einsum", "Fp8FusedQKV", "Fp8SwiGLU"]
