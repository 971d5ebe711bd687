"""FP8 contractions as functions of arrays and state, without modules or variables."""

from flax_fp8.ops.dot_general import dot_general, init_state
from flax_fp8.ops.einsum import einsum

__all__ = ["dot_general", "einsum", "init_state"]
