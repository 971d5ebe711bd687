"""Linen modules in FP8."""

from flax_fp8.linen.dot_general import Fp8DotGeneral, Fp8Einsum

__all__ = ["Fp8DotGeneral", "Fp8Einsum"]
