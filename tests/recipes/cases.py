"""The recipes of the contract suite, and one training step of a contraction."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import flax_fp8 as fp8
from flax_fp8 import contraction, ops
from flax_fp8.recipes import Recipe, Role

# Add a line here for a new recipe.
RECIPES: dict[str, Recipe] = {
  "delayed": fp8.DelayedScaling(amax_history_len=4),
  "delayed, interval": fp8.DelayedScaling(amax_history_len=4, interval=2),
  "delayed, first step": fp8.DelayedScaling(amax_history_len=4, first_step="current"),
  "current": fp8.Float8CurrentScaling(),
  "rowwise": fp8.Float8RowwiseScaling(),
  "rowwise, wgrad whole": fp8.Float8RowwiseScaling(high_precision=("wgrad",)),
  "block": fp8.Float8BlockScaling(),
  "mxfp8": fp8.MXFP8BlockScaling(),
  "stochastic": fp8.Float8CurrentScaling(grad_rounding="stochastic"),
}
STATELESS = {name: r for name, r in RECIPES.items() if not r.init_state(Role.INPUT)}
STATEFUL = {name: r for name, r in RECIPES.items() if name not in STATELESS}
# For tests that depend only on the class.
ONE_OF_EACH_CLASS = {type(recipe): name for name, recipe in reversed(RECIPES.items())}.values()

DIMS = (((1,), (0,)), ((), ()))
KEY = jax.random.key(7)
# Tokens, input features, output features: more than one block each, and no multiples of 32.
M, K, N = 136, 164, 132


def integers(seed: int, *shape: int) -> np.ndarray:
  """Makes integers from -7 to 7.

  For every recipe, their products summed in float32 are exact in any order. A program therefore
  equals its sharded, mapped or compiled variant bit for bit.
  """
  return np.random.default_rng(seed).integers(-7, 8, shape).astype(np.float32)


def normal(seed: int, *shape: int) -> np.ndarray:
  """Makes normally distributed values."""
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def step(
  recipe: Recipe,
  x: Any,
  w: Any,
  c: Any,
  state: Any = None,
  *,
  dims: Any = DIMS,
  key: Any = KEY,
  dtype: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
  """Runs one contraction forward, and backward with the cotangent ``c``.

  Returns:
    The output, the gradients of ``x`` and ``w``, and the new state.
  """
  state = ops.init_state(recipe) if state is None else state

  def apply(x: jax.Array, w: jax.Array, state: Any) -> jax.Array:
    return ops.dot_general(
      x, w, dims, recipe=recipe, state=state, key=key, preferred_element_type=dtype
    )

  out, vjp = jax.vjp(apply, jnp.asarray(x), jnp.asarray(w), state)
  return (out, *vjp(jnp.asarray(c, out.dtype)))


# Compiled once for each recipe and shape, and shared by all tests.
compiled = jax.jit(step, static_argnums=0, static_argnames=("dims", "dtype"))
# Compiles in half the time. Only for sums that are exact with any compiler options.
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
compiled_quickly = quickly(step, static_argnums=0)


@functools.partial(quickly, static_argnums=0)
def forward(recipe: Recipe, x: Any, w: Any) -> dict[str, jax.Array]:
  """Computes only the output, in the given dtype."""
  return {
    dtype: ops.dot_general(
      x, w, DIMS, recipe=recipe, state=ops.init_state(recipe), preferred_element_type=dtype
    )
    for dtype in ("float32", "bfloat16", "float16")
  }


def exact(x: Any, w: Any, c: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Computes the output and both gradients in float64."""
  x, w, c = (np.asarray(t, np.float64) for t in (x, w, c))
  return x @ w, c @ w.T, x.T @ c


@functools.partial(quickly, static_argnums=3)
def plain(x: Any, w: Any, c: Any, dims: Any) -> tuple[jax.Array, ...]:
  """Computes the output and both gradients with JAX, in float32."""
  multiply = functools.partial(lax.dot_general, dimension_numbers=dims, precision="highest")
  out, vjp = jax.vjp(multiply, x, w)
  return (out, *vjp(c))


def margin(recipe: Recipe, role: Role) -> Any:
  """Bounds the magnitude of a quantized value: ``|x| (1 + relative) + absolute``.

  The relative error is half the spacing of normal values, and the absolute error half the spacing
  of subnormal values. With stochastic rounding, both are the full spacing.
  """
  float8 = recipe.float8(role)
  stochastic = recipe.rounds_by_key and role is Role.OUTPUT_GRAD
  relative = float8.epsilon * (1 if stochastic else 0.5)

  def widen(x: Any) -> np.ndarray:
    x = np.abs(np.asarray(x, np.float32))
    # Without initial state, scales may be up to twice the smallest possible one.
    initial = recipe.init_state(role).get("scale")
    scale = 2 * x.max(initial=0) / float8.max if initial is None else float(initial[0])
    return x * (1 + relative) + scale * float8.smallest_subnormal * (1 if stochastic else 0.5)

  return widen


def error_bounds(recipe: Recipe, x: Any, w: Any, c: Any, dims: Any = DIMS) -> list[np.ndarray]:
  """Bounds the error of each element of the output and both gradients."""
  magnitudes = [np.abs(np.asarray(t, np.float32)) for t in (x, w, c)]
  wide = [margin(recipe, role)(t) for role, t in zip(Role, (x, w, c), strict=True)]
  pairs = zip(plain(*wide, dims), plain(*magnitudes, dims), strict=True)
  # The last factor covers summation in float32.
  return [(np.asarray(upper) - np.asarray(lower)) * 1.001 + 1e-5 for upper, lower in pairs]


def equal(got: Any, want: Any) -> None:
  """Asserts that two trees are equal bit for bit, including NaNs."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def quantized(recipe: Recipe, x: Any, role: Role, dims: Any = DIMS, key: Any = None) -> Any:
  """Quantizes a tensor of a plain matrix product. Returns the pair of ``QTensor``.

  Args:
    recipe: the recipe.
    x: ``[M, K]`` input, ``[K, N]`` kernel or ``[M, N]`` output gradient.
    role: role of ``x``.
    dims: dimension numbers of the forward product.
    key: PRNG key, if any.
  """
  shape = np.shape(x)
  lhs_shape = {Role.KERNEL: (3, shape[0]), Role.OUTPUT_GRAD: (shape[0], 3)}.get(role, shape)
  rhs_shape = {Role.INPUT: (shape[1], 3), Role.OUTPUT_GRAD: (3, shape[1])}.get(role, shape)
  forward = contraction.forward_gemm(dims, lhs_shape, rhs_shape)
  to_lhs, to_rhs = contraction.backward_gemms(dims, lhs_shape, rhs_shape)
  views = {
    Role.INPUT: (forward.lhs, to_rhs.rhs),
    Role.KERNEL: (forward.rhs, to_lhs.rhs),
    Role.OUTPUT_GRAD: (to_lhs.lhs, to_rhs.lhs),
  }[role]
  return _quantized(recipe, role, views, jnp.asarray(x), key)


@functools.partial(quickly, static_argnums=(0, 1, 2))
def _quantized(recipe: Recipe, role: Role, views: Any, x: jax.Array, key: Any) -> Any:
  return recipe.quantize(x, ops.init_state(recipe)[role.value], role, views, key)[0]
