"""The modules of ``flax.linen.fp8_ops``, with its fields, class names and variables."""

from __future__ import annotations

import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_fp8 import fields, ops
from flax_fp8.formats import Format, float8
from flax_fp8.fp8_ops.dots import dot_general_with_precision, warn_of_precision
from flax_fp8.fp8_ops.in_out import in_qdq, out_qdq
from flax_fp8.linen.contractions import FP8Contraction
from flax_fp8.linen.state import read_recipe_state, read_state
from flax_fp8.ops import check
from flax_fp8.recipes.delayed import DelayedScaling
from flax_fp8.state_cast import cast_once

DType = Any


class Fp8DotGeneralBase(nn.Module):
  """The common fields of Flax's FP8 modules.

  Attributes:
    amax_history_length: number of recorded amaxes per tensor.
    e4m3_dtype: FP8 dtype of inputs and kernels.
    e5m2_dtype: FP8 dtype of output gradients.

  Raises:
    ValueError: a dtype is not an FP8 dtype, or the length is below 1.

  Example:
    >>> from flax_fp8 import fp8_ops
    >>> fp8_ops.Fp8DotGeneralBase().amax_history_length
    1024

  References:
    flax.linen.fp8_ops.Fp8DotGeneralBase.
  """

  amax_history_length: int = 1024
  e4m3_dtype: DType = jnp.float8_e4m3fn
  e5m2_dtype: DType = jnp.float8_e5m2

  @property
  def recipe(self) -> DelayedScaling:
    """The recipe with these fields."""
    name = type(self).__name__
    dtypes = {field: getattr(self, field) for field in ("e4m3_dtype", "e5m2_dtype")}
    fp8_format = Format(*(float8(x, f"{name}: {field}") for field, x in dtypes.items()))
    advice = "Flax's default is 1024."
    length = fields.integer(name, "amax_history_length", self.amax_history_length, advice)
    return DelayedScaling(amax_history_len=length, fp8_format=fp8_format)


class Fp8DirectDotGeneralOp(FP8Contraction, Fp8DotGeneralBase):
  """``flax_fp8.Fp8DotGeneral`` with the fields and the class name of Flax.

  Attributes:
    amax_history_length: number of recorded amaxes per tensor.
    e4m3_dtype: FP8 dtype of inputs and kernels. Flax ignores this field.
    e5m2_dtype: FP8 dtype of output gradients. Flax ignores this field.

  Raises:
    TypeError: as ``flax_fp8.Fp8DotGeneral``.
    ValueError: as ``flax_fp8.Fp8DotGeneral``, except for ``precision`` and the device. A given
      ``precision`` is ignored with a warning.

  Numerics:
    As ``flax_fp8.Fp8DotGeneral``, but the result has the dtype of ``rhs``. A device that cannot
    multiply the dtypes computes in a wider type, with a warning.

  Example:
    >>> import flax.linen as nn
    >>> from flax_fp8 import fp8_ops
    >>> layer = nn.Dense(4, dot_general_cls=fp8_ops.Fp8DotGeneral)

  References:
    flax.linen.fp8_ops.Fp8DirectDotGeneralOp.
  """

  result_like_kernel = True

  @nn.compact
  def __call__(
    self,
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
  ) -> jax.Array:
    """Contracts like ``lax.dot_general``."""
    warn_of_precision(name := type(self).__name__, precision)
    check.warn_of_device(name, self.recipe)
    return ops.dot_general(
      lhs,
      rhs,
      dimension_numbers,
      recipe=self.recipe,
      state=read_state(self, self.recipe),
      preferred_element_type=preferred_element_type or rhs.dtype,
      name=name,
    )


Fp8DotGeneral = Fp8DirectDotGeneralOp


class Fp8Einsum(FP8Contraction, Fp8DotGeneralBase):
  """``flax_fp8.Fp8Einsum`` with the fields of Flax.

  Attributes:
    amax_history_length: number of recorded amaxes per tensor.
    e4m3_dtype: FP8 dtype of inputs and kernels. Flax ignores this field.
    e5m2_dtype: FP8 dtype of output gradients. Flax ignores this field.

  Raises:
    TypeError: as ``flax_fp8.Fp8Einsum``.
    ValueError: as ``flax_fp8.Fp8Einsum``, except for ``precision`` and the device. A given
      ``precision`` is ignored with a warning.

  Numerics:
    As ``flax_fp8.Fp8Einsum``, but the result has the dtype of ``rhs``. A device that cannot
    multiply the dtypes computes in a wider type, with a warning.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from flax_fp8 import fp8_ops
    >>> x = jnp.ones((2, 2))
    >>> out, _ = fp8_ops.Fp8Einsum().init_with_output(jax.random.key(0), "mk,kn->mn", x, x)
    >>> out.shape
    (2, 2)

  References:
    flax.linen.fp8_ops.Fp8Einsum.
  """

  result_like_kernel = True

  @nn.compact
  def __call__(
    self,
    eqn: str,
    lhs: jax.Array,
    rhs: jax.Array,
    precision: Any = None,
    preferred_element_type: Any = None,
  ) -> jax.Array:
    """Contracts like ``jnp.einsum``."""
    warn_of_precision(name := type(self).__name__, precision)
    check.warn_of_device(name, self.recipe)
    return ops.einsum(
      eqn,
      lhs,
      rhs,
      recipe=self.recipe,
      state=read_state(self, self.recipe),
      preferred_element_type=preferred_element_type or rhs.dtype,
      name=name,
    )


class Fp8DotGeneralOp(Fp8DotGeneralBase):
  """Deprecated: rounds operands to FP8 values and multiplies them in high precision.

  ``out_qdq(dot_general(in_qdq(lhs), in_qdq(rhs)))``

  XLA may or may not convert this to an FP8 GEMM. Use ``Fp8DotGeneral``, which requests one.

  Attributes:
    amax_history_length: number of recorded amaxes per tensor.
    e4m3_dtype: FP8 dtype of inputs and kernels.
    e5m2_dtype: FP8 dtype of output gradients.

  Raises:
    ValueError: a dtype is not an FP8 dtype, the length is below 1, or the variables lack the state.

  Numerics:
    As ``in_qdq`` and ``out_qdq``. The GEMM is in the dtype of ``rhs``. Warns if the device cannot
    multiply the dtypes.

  Example:
    >>> import warnings
    >>> from flax_fp8 import fp8_ops
    >>> with warnings.catch_warnings(record=True) as caught:
    ...   warnings.simplefilter("always")
    ...   layer = fp8_ops.Fp8DotGeneralOp()
    >>> caught[0].category.__name__
    'DeprecationWarning'

  References:
    flax.linen.fp8_ops.Fp8DotGeneralOp.
  """

  def __post_init__(self) -> None:
    super().__post_init__()
    warnings.warn(
      f"{type(self).__name__} is deprecated, because XLA may not compute its GEMMs in FP8. Use "
      f"{self._replacement()}.",
      DeprecationWarning,
      stacklevel=3,
    )

  def _replacement(self) -> str:
    return "flax_fp8.Fp8DotGeneral or flax_fp8.Fp8Einsum"

  @nn.compact
  def __call__(
    self, lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any, precision: Any = None
  ) -> jax.Array:
    """Contracts like ``lax.dot_general``."""
    warn_of_precision(name := type(self).__name__, precision)
    check.warn_of_device(name, self.recipe)
    state = read_recipe_state(self, self.recipe)
    dtype = rhs.dtype
    q_lhs = in_qdq(dtype, self.e4m3_dtype, jnp.asarray(lhs, dtype), *_leaves(state["input"]))
    q_rhs = in_qdq(dtype, self.e4m3_dtype, rhs, *_leaves(state["kernel"]))
    out = dot_general_with_precision(q_lhs, q_rhs, dimension_numbers)
    return out_qdq(dtype, self.e5m2_dtype, out, *_leaves(state["output_grad"]))


class NANOOFp8DotGeneralOp(Fp8DotGeneralOp):
  """Deprecated: ``Fp8DotGeneralOp`` with the FNUZ formats of AMD CDNA3.

  Use ``Fp8DotGeneral`` with the recipe ``DelayedScaling(fp8_format=Format.HYBRID_FNUZ)``.

  Attributes:
    amax_history_length: number of recorded amaxes per tensor.
    e4m3_dtype: FP8 dtype of inputs and kernels; ``float8_e4m3fnuz``.
    e5m2_dtype: FP8 dtype of output gradients; ``float8_e5m2fnuz``.

  Numerics:
    As ``Fp8DotGeneralOp``.

  Example:
    >>> import warnings
    >>> from flax_fp8 import fp8_ops
    >>> with warnings.catch_warnings():
    ...   warnings.simplefilter("ignore")
    ...   print(fp8_ops.NANOOFp8DotGeneralOp().e4m3_dtype.__name__)
    float8_e4m3fnuz

  References:
    flax.linen.fp8_ops.NANOOFp8DotGeneralOp.
  """

  e4m3_dtype: DType = jnp.float8_e4m3fnuz
  e5m2_dtype: DType = jnp.float8_e5m2fnuz

  def _replacement(self) -> str:
    return "flax_fp8.Fp8DotGeneral with DelayedScaling(fp8_format=Format.HYBRID_FNUZ)"


def _leaves(state: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
  return cast_once(state["scale"]), cast_once(state["amax_history"])
