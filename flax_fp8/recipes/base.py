"""What a scaling recipe is: what a contraction asks it.

``ops`` knows nothing of granularity. It hands a recipe each operand together with the two views
that its GEMMs have of it, takes back one ``QTensor`` a GEMM (the same one twice where scales are
per tensor, two where they run along rows or blocks), and asks the recipe to multiply them.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import functools
import pkgutil
from collections.abc import Callable
from typing import Any, Literal, NoReturn, TypeAlias, final, get_args

import jax
import numpy as np

from flax_fp8 import fields
from flax_fp8.capability import Needs
from flax_fp8.contraction import Gemm, View
from flax_fp8.formats import Float8, Format
from flax_fp8.quantize import QTensor

TensorState: TypeAlias = dict[str, jax.Array]
GemmName: TypeAlias = Literal["fprop", "dgrad", "wgrad"]
Rounding: TypeAlias = Literal["nearest", "stochastic"]


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(abc.ABC):
  """How tensors are quantized for the three GEMMs of a contraction, and what state that needs.

  Implementations are frozen dataclasses: hashable, compared by value, safe to pickle, static under
  ``jax.jit``. Each is final; a new recipe is a new file beside this one.

  Attributes:
    fp8_format: formats of values and of gradients.
    high_precision: which of the GEMMs "fprop", "dgrad" and "wgrad" are left in the dtype of their
      operands; their operands are then kept in it for the backward pass.
    grad_rounding: "nearest", or "stochastic" for output gradients; this needs PRNG keys, in Linen
      those of the collection ``sr_rng``.

  Raises:
    TypeError: ``fp8_format`` is no ``Format``.
    ValueError: ``high_precision`` names another GEMM, or all three; ``grad_rounding`` is unknown.
  """

  fp8_format: Format = Format.HYBRID
  high_precision: tuple[GemmName, ...] = ()
  grad_rounding: Rounding = "nearest"

  def __post_init__(self) -> None:
    name = type(self).__name__
    if not isinstance(self.fp8_format, Format):
      raise TypeError(
        f"{name}: fp8_format must be a Format; got fp8_format={fields.show(self.fp8_format)}. Pass "
        "Format.HYBRID, Format.E4M3, or Format(forward, backward)."
      )
    names = get_args(GemmName)
    given = self.high_precision
    wanted = tuple(given) if isinstance(given, (tuple, list, set, frozenset)) else (given,)
    known = all(isinstance(gemm, str) and gemm in names for gemm in wanted)
    if not known or len(set(wanted)) == len(names):
      raise ValueError(
        f"{name}: high_precision must name at most two of {names}; got "
        f"high_precision={fields.show(given)}. To leave all three in high precision, leave the "
        "layer out of FP8."
      )
    in_order: Any = tuple(gemm for gemm in names if gemm in wanted)
    object.__setattr__(self, "high_precision", in_order)
    fields.choice(name, "grad_rounding", self.grad_rounding, get_args(Rounding))
    if hasattr(self, "power_of_two"):  # most have it
      flag: Any = getattr(self, "power_of_two")  # noqa: B009 - not of every recipe
      object.__setattr__(self, "power_of_two", fields.flag(name, "power_of_two", flag))

  @final
  def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
    """Raises TypeError: a recipe was passed where Linen calls a module or a function."""
    del args, kwargs
    name = type(self).__name__
    raise TypeError(
      f"{name} is a recipe, not a module; got {name}(...) where a module or a function is called. "
      "Pass dot_general_cls=recipe.dot_general_cls, or for an einsum recipe.einsum_cls."
    )

  @abc.abstractmethod
  def init_state(self, role: Role) -> dict[str, np.ndarray]:
    """Returns the state of a tensor that was never seen; ``{}`` if the recipe remembers nothing.

    All leaves are float32. Linen keeps each as the variable ``{role}_{key}``. A contraction accepts
    no state of other keys or shapes.
    """

  @abc.abstractmethod
  def quantize(
    self,
    x: jax.Array,
    state: TensorState,
    role: Role,
    views: tuple[View, View],
    key: jax.Array | None = None,
    *,
    observed: bool = True,
  ) -> tuple[tuple[QTensor, QTensor], TensorState]:
    """Quantizes a tensor for the two GEMMs that take it.

    Args:
      x: float32, bfloat16 or float16; any shape.
      state: of this tensor, float32.
      role: what ``x`` is.
      views: how each of its two GEMMs sees ``x``. Input and kernel: fprop, then the backward GEMM
        (wgrad for the input, dgrad for the kernel). Output gradient: the GEMM that gives the left
        operand's gradient, then the right one's. Where one GEMM keeps axes, the other contracts.
      key: PRNG key to round by, or None to round to nearest.
      observed: whether the new state is wanted. Without it, a pass over ``x`` may be spared.

    Returns:
      One ``QTensor`` for each of these GEMMs, and the state for the next step: float32, of the
      structure of ``state``.
    """

  @abc.abstractmethod
  def in_matrices(self, q: QTensor, view: View) -> QTensor:
    """Returns a quantized tensor in the layout that its GEMM sees, without padding.

    ``view.matrices(x) ≈ data * scale``. It moves data, of any dtype, and leaves out what padding
    added. Its transpose, which pads with zeros, lays out other values as ``quantize`` does.

    Args:
      q: as ``quantize`` returned it for one GEMM.
      view: that GEMM's, of the tensor.

    Returns:
      Data and float32 scales, both ``[batch, kept, contracted]``.
    """

  @abc.abstractmethod
  def contract(
    self, lhs: QTensor, rhs: QTensor, gemm: Gemm, kind: GemmKind, dtype: Any
  ) -> jax.Array:
    """Multiplies two quantized tensors.

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
  def float8(self, role: Role) -> Float8:
    """Returns the format of a tensor: gradients have their own."""
    backward = role is Role.OUTPUT_GRAD
    return self.fp8_format.backward if backward else self.fp8_format.forward

  @final
  @property
  def rounds_by_key(self) -> bool:
    """Tells whether the backward pass needs a PRNG key."""
    return self.grad_rounding == "stochastic"

  @final
  def is_high_precision(self, kind: GemmKind) -> bool:
    """Tells whether a GEMM is left in the dtype of its operands."""
    return kind.value in self.high_precision

  @final
  @property
  def dot_general_cls(self) -> Callable[..., Any]:
    """``Fp8DotGeneral`` with this recipe, for ``nn.Dense(n, dot_general_cls=...)``."""
    return _bind("Fp8DotGeneral", self)

  @final
  @property
  def einsum_cls(self) -> Callable[..., Any]:
    """``Fp8Einsum`` with this recipe, to be called for an instance: ``recipe.einsum_cls()``."""
    return _bind("Fp8Einsum", self)


class StatelessRecipe(Recipe):
  """A recipe that remembers nothing: scales come from the values that they scale."""

  @final
  def init_state(self, role: Role) -> dict[str, np.ndarray]:
    """No state."""
    del role
    return {}

  @final
  def quantize(
    self,
    x: jax.Array,
    state: TensorState,
    role: Role,
    views: tuple[View, View],
    key: jax.Array | None = None,
    *,
    observed: bool = True,
  ) -> tuple[tuple[QTensor, QTensor], TensorState]:
    """Quantizes for both GEMMs by the values alone."""
    del observed
    return self.quantize_by_itself(x, role, views, key), state

  @abc.abstractmethod
  def quantize_by_itself(
    self, x: jax.Array, role: Role, views: tuple[View, View], key: jax.Array | None
  ) -> tuple[QTensor, QTensor]:
    """Quantizes a tensor for the two GEMMs that take it; arguments as for ``quantize``."""


class StatefulRecipe(Recipe):
  """A recipe whose scales come from earlier steps, and so are known before the tensor is."""

  @abc.abstractmethod
  def finalize_scale(self, state: TensorState, role: Role) -> TensorState:
    """Returns the state with the scale that the next step would use.

    Args:
      state: of a tensor, float32.
      role: what the tensor is.
    """

  @property
  @abc.abstractmethod
  def frozen(self) -> StatefulRecipe:
    """Returns the recipe of which ``freeze`` makes the state."""

  @abc.abstractmethod
  def freeze(self, state: TensorState) -> TensorState:
    """Returns the least state of ``frozen`` under which the scale is what it would be next."""


def split_key(key: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
  """Makes two keys of one; none of none."""
  if key is None:
    return None, None
  first, second = jax.random.split(key)
  return first, second


@functools.cache
def _bind(module: str, recipe: Recipe) -> Callable[..., Any]:
  """Binds a recipe to a Linen module, once: two models with equal recipes compile once.

  The module lies above this package, which knows nothing of it but its name.
  """
  return functools.partial(pkgutil.resolve_name(f"flax_fp8.linen:{module}"), recipe=recipe)
