"""Conversion of unmodified Linen models to FP8: configuration, dry run and converted module."""

from flax_fp8.linen.convert.config import DEFAULT_EXCLUSIONS, Exclusion, Fp8Config
from flax_fp8.linen.convert.linear_layers import fp8_linear_layers
from flax_fp8.linen.convert.patterns import Layer
from flax_fp8.linen.convert.report import ConversionReport

__all__ = [
  "DEFAULT_EXCLUSIONS",
  "ConversionReport",
  "Exclusion",
  "Fp8Config",
  "Layer",
  "fp8_linear_layers",
]
