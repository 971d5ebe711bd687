"""Fused projections that share an input: one GEMM, one quantized input, one output gradient.

``Fp8FusedQKV`` computes query, key and value of attention. ``Fp8SwiGLU`` is the gated MLP. Their
parameters convert to the parameters of separate layers and back, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
from flax.linen.dtypes import promote_dtype

from flax_fp8 import fields
from flax_fp8.linen.dot_general import Fp8DotGeneral
from flax_fp8.linen.fused_params import BIAS, KERNEL, fuse, require_keys, unfuse
from flax_fp8.linen.parts import Parts
from flax_fp8.ops import check
from flax_fp8.recipes.base import Recipe
from flax_fp8.recipes.delayed import DelayedScaling

KernelScales = Literal["joint", "separate"]
Params = Mapping[str, Any]


class Fp8FusedQKV(nn.Module):
  """Query, key and value projections of self-attention in one FP8 GEMM.

  ::

      query, key, value = x @ query_kernel, x @ key_kernel, x @ value_kernel

  The three kernels are stored in one parameter ``kernel``. Its shape is
  ``[D, kv_heads, group + 2, head_dim]``, with ``group = num_heads / num_kv_heads``. For each
  key-value head it holds the query heads that attend to it, then its key, then its value. A mesh
  that shards the second axis keeps these on one device.

  Attributes:
    num_heads: number of query heads.
    head_dim: width of a head.
    num_kv_heads: number of key and value heads; ``num_heads`` if None. Each is shared by
      ``num_heads / num_kv_heads`` consecutive query heads, as in
      ``jax.nn.dot_product_attention``.
    use_bias: whether to add a bias. The parameter ``bias`` has the shape
      ``[kv_heads, group + 2, head_dim]``.
    dtype: dtype of the computation; the promoted dtype of input and parameters if None.
    param_dtype: dtype of the parameters.
    kernel_init: initializer, called once for each of the three kernels with its own shape
      ``[D, features]``. Its axis names for partitioning are those of the fused kernel's four axes.
    bias_init: initializer of the biases, called in the same way, with three axis names.
    kernel_scales: ``"joint"`` quantizes the fused kernel as one tensor. ``"separate"`` first
      multiplies each of the three kernels by a power of two that brings it close to the largest
      one, and divides its part of the result by it. This costs one more pass over the kernel.
    recipe: the scaling recipe.
    emulate: as in ``Fp8DotGeneral``.

  Variables:
    Those of one ``Fp8DotGeneral``, in the collection ``_overwrite_with_gradient``.

  Raises:
    ValueError: ``num_heads`` is not a multiple of ``num_kv_heads``, or ``kernel_scales`` is
      unknown; and as ``Fp8DotGeneral``.
    TypeError: a field or the input has the wrong type; and as ``Fp8DotGeneral``.

  Numerics:
    As ``Fp8DotGeneral``. The output gradient is quantized as one tensor. If the recipe uses one
    scale per tensor, the three gradients may differ by the range of normal numbers of the format:
    ``2**30`` in E5M2 and ``2**15`` in E4M3.

    Joint scales lose accuracy only if one kernel is thousands of times smaller than another. The
    relative error of a small key, for one scale per tensor and normally distributed values:

    - key ``2**10`` times smaller than query and value: 3.73 %
    - ``2**12`` times smaller: 3.94 %
    - ``2**14`` times smaller: 8.8 %
    - ``2**16`` times smaller: 34 %

    Separate scales keep this error at 3.72 %. They also divide the output gradients by the same
    powers of two before quantization, which balances the gradients of query and key. Attention uses
    only the product of query and key, so ``sum(query * query_grad) == sum(key * key_grad)``. The
    smaller one has the larger gradient. If no two amaxes differ by a factor of 2, ``"joint"`` and
    ``"separate"`` give the same bits. In float16 a divided gradient may underflow. The range of
    bfloat16 and float32 is sufficient.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> layer = fp8.Fp8FusedQKV(num_heads=4, num_kv_heads=2, head_dim=8)
    >>> x = jnp.ones((2, 3, 16))
    >>> (query, key, value), variables = jax.jit(layer.init_with_output)(jax.random.key(0), x)
    >>> query.shape, key.shape, value.shape
    ((2, 3, 4, 8), (2, 3, 2, 8), (2, 3, 2, 8))
    >>> jax.tree.map(jnp.shape, layer.to_separate(variables["params"])["key"])
    {'bias': (2, 8), 'kernel': (16, 2, 8)}

  References:
    Ainslie et al., GQA, https://arxiv.org/abs/2305.13245; flax.linen.MultiHeadDotProductAttention.
  """

  num_heads: int
  head_dim: int
  num_kv_heads: int | None = None
  use_bias: bool = True
  dtype: Any = None
  param_dtype: Any = jnp.float32
  kernel_init: Callable[..., Any] = initializers.lecun_normal()
  bias_init: Callable[..., Any] = initializers.zeros_init()
  kernel_scales: KernelScales = "joint"
  recipe: Recipe = DelayedScaling()
  emulate: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Projects ``[..., D]`` to query, key and value, each ``[..., heads, head_dim]``."""
    _check_fields(self, ("num_heads", "head_dim"), ("kernel_init", "bias_init"))
    fields.flag(type(self).__name__, "use_bias", self.use_bias)
    _check_input(self, x)
    parts = self._parts()
    bias_init = self.bias_init if self.use_bias else None
    of = _project(self, parts, x, self.kernel_init, bias_init)
    return of["query"], of["key"], of["value"]

  @nn.nowrap
  def from_separate(self, separate: Mapping[str, Params]) -> dict[str, jax.Array]:
    """Converts the parameters of three separate layers to this module's parameters.

    Args:
      separate: a mapping with the keys ``"query"``, ``"key"`` and ``"value"``. Each value has the
        ``kernel`` of an ``nn.Dense`` or ``nn.DenseGeneral``, and its ``bias`` if ``use_bias``.
        Leading axes, stacked by ``nn.scan`` or ``nn.vmap``, are kept.

    Returns:
      The module's ``params``, with the same values. ``upgrade_variables`` adds the FP8 state.

    Raises:
      ValueError: a part or parameter is missing or unknown, a shape does not match, or the parts
        differ in leading axes or dtype.
    """
    return fuse(f"{type(self).__name__}.from_separate", self._parts(), separate, self._leaves())

  @nn.nowrap
  def to_separate(
    self, params: Params, layer: type[nn.Module] = nn.DenseGeneral
  ) -> dict[str, dict[str, jax.Array]]:
    """Converts this module's parameters to those of three layers; inverse of ``from_separate``.

    Args:
      params: the module's ``params``. Leading axes are kept.
      layer: ``nn.DenseGeneral`` for kernels ``[D, heads, head_dim]``, as in Flax's attention;
        ``nn.Dense`` for kernels ``[D, features]``.

    Returns:
      A dict with the keys ``"query"``, ``"key"`` and ``"value"``, each with its parameters.

    Raises:
      ValueError: a parameter is missing or unknown or has another shape, or ``layer`` is neither
        class.
    """
    name = f"{type(self).__name__}.to_separate"
    if layer not in (nn.Dense, nn.DenseGeneral):
      raise ValueError(
        f"{name}: layer must be nn.Dense or nn.DenseGeneral; got {layer=}. Choose the class of the "
        "separate layers."
      )
    return unfuse(name, self._parts(), params, self._leaves(), flat=layer is nn.Dense)

  def _parts(self) -> Parts:
    kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
    if kv_heads < 1 or self.num_heads < 1 or self.num_heads % kv_heads:
      raise ValueError(
        f"{type(self).__name__}: num_heads must be a positive multiple of num_kv_heads; got "
        f"num_heads={self.num_heads}, num_kv_heads={kv_heads}. Change one of them."
      )
    slots = (("query", self.num_heads // kv_heads), ("key", 1), ("value", 1))
    return Parts(slots, self.head_dim, (kv_heads,))

  def _leaves(self) -> tuple[str, ...]:
    return (KERNEL, BIAS) if self.use_bias else (KERNEL,)


class Fp8SwiGLU(nn.Module):
  """The SwiGLU MLP in two FP8 GEMMs.

  ::

      (silu(x @ gate) * (x @ up)) @ down

  Gate and up are stored in one parameter ``gate_up/kernel`` of shape ``[D, 2, hidden_features]``.
  The shape of ``down/kernel`` is ``[hidden_features, D]``. A mesh that shards the hidden features
  keeps the gate and up columns of each feature on one device.

  Attributes:
    hidden_features: width between the projections. The result is as wide as the input.
    dtype: dtype of the computation; the promoted dtype of input and parameters if None.
    param_dtype: dtype of the parameters.
    kernel_init: initializer, called for gate and for up with the shape ``[D, hidden_features]``.
      Its axis names for partitioning are those of the fused kernel's three axes.
    down_kernel_init: initializer of down, with two axis names.
    kernel_scales: ``"joint"`` or ``"separate"`` scales of gate and up, as in ``Fp8FusedQKV``.
    recipe: the scaling recipe.
    emulate: as in ``Fp8DotGeneral``.

  Variables:
    Those of two ``Fp8DotGeneral``, in ``gate_up`` and ``down`` of the collection
    ``_overwrite_with_gradient``.

  Raises:
    ValueError: ``kernel_scales`` is unknown; and as ``Fp8DotGeneral``.
    TypeError: a field or the input has the wrong type; and as ``Fp8DotGeneral``.

  Numerics:
    As ``Fp8DotGeneral``. ``silu(gate) * up`` is computed in ``dtype``.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> import flax_fp8 as fp8
    >>> layer = fp8.Fp8SwiGLU(hidden_features=32)
    >>> shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((2, 3, 16)))
    >>> jax.tree.map(jnp.shape, shapes["params"])
    {'down': {'kernel': (32, 16)}, 'gate_up': {'kernel': (16, 2, 32)}}

  References:
    Shazeer, GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202.
  """

  hidden_features: int
  dtype: Any = None
  param_dtype: Any = jnp.float32
  kernel_init: Callable[..., Any] = initializers.lecun_normal()
  down_kernel_init: Callable[..., Any] = initializers.lecun_normal()
  kernel_scales: KernelScales = "joint"
  recipe: Recipe = DelayedScaling()
  emulate: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps ``[..., D]`` to ``[..., D]``."""
    _check_fields(self, ("hidden_features",), ("kernel_init", "down_kernel_init"))
    _check_input(self, x)
    fused = GateUp(
      self._parts(),
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      kernel_init=self.kernel_init,
      kernel_scales=self.kernel_scales,
      recipe=self.recipe,
      emulate=self.emulate,
      name="gate_up",
    )(x)
    # Here swiglu would move more bytes: XLA writes one joint gradient of gate and up in any case.
    hidden = (nn.silu(fused["gate"]) * fused["up"]).reshape(*x.shape[:-1], -1)
    return nn.Dense(
      x.shape[-1],
      use_bias=False,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      kernel_init=self.down_kernel_init,
      dot_general_cls=_dot_general_cls(self),
      name="down",
    )(hidden)

  @nn.nowrap
  def from_separate(self, separate: Mapping[str, Params]) -> dict[str, dict[str, jax.Array]]:
    """Converts the parameters of three separate layers to this module's parameters.

    Args:
      separate: a mapping with the keys ``"gate"``, ``"up"`` and ``"down"``. Each value has the
        ``kernel`` of an ``nn.Dense`` without bias. Leading axes are kept.

    Returns:
      The module's ``params``, with the same values. ``upgrade_variables`` adds the FP8 state.

    Raises:
      ValueError: a part or parameter is missing or unknown, a shape does not match, or gate and up
        differ in leading axes or dtype.
    """
    name = f"{type(self).__name__}.from_separate"
    require_keys(name, separate, ("gate", "up", "down"))
    gate_and_up = {part: separate[part] for part in ("gate", "up")}
    gate_up = fuse(name, self._parts(), gate_and_up, (KERNEL,))
    return {"gate_up": gate_up, "down": self._down(name, separate["down"], gate_up)}

  @nn.nowrap
  def to_separate(self, params: Params) -> dict[str, dict[str, jax.Array]]:
    """Converts this module's parameters to those of three layers; inverse of ``from_separate``.

    Args:
      params: the module's ``params``. Leading axes are kept.

    Returns:
      A dict with the keys ``"gate"``, ``"up"`` and ``"down"``, each with the kernel of an
      ``nn.Dense``.

    Raises:
      ValueError: a parameter is missing or unknown, or has another shape.
    """
    name = f"{type(self).__name__}.to_separate"
    require_keys(name, params, ("gate_up", "down"))
    separate = unfuse(name, self._parts(), params["gate_up"], (KERNEL,), flat=True)
    return {**separate, "down": self._down(name, params["down"], params["gate_up"])}

  def _parts(self) -> Parts:
    return Parts((("gate", 1), ("up", 1)), self.hidden_features)

  def _down(self, name: str, down: Params, gate_up: Params) -> dict[str, jax.Array]:
    """Checks and returns the parameters of down, which are the same in both layouts."""
    require_keys(f"{name}: down", down, (KERNEL,))
    kernel = jnp.asarray(down[KERNEL])
    *lead, inputs, _, hidden = gate_up[KERNEL].shape
    if kernel.shape != (*lead, hidden, inputs):
      raise ValueError(
        f"{name}: the kernel of down must have the shape {(*lead, hidden, inputs)}, the transpose "
        f"of gate and up; got shape {kernel.shape}. Pass three kernels of the same layer."
      )
    return {KERNEL: kernel}


class GateUp(nn.Module):
  """The first GEMM of ``Fp8SwiGLU``, with its own scope."""

  parts: Parts
  dtype: Any
  param_dtype: Any
  kernel_init: Callable[..., Any]
  kernel_scales: KernelScales
  recipe: Recipe
  emulate: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
    """Maps ``[..., D]`` to gate and up, each ``[..., 1, hidden_features]``."""
    return _project(self, self.parts, x, self.kernel_init)


def _project(
  module: Any,
  parts: Parts,
  x: jax.Array,
  kernel_init: Callable[..., Any],
  bias_init: Callable[..., Any] | None = None,
) -> dict[str, jax.Array]:
  """Multiplies by a module's fused kernel: ``[..., D]`` to parts ``[..., heads, width]``.

  With separate scales, ``factor * kernel`` is quantized and the result is ``out / factor``. Both
  are exact, because the factors are powers of two.
  """
  kernel = module.param(KERNEL, parts.init(kernel_init), x.shape[-1:], module.param_dtype)
  bias = bias_init and module.param(BIAS, parts.init(bias_init), (), module.param_dtype)
  x, kernel, bias = promote_dtype(x, kernel, bias, dtype=module.dtype)
  factors = parts.factors(kernel) if module.kernel_scales == "separate" else None
  dimension_numbers = (((x.ndim - 1,), (0,)), ((), ()))
  kernel = parts.scale(kernel, factors) if factors else kernel
  out = parts.split(_dot_general_cls(module)()(x, kernel, dimension_numbers))
  if factors:
    out = {name: _divide(value, factors[name]) for name, value in out.items()}
  if bias is None:
    return out
  biases = parts.split(bias)
  return {name: value + jnp.broadcast_to(biases[name], value.shape) for name, value in out.items()}


def _divide(x: jax.Array, factor: jax.Array) -> jax.Array:
  return (x.astype(jnp.float32) * (1.0 / factor)).astype(x.dtype)


def _dot_general_cls(module: Any) -> Callable[[], nn.Module]:
  return functools.partial(Fp8DotGeneral, recipe=module.recipe, emulate=module.emulate)


def _check_fields(module: Any, sizes: Sequence[str], inits: Sequence[str]) -> None:
  """Raises TypeError or ValueError for an invalid field, with the module's name."""
  name = type(module).__name__
  for field in sizes:
    fields.integer(name, field, getattr(module, field), "Pass a size.")
  for field in inits:
    advice = "Pass one of flax.linen.initializers."
    fields.function(name, field, getattr(module, field), advice)
  for field in ("dtype", "param_dtype"):
    if (value := getattr(module, field)) is not None:
      dtypes = (*check.COMPUTE_DTYPES, "float64")
      fields.dtype(name, field, value, dtypes, "Pass one of these.")
  fields.choice(name, "kernel_scales", module.kernel_scales, get_args(KernelScales))
  fields.flag(name, "emulate", module.emulate)
  check.recipe(name, module.recipe)


def _check_input(module: Any, x: Any) -> None:
  if not getattr(x, "ndim", 0):
    raise TypeError(
      f"{type(module).__name__}: x must be an array [..., D]; got x={fields.show(x)}. Pass the "
      "layer's input."
    )
