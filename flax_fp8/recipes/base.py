"""Defines the interface of a scaling recipe.

``ops`` does not depend on the granularity of scales. It passes each operand to the recipe, with the
views of the operand's two GEMMs. The recipe returns one ``QTensor`` for each GEMM: the same one
twice for per-tensor scales, two different ones for scales along rows or blocks. ``ops`` then asks
the recipe to multiply them.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import functools
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NoReturn, TypeAlias, final, get_args

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
  """The role of a tensor in a contraction. The value is the prefix of its state variables."""

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
  """The base class of recipes, which quantize the tensors of a contraction's three GEMMs.

  Recipes are frozen dataclasses: hashable, compared by value, picklable, and static under
  ``jax.jit``. Each recipe class is final and has its own file.

  Attributes:
    fp8_format: formats of values and of gradients.
    high_precision: which of the GEMMs "fprop", "dgrad" and "wgrad" compute in the dtype of their
      operands. The backward pass then saves their operands in this dtype.
    grad_rounding: "nearest", or "stochastic" for output gradients. Stochastic rounding needs PRNG
      keys; in Linen, the RNG stream ``sr_rng``.

  Raises:
    TypeError: ``fp8_format`` is not a ``Format``.
    ValueError: ``high_precision`` names an unknown GEMM or all three, or ``grad_rounding`` is
      unknown.

  Example:
    >>> import flax_fp8 as fp8
    >>> recipe = fp8.get_recipe("current", high_precision=("wgrad",))
    >>> isinstance(recipe, fp8.Recipe)
    True
  """

  # Whether quantized data is in matrices, ``[batch, kept, contracted]``, and not as the tensor was.
  in_gemm_layout: ClassVar[bool] = False

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
        f"high_precision={fields.show(given)}. To keep all three in high precision, exclude the "
        "layer from FP8."
      )
    in_order: Any = tuple(gemm for gemm in names if gemm in wanted)
    object.__setattr__(self, "high_precision", in_order)
    fields.choice(name, "grad_rounding", self.grad_rounding, get_args(Rounding))
    if hasattr(self, "power_of_two"):  # all recipes but MXFP8BlockScaling
      flag: Any = getattr(self, "power_of_two")  # noqa: B009 - not a field of every recipe
      object.__setattr__(self, "power_of_two", fields.flag(name, "power_of_two", flag))

  @final
  def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
    """Raises TypeError, since Linen calls a module or a function here."""
    del args, kwargs
    name = type(self).__name__
    raise TypeError(
      f"{name} is a recipe, not a module; got {name}(...) called as a module or a function. "
      "Pass dot_general_cls=recipe.dot_general_cls, or recipe.einsum_cls for an einsum."
    )

  @abc.abstractmethod
  def init_state(self, role: Role) -> dict[str, np.ndarray]:
    """Returns the initial state of a tensor; ``{}`` if the recipe is stateless.

    All leaves are float32. Linen stores each as the variable ``{role}_{key}``. A contraction
    rejects state with other keys or shapes.
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
      state: state of this tensor; float32.
      role: role of ``x``.
      views: the views of the two GEMMs that take ``x``. For an input or kernel: fprop, then the
        backward GEMM (wgrad for the input, dgrad for the kernel). For an output gradient: the GEMM
        of the left operand's gradient, then the right operand's. The axes that one GEMM keeps are
        the axes that the other contracts.
      key: PRNG key for stochastic rounding, or None to round to nearest.
      observed: whether to compute the new state. If False, a pass over ``x`` may be skipped.

    Returns:
      One ``QTensor`` for each of the two GEMMs, and the state for the next step; float32, with the
      structure of ``state``.
    """

  @abc.abstractmethod
  def in_matrices(self, q: QTensor, view: View) -> QTensor:
    """Returns a quantized tensor in the layout that its GEMM sees, without padding.

    ``view.matrices(x) ≈ data * scale``. The method only moves data of any dtype and removes
    padding. Its linear transpose pads with zeros and gives the layout of ``quantize``.

    Args:
      q: the result of ``quantize`` for one GEMM.
      view: the view of this GEMM.

    Returns:
      Data and float32 scales, both ``[batch, kept, contracted]``.
    """

  @abc.abstractmethod
  def contract(
    self, lhs: QTensor, rhs: QTensor, gemm: Gemm, kind: GemmKind, dtype: Any
  ) -> jax.Array:
    """Multiplies two quantized tensors.

    Args:
      lhs: left operand; the result of ``quantize`` for this GEMM.
      rhs: right operand; the result of ``quantize`` for this GEMM.
      gemm: dimension numbers, and the transposition of the result.
      kind: fprop, dgrad or wgrad.
      dtype: dtype of the result.

    Returns:
      The product, scaled in float32, transposed, and cast to ``dtype``.
    """

  @property
  @abc.abstractmethod
  def needs(self) -> Needs:
    """The formats, and block scales if any, that a device must support."""

  @final
  def float8(self, role: Role) -> Float8:
    """Returns the format for a role. Gradients have their own format."""
    backward = role is Role.OUTPUT_GRAD
    return self.fp8_format.backward if backward else self.fp8_format.forward

  @final
  @property
  def rounds_by_key(self) -> bool:
    """Whether the backward pass needs a PRNG key."""
    return self.grad_rounding == "stochastic"

  @final
  def is_high_precision(self, kind: GemmKind) -> bool:
    """Tells whether a GEMM computes in the dtype of its operands."""
    return kind.value in self.high_precision

  @final
  @property
  def dot_general_cls(self) -> Callable[..., Any]:
    """``Fp8DotGeneral`` with this recipe, for ``nn.Dense(n, dot_general_cls=...)``."""
    return _bind("Fp8DotGeneral", self)

  @final
  @property
  def einsum_cls(self) -> Callable[..., Any]:
    """``Fp8Einsum`` with this recipe. Call it to make an instance: ``recipe.einsum_cls()``."""
    return _bind("Fp8Einsum", self)


class StatelessRecipe(Recipe):
  """A recipe without state: scales come from the values that they scale."""

  @final
  def init_state(self, role: Role) -> dict[str, np.ndarray]:
    """Returns no state."""
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
    """Quantizes for both GEMMs without state."""
    del observed
    return self.quantize_by_itself(x, role, views, key), state

  @abc.abstractmethod
  def quantize_by_itself(
    self, x: jax.Array, role: Role, views: tuple[View, View], key: jax.Array | None
  ) -> tuple[QTensor, QTensor]:
    """Quantizes a tensor for the two GEMMs that take it. Arguments are as for ``quantize``."""


class StatefulRecipe(Recipe):
  """A recipe with state: scales come from earlier steps and are known before the tensor.

  A contraction first prepares the scales of all its tensors, then quantizes each tensor, and
  records all of them at the end. The states of several tensors are keyed by the values of ``Role``.
  """

  @abc.abstractmethod
  def prepare(self, state: Mapping[str, TensorState]) -> dict[str, TensorState]:
    """Returns what quantization needs to know of each state. It does not depend on the tensors.

    Args:
      state: states of one or more tensors; float32.
    """

  @abc.abstractmethod
  def quantize_prepared(
    self,
    x: jax.Array,
    state: TensorState,
    prepared: TensorState,
    role: Role,
    key: jax.Array | None,
    *,
    observed: bool,
  ) -> tuple[QTensor, TensorState]:
    """Quantizes a tensor once for both of its GEMMs.

    Args:
      x: float32, bfloat16 or float16; any shape.
      state: state of this tensor; float32. Its batching and sharding say what the tensor is.
      prepared: what ``prepare`` returned for this tensor.
      role: role of ``x``.
      key: PRNG key for stochastic rounding, or None to round to nearest.
      observed: whether to observe the tensor. If False, a pass over ``x`` may be skipped.

    Returns:
      The ``QTensor``, and what ``record`` needs to know of the tensor; ``{}`` if not observed.
    """

  @abc.abstractmethod
  def record(
    self, state: Mapping[str, TensorState], seen: Mapping[str, TensorState]
  ) -> dict[str, TensorState]:
    """Returns the states for the next step.

    Args:
      state: states of one or more tensors; float32.
      seen: what ``quantize_prepared`` observed of each tensor.
    """

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
    """Prepares, quantizes and records one tensor."""
    del views
    (prepared,) = self.prepare({role.value: state}).values()
    q, seen = self.quantize_prepared(x, state, prepared, role, key, observed=observed)
    if not observed:
      return (q, q), state
    (new,) = self.record({role.value: state}, {role.value: seen}).values()
    return (q, q), new

  @abc.abstractmethod
  def finalize_scale(self, state: TensorState, role: Role) -> TensorState:
    """Returns the state with the scale that the next step would use.

    Args:
      state: state of a tensor; float32.
      role: role of the tensor.
    """

  @property
  @abc.abstractmethod
  def frozen(self) -> StatefulRecipe:
    """The recipe that uses the state from ``freeze``."""

  @abc.abstractmethod
  def freeze(self, state: TensorState) -> TensorState:
    """Returns the smallest state of ``frozen`` that gives the scale of the next step."""


def split_key(key: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
  """Splits a key in two; returns None twice for None."""
  if key is None:
    return None, None
  first, second = jax.random.split(key)
  return first, second


@functools.cache
def _bind(module: str, recipe: Recipe) -> Callable[..., Any]:
  """Binds a recipe to a Linen module. Cached, so models with equal recipes compile once.

  The module is in a higher layer than this package, so it is looked up by name.
  """
  return functools.partial(pkgutil.resolve_name(f"flax_fp8.linen:{module}"), recipe=recipe)
