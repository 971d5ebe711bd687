"""Kernels for NVIDIA GPUs, each beside the plain JAX that it must equal."""

from flax_fp8.kernels.call import use_kernels

__all__ = ["use_kernels"]
