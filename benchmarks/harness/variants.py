"""What is compared: BF16, ``flax.linen.fp8_ops``, and the recipes of this package."""

import dataclasses
import functools
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
from flax.linen import fp8_ops as flax_fp8_ops

import flax_fp8 as fp8
from harness.names import BF16, BLOCK, FLAX

Fused: TypeAlias = Literal["joint", "separate"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
  """How GEMMs are computed; BF16 without ``recipe`` and ``flax``."""

  recipe: fp8.Recipe | None = None  # of this package
  flax: bool = False  # compute them with ``flax.linen.fp8_ops``
  # make one layer of query, key and value, and one of gate and up; its kernel's scales
  fused: Fused = None
  emulate: bool = False  # allow a described GPU that lacks the recipe's formats
  history: int = 1024  # amaxes that ``flax.linen.fp8_ops`` keeps
  param_dtype: Any = jnp.bfloat16

  @property
  def is_fp8(self) -> bool:
    return self.flax or self.recipe is not None

  @property
  def dtypes(self) -> dict[str, Any]:
    """What modules take."""
    return {"dtype": jnp.bfloat16, "param_dtype": self.param_dtype}

  @property
  def in_float32(self) -> "Variant":
    """The same with float32 parameters."""
    return dataclasses.replace(self, param_dtype=jnp.float32)

  @property
  def dot_general_cls(self) -> Any:
    """What ``nn.Dense`` takes; None for BF16."""
    if self.flax:
      return functools.partial(flax_fp8_ops.Fp8DotGeneral, amax_history_length=self.history)
    if self.recipe is None:
      return None
    return functools.partial(fp8.Fp8DotGeneral, recipe=self.recipe, emulate=self.emulate)


RECIPES = {
  "delayed": Variant(recipe=fp8.DelayedScaling()),
  "current": Variant(recipe=fp8.Float8CurrentScaling()),
  "rowwise": Variant(recipe=fp8.Float8RowwiseScaling()),
}
# What benchmarks on a GPU time. ``block`` has kernels for Hopper alone.
VARIANTS = {
  BF16: Variant(),
  **RECIPES,
  BLOCK: Variant(recipe=fp8.Float8BlockScaling()),
  FLAX: Variant(flax=True),
}
# What needs another GPU.
OTHERS = {"mxfp8": Variant(recipe=fp8.MXFP8BlockScaling(), emulate=True)}
FUSED = {
  f"{name}, fused": dataclasses.replace(each, fused="joint")
  for name, each in VARIANTS.items()
  if name != FLAX
}
