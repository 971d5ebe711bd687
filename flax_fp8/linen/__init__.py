"""Linen modules in FP8."""

from flax_fp8.linen.convert import ConversionReport, Fp8Config, fp8_linear_layers
from flax_fp8.linen.dot_general import Fp8DotGeneral, Fp8Einsum
from flax_fp8.linen.freeze import freeze_for_inference
from flax_fp8.linen.fused import Fp8FusedQKV, Fp8SwiGLU
from flax_fp8.linen.transforms import cond, scan, vmap

__all__ = [
  "ConversionReport",
  "Fp8Config",
  "Fp8DotGeneral",
  "Fp8Einsum",
  "Fp8FusedQKV",
  "Fp8SwiGLU",
  "cond",
  "fp8_linear_layers",
  "freeze_for_inference",
  "scan",
  "vmap",
]
