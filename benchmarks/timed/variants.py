"""What is compared: BF16, Flax's FP8, and the recipes of this package."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import fp8_ops as flax_fp8_ops

import flax_fp8 as fp8
from timed.programs import Program, argument_shapes, forward_and_backward, repeated

BF16 = "BF16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
  """How GEMMs are computed.

  Attributes:
    recipe: of this package; None for BF16 or Flax.
    flax: by ``flax.linen.fp8_ops``.
    fused: one layer of query, key and value, and one of gate and up.
  """

  recipe: fp8.Recipe | None = None
  flax: bool = False
  fused: bool = False

  @property
  def is_fp8(self) -> bool:
    """Whether GEMMs are to be FP8."""
    return self.flax or self.recipe is not None

  @property
  def dot_general_cls(self) -> Any:
    """What ``nn.Dense`` takes; None for BF16."""
    if self.flax:
      return flax_fp8_ops.Fp8DotGeneral
    return None if self.recipe is None else self.recipe.dot_general_cls

  def dense(self, features: int, name: str | None = None) -> nn.Dense:
    """A layer of which all is bfloat16."""
    return nn.Dense(
      features,
      use_bias=False,
      dtype=jnp.bfloat16,
      param_dtype=jnp.bfloat16,
      dot_general_cls=self.dot_general_cls,
      name=name,
    )

  def program(
    self, module: nn.Module, x: jax.ShapeDtypeStruct, *, repeat: int, flops: int
  ) -> Program:
    """The loop of forward and backward of a module."""
    step = forward_and_backward(module, max_grad=not self.flax)
    shapes = argument_shapes(module, x)
    return Program(repeated(step, repeat), shapes, repeat, flops, self.is_fp8)


RECIPES = {
  "delayed": Variant(recipe=fp8.DelayedScaling()),
  "current": Variant(recipe=fp8.Float8CurrentScaling()),
  "rowwise": Variant(recipe=fp8.Float8RowwiseScaling()),
}
VARIANTS = {
  BF16: Variant(),
  **RECIPES,
  "flax.linen.fp8_ops": Variant(flax=True),
}
