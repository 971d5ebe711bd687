"""What a scaling recipe is: four questions that the contraction asks it.

``ops`` knows nothing of granularity. It hands a recipe each operand together with the axes along
which its two GEMMs contract it, takes back one ``QTensor`` a GEMM (the same one twice where scales
are per tensor, two where they run along rows or blocks), and asks the recipe to multiply them.
"""

from __future__ import annotations

import abc
import enum
import functools
from collections.abc import Callable
from typing import Any, TypeAlias, final

import jax
import numpy as np

from flax_fp8.capability import Needs
from flax_fp8.contraction import Axes, Gemm
from flax_fp8.quantize import QTensor

TensorState: TypeAlias = dict[str, jax.Array]


class Role(enum.Enum):
  """What a tensor is to a contraction; the value is the prefix of its state variables."""

  INPUT = "input"
  KERNEL = "kernel"
  OUTPUT_GRAD = "output_grad"


class GemmKind(enum.Enum):
  """The three GEMMs of a training step."""

  FPROP = "fprop"
  DGRAD = "dgrad"
  WGRAD = "wgrad"


class Recipe(abc.ABC):
  """How tensors are quantised for the three GEMMs of a contraction, and what state that needs.

  Implementations are frozen dataclasses: hashable, compared by value, safe to pickle, static under
  ``jax.jit``. Each is final; a new recipe is a new file beside this one.
  """

  @abc.abstractmethod
  def init_state(self, role: Role) -> dict[str, np.ndarray]:
    """Returns the state of a tensor that was never seen; ``{}`` if the recipe remembers nothing.

    All leaves are float32. Linen keeps each as the variable ``{role}_{key}``. A contraction accepts
    no state of other keys or shapes.
    """

  @abc.abstractmethod
  def quantize(
    self, x: jax.Array, state: TensorState, role: Role, contracting: tuple[Axes, Axes]
  ) -> tuple[tuple[QTensor, QTensor], Any]:
    """Quantises a tensor for the two GEMMs that take it.

    Args:
      x: float32, bfloat16 or float16; any shape.
      state: of this tensor, float32.
      role: what ``x`` is.
      contracting: the axes of ``x`` that each of its two GEMMs contracts. Input and kernel: fprop,
        then the backward GEMM (wgrad for the input, dgrad for the kernel). Output gradient: the
        GEMM that gives the left operand's gradient, then the right one's.

    Returns:
      One ``QTensor`` for each of these GEMMs, and an observation: a pytree of small arrays that
      ``update`` takes.
    """

  @abc.abstractmethod
  def update(self, state: TensorState, observation: Any, role: Role) -> TensorState:
    """Returns the state for the next step, float32, of the structure of ``state``."""

  @abc.abstractmethod
  def contract(
    self, lhs: QTensor, rhs: QTensor, gemm: Gemm, kind: GemmKind, dtype: Any
  ) -> jax.Array:
    """Multiplies two quantised tensors.

    Args:
      lhs: left operand, as ``quantize`` returned it for this GEMM.
      rhs: right operand; the same.
      gemm: dimension numbers, and the transposition of the result.
      kind: which of the three GEMMs this is.
      dtype: of the result.

    Returns:
      The product, scaled in float32, transposed, and cast to ``dtype``.
    """

  @property
  @abc.abstractmethod
  def needs(self) -> Needs:
    """Returns the formats, and the scales of blocks if any, that a device must multiply."""

  @final
  @property
  def dot_general_cls(self) -> Callable[..., Any]:
    """``Fp8DotGeneral`` with this recipe, for ``nn.Dense(n, dot_general_cls=...)``."""
    return _bind("dot_general_cls", self)

  @final
  @property
  def einsum_cls(self) -> Callable[..., Any]:
    """``Fp8Einsum`` with this recipe, to be called for an instance: ``recipe.einsum_cls()``."""
    return _bind("einsum_cls", self)


# Recipes lie below Linen and must not import it. The modules enter themselves here.
_MODULES: dict[str, Callable[..., Any]] = {}


def register_module(name: str, module: Callable[..., Any]) -> None:
  """Names the Linen module that ``Recipe.dot_general_cls`` or ``Recipe.einsum_cls`` binds."""
  _MODULES[name] = module


@functools.cache
def _bind(name: str, recipe: Recipe) -> Callable[..., Any]:
  """Binds once a recipe, so that two models with equal recipes are equal and compile once."""
  return functools.partial(_MODULES[name], recipe=recipe)
