"""``Fp8DotGeneral`` and ``Fp8Einsum``: FP8 contractions that store their scales as variables."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from flax_fp8 import ops
from flax_fp8.linen.contractions import FP8Contraction
from flax_fp8.linen.state import read_key, read_state
from flax_fp8.ops import check
from flax_fp8.recipes.base import Recipe
from flax_fp8.recipes.delayed import DelayedScaling


class Fp8DotGeneral(FP8Contraction, nn.Module):
  """``lax.dot_general`` in FP8. Pass the class as ``dot_general_cls`` to Linen layers.

  ``out ≈ lax.dot_general(lhs, rhs, dimension_numbers)``

  The operands are quantized, and so is the output gradient in the backward pass. The gradient of
  each state variable is its new value.

  Attributes:
    recipe: the scaling recipe.
    emulate: lets a device without the recipe's FP8 formats multiply in a wider type. The result is
      the same, but slow. A CPU always does this.
    out_sharding: default sharding of the result, a ``PartitionSpec``. Only a mesh with explicit
      axes needs it, if the sharding is ambiguous. An example is a sharded contracted axis.

  Variables:
    Collection ``_overwrite_with_gradient``, for the default recipe:

    - ``input_scale``, ``kernel_scale`` and ``output_grad_scale``: float32 of shape ``(1,)``, the
      dequantization multipliers.
    - ``input_amax_history``, ``kernel_amax_history`` and ``output_grad_amax_history``: float32 of
      shape ``(amax_history_len,)``, in the units of the tensor.

    A recipe without state has no variables. ``flax_fp8.add_metrics`` adds metrics. If the layer's
    parameters are boxed (``nn.with_partitioning``), the state is boxed without axis names.

  PRNG keys:
    Collection ``sr_rng``: one key for each call, if the recipe rounds gradients stochastically.
    Only the gradient needs it.

  Raises:
    TypeError: an operand is not float32, bfloat16 or float16.
    ValueError: ``dimension_numbers`` do not match the shapes, ``precision`` is given, or the
      variables lack the collection. Also raised if JAX's default device cannot multiply the
      recipe's formats and ``emulate`` is False; see ``flax_fp8.capability``.

  Numerics:
    As ``flax_fp8.ops.dot_general``. If a module is used several times, the new state is the maximum
    over all uses, in one ``apply`` or in several. Plain ``jax.grad`` computes this maximum, except
    if a remat or jitted function takes the state as an argument and is called several times. Then
    use ``flax_fp8.value_and_grad`` or ``flax_fp8.TrainState.apply_fn``.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> layer = nn.Dense(4, dot_general_cls=fp8.Fp8DotGeneral)
    >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 8)))
    >>> sorted(variables)
    ['_overwrite_with_gradient', 'params']

    To try a model on a GPU without FP8:

    >>> import functools
    >>> emulated = functools.partial(fp8.Fp8DotGeneral, emulate=True)
    >>> layer = nn.Dense(4, dot_general_cls=emulated)

  References:
    flax.linen.fp8_ops.Fp8DotGeneral; Micikevicius et al., https://arxiv.org/abs/2209.05433.
  """

  recipe: Recipe = DelayedScaling()
  emulate: bool = False
  out_sharding: Any = None

  @nn.compact
  def __call__(
    self,
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
  ) -> jax.Array:
    """Contracts like ``lax.dot_general``.

    Args:
      lhs: the input; float32, bfloat16 or float16.
      rhs: the kernel; the same dtypes.
      dimension_numbers: as in ``lax.dot_general``.
      precision: must be None or the default. The recipe sets the precision.
      preferred_element_type: dtype of the result; the promoted dtype of the operands if None.
      out_sharding: sharding of the result; the field ``out_sharding`` if None.

    Returns:
      The product. The shape is that of ``lax.dot_general``.
    """
    check.precision(name := type(self).__name__, precision)
    check.device(name, self.recipe, self.emulate)
    return ops.dot_general(
      lhs,
      rhs,
      dimension_numbers,
      recipe=self.recipe,
      state=read_state(self, self.recipe),
      preferred_element_type=preferred_element_type,
      out_sharding=self.out_sharding if out_sharding is None else out_sharding,
      key=read_key(self, self.recipe),
      name=name,
    )


class Fp8Einsum(FP8Contraction, nn.Module):
  """``jnp.einsum`` of two operands in FP8, for example for mixture-of-experts layers.

  ``out ≈ jnp.einsum(equation, lhs, rhs)``

  The operands are quantized, and so is the output gradient in the backward pass. The gradient of
  each state variable is its new value.

  Attributes:
    recipe: the scaling recipe.
    emulate: lets a device without the recipe's FP8 formats multiply in a wider type. The result is
      the same, but slow. A CPU always does this.
    out_sharding: default sharding of the result, a ``PartitionSpec``. Only a mesh with explicit
      axes needs it, if the sharding is ambiguous. An example is a sharded contracted axis.

  Variables:
    As ``Fp8DotGeneral``. The left operand is always the input, and the right operand the kernel.

  PRNG keys:
    As ``Fp8DotGeneral``.

  Raises:
    TypeError: an operand is not float32, bfloat16 or float16.
    ValueError: the equation is malformed or does not match the shapes, ``precision`` is given, or
      the variables lack the collection. Also raised if JAX's default device cannot multiply the
      recipe's formats and ``emulate`` is False; see ``flax_fp8.capability``.

  Numerics:
    As ``Fp8DotGeneral``. Experts on a batch label share one scale. For one scale per expert, map
    the module with ``nn.vmap(..., variable_axes={"_overwrite_with_gradient": 0})``.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> einsum = fp8.Fp8Einsum()
    >>> x, w = jnp.ones((2, 3, 4)), jnp.ones((2, 4, 5))
    >>> variables = einsum.init(jax.random.key(0), "ebk,ekn->ebn", x, w)
    >>> einsum.apply(variables, "ebk,ekn->ebn", x, w).shape
    (2, 3, 5)

  References:
    flax.linen.fp8_ops.Fp8Einsum; jax.numpy.einsum.
  """

  recipe: Recipe = DelayedScaling()
  emulate: bool = False
  out_sharding: Any = None

  @nn.compact
  def __call__(
    self,
    equation: str,
    lhs: jax.Array,
    rhs: jax.Array,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
  ) -> jax.Array:
    """Contracts like ``jnp.einsum``.

    Args:
      equation: einsum equation of two operands.
      lhs: the input; float32, bfloat16 or float16.
      rhs: the kernel; the same dtypes.
      precision: must be None or the default. The recipe sets the precision.
      preferred_element_type: dtype of the result; the promoted dtype of the operands if None.
      out_sharding: sharding of the result; the field ``out_sharding`` if None.

    Returns:
      The product. The shape is that of ``jnp.einsum``.
    """
    check.precision(name := type(self).__name__, precision)
    check.device(name, self.recipe, self.emulate)
    return ops.einsum(
      equation,
      lhs,
      rhs,
      recipe=self.recipe,
      state=read_state(self, self.recipe),
      preferred_element_type=preferred_element_type,
      out_sharding=self.out_sharding if out_sharding is None else out_sharding,
      key=read_key(self, self.recipe),
      name=name,
    )
