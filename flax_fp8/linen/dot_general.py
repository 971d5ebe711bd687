"""``Fp8DotGeneral`` and ``Fp8Einsum``: contractions that keep their scales as Linen variables."""

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
  """``lax.dot_general`` in FP8, for ``dot_general_cls=`` of Linen layers.

  ``out ≈ dot_general(lhs, rhs)``; the gradient of each state variable is its new value.

  Attributes:
    recipe: how tensors are scaled.
    emulate: lets a device without the recipe's FP8 multiply in a wider type: right, and slow. A CPU
      does so unasked.
    out_sharding: of the result, where a call names none; a ``PartitionSpec``. Needed on a mesh with
      explicit axes alone, where the sharding is ambiguous, as when what is summed over is sharded.

  Variables (collection ``_overwrite_with_gradient``, for the default recipe):
    input_scale, kernel_scale, output_grad_scale: float32 ``(1,)``, dequantisation multipliers.
    input_amax_history, kernel_amax_history, output_grad_amax_history: float32
    ``(amax_history_len,)``, in the units of the tensor.
    None at all for a recipe without state. The metrics of ``flax_fp8.add_metrics``, once added.
    In a layer with boxed parameters (``nn.with_partitioning``) they are boxed too, no axis named.

  PRNG keys (collection ``sr_rng``):
    One a call, where the recipe rounds gradients stochastically; only the gradient needs it.

  Raises:
    TypeError: an operand is not float32, bfloat16 or float16.
    ValueError: ``dimension_numbers`` do not fit, ``precision`` is given, the variables lack the
      collection, or JAX's default device can't multiply what the recipe needs and ``emulate`` is
      False; see ``flax_fp8.capability``.

  Numerics:
    See ``flax_fp8.ops.dot_general``. A state that is used several times, in one apply or in
    several, has one new value: the largest amax that it saw. Only where a remat or a jitted
    function takes the state as an argument and is called several times, differentiate with
    ``flax_fp8.value_and_grad``, or call the model by ``flax_fp8.TrainState.apply_fn``.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> layer = nn.Dense(4, dot_general_cls=fp8.Fp8DotGeneral)
    >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 8)))
    >>> sorted(variables)
    ['_overwrite_with_gradient', 'params']

    On a GPU without FP8, to try a model out:

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
    """Contracts; arguments as ``lax.dot_general``, ``lhs`` the input and ``rhs`` the kernel."""
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
  """``jnp.einsum`` of two operands in FP8, for mixture-of-experts layers and their like.

  ``out ≈ einsum(equation, lhs, rhs)``; the gradient of each state variable is its new value.

  Attributes:
    recipe: how tensors are scaled.
    emulate: lets a device without the recipe's FP8 multiply in a wider type: right, and slow. A CPU
      does so unasked.
    out_sharding: of the result, where a call names none; a ``PartitionSpec``. Needed on a mesh with
      explicit axes alone, where the sharding is ambiguous, as when what is summed over is sharded.

  Variables:
    As ``Fp8DotGeneral``. The left operand is always the input, the right one the kernel.

  Raises:
    TypeError: an operand is not float32, bfloat16 or float16.
    ValueError: the equation is malformed or does not fit, ``precision`` is given, the variables
      lack the collection, or JAX's default device can't multiply what the recipe needs and
      ``emulate`` is False.

  Numerics:
    As ``Fp8DotGeneral``. Experts on a batch label share one scale; for a scale an expert, map the
    module with ``nn.vmap(..., variable_axes={"_overwrite_with_gradient": 0})``.

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
    """Contracts; arguments as ``jnp.einsum``, ``lhs`` the input and ``rhs`` the kernel."""
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
