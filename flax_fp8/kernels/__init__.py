"""Pallas kernels for NVIDIA's GPUs, each beside the plain JAX that it must agree with bit for bit.

``choice`` says where they run, and ``dispatch`` has them run there; ``scales`` computes the scales
of delayed scaling, ``cast`` quantises a tensor in the two layouts that FP8 GEMMs read.
"""
