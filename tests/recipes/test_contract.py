"""The contract of every recipe: accuracy, shapes, dtypes, and NaN or infinite values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from flax_fp8 import ops
from flax_fp8.recipes import Role
from tests.recipes import cases
from tests.recipes.cases import (
  RECIPES,
  STATEFUL,
  STATELESS,
  K,
  M,
  N,
  compiled,
  compiled_quickly,
  integers,
  normal,
)

X, W, C = normal(0, M, K), normal(1, K, N), normal(2, M, N)
by_recipe = pytest.mark.parametrize("name", RECIPES)
by_class = pytest.mark.parametrize("name", cases.ONE_OF_EACH_CLASS)
by_stateless = pytest.mark.parametrize("name", STATELESS)


def test_all_recipes_take_part():
  assert {type(recipe) for recipe in RECIPES.values()} == set(fp8.RECIPES.values())


@by_recipe
def test_is_near_float64(name):
  """Each error is within the bound for rounded terms, and not smaller than FP8 allows."""
  recipe = RECIPES[name]
  got = compiled(recipe, X, W, C)[:3]
  bounds = cases.error_bounds(recipe, X, W, C)
  gemms = ("fprop", "dgrad", "wgrad")
  for gemm, value, want, bound in zip(gemms, got, cases.exact(X, W, C), bounds, strict=True):
    error = np.abs(np.asarray(value, np.float64) - want)
    assert np.all(error <= bound)
    if gemm not in recipe.high_precision:
      assert np.linalg.norm(error) > 2.0**-7 * np.linalg.norm(want)


# The other recipes use the same operations.
@pytest.mark.parametrize(
  "name", ["delayed", pytest.param("block", marks=pytest.mark.slow), "mxfp8"]
)
def test_jit_equals_eager(name):
  recipe = RECIPES[name]
  x, w, c = (t[:8, :8] for t in (X, W, C))  # one shape, so few operations are compiled
  cases.equal(compiled(recipe, x, w, c), cases.step(recipe, x, w, c))


SHAPES = {
  "two contracted axes, exchanged": ((4, 6, 5), (5, 6, 7), (((2, 1), (0, 1)), ((), ()))),
  "batch in the middle": ((4, 3, 40, 2), (40, 5, 3), (((2,), (0,)), ((1,), (2,)))),
  "ones": ((1, 1), (1, 1), cases.DIMS),
  "outer product": ((3,), (4,), (((), ()), ((), ()))),
  "no tokens": ((0, 3), (3, 2), cases.DIMS),
  "no terms": ((3, 0), (0, 2), cases.DIMS),
}


def tensors(shape, dims):
  x, w = normal(3, *shape[0]), normal(4, *shape[1])
  out = jax.eval_shape(lambda x, w: jax.lax.dot_general(x, w, dims), x, w)
  return x, w, normal(5, *out.shape)


@by_class
def test_shapes(name):
  """One program for all shapes compiles faster. A sum over no elements is zero."""
  recipe = RECIPES[name]
  inputs = [tensors((x, w), dims) for x, w, dims in SHAPES.values()]
  all_dims = [dims for *_, dims in SHAPES.values()]

  @cases.quickly
  def run(inputs):
    return [
      cases.step(recipe, *arrays, dims=dims) for arrays, dims in zip(inputs, all_dims, strict=True)
    ]

  for shape, arrays, got, dims in zip(SHAPES, inputs, run(inputs), all_dims, strict=True):
    bounds = cases.error_bounds(recipe, *arrays, dims)
    for value, want, bound in zip(got[:3], cases.plain(*arrays, dims), bounds, strict=True):
      assert value.shape == want.shape, shape
      assert np.all(np.abs(value - want) <= bound), shape
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(got[3])), shape


@by_class
def test_einsum_with_exchanged_operands(name):
  """The output's order makes the kernel the GEMM's left operand. Roles do not change, so the values
  equal those of the plain order."""
  recipe = RECIPES[name]
  x, w, c = integers(0, 8, 40), integers(1, 40, 6), integers(2, 8, 6)
  state = ops.init_state(recipe)

  def run(equation, c):
    f = lambda x, w, state: ops.einsum(equation, x, w, recipe=recipe, state=state, key=cases.KEY)
    out, vjp = jax.vjp(f, x, w, state)
    return (out, *vjp(c))

  here, there = cases.quickly(lambda c: (run("mk,kn->mn", c), run("mk,kn->nm", c.T)))(c)
  cases.equal(there[0].T, here[0])
  if not recipe.rounds_by_key:  # the gradient is transposed, so its elements get other random bits
    cases.equal(there[1:], here[1:])


PAIRS = (("float16", "float16"), ("bfloat16", "float32"))


@by_class
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_dtypes(name, pair):
  """16-bit operands give the result of their float32 values, rounded once at the end."""
  recipe = RECIPES[name]
  x, w, c = integers(0, 8, 40), integers(1, 40, 6), integers(2, 8, 6)
  want = compiled_quickly(recipe, x, w, c)
  x, w = (jnp.asarray(t, dtype) for t, dtype in zip((x, w), pair, strict=True))
  got = compiled_quickly(recipe, x, w, c)
  assert got[0].dtype == jnp.promote_types(*pair)
  assert (got[1].dtype, got[2].dtype) == pair
  for value, reference in zip(got[:3], want[:3], strict=True):
    cases.equal(value, reference.astype(value.dtype))
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got[3]))
  cases.equal(got[3], want[3])


@by_class
def test_preferred_element_type(name):
  """The result is rounded once, from float32 to the requested dtype."""
  x, w = (jnp.asarray(t, jnp.bfloat16) for t in (integers(0, 8, 40), integers(1, 40, 6)))
  got = cases.forward(RECIPES[name], x, w)
  for dtype, value in got.items():
    assert value.dtype == dtype
    cases.equal(value, got["float32"].astype(dtype))


@by_recipe
@pytest.mark.parametrize("which", range(3), ids=["input", "kernel", "output_grad"])
def test_zeros(name, which):
  arrays = [X, W, C]
  arrays[which] = np.zeros_like(arrays[which])
  got = compiled(RECIPES[name], *arrays)
  for value, want in zip(got[:3], cases.exact(*arrays), strict=True):
    assert np.all(np.isfinite(value))
    if not np.any(want):
      assert not np.any(value)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(got[3]))


SPOILED = (40, 50)  # row and column of the NaN or infinity


def shares_a_scale(recipe, role, shape, contracted):
  """Marks the values of a tensor that share a scale with the value at SPOILED."""
  rows, columns = np.indices(shape)
  along, across = (rows, columns) if contracted == 0 else (columns, rows)
  at, other = SPOILED if contracted == 0 else SPOILED[::-1]
  match recipe:
    case fp8.Float8CurrentScaling():
      return np.ones(shape, bool)
    case fp8.Float8RowwiseScaling():
      return across == other
    case fp8.Float8BlockScaling() if role is Role.KERNEL:
      return (across // 128 == other // 128) & (along // 128 == at // 128)
    case fp8.Float8BlockScaling():
      return (across == other) & (along // 128 == at // 128)
    case fp8.MXFP8BlockScaling():
      return (across == other) & (along // 32 == at // 32)
  raise NotImplementedError(recipe)


@by_stateless
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("role", Role, ids=lambda role: role.value)
def test_a_bad_value_spoils_what_shares_its_scale(name, role, bad):
  recipe = RECIPES[name]
  which = list(Role).index(role)
  arrays = [X.copy(), W.copy(), C.copy()]
  arrays[which][SPOILED] = bad
  got = compiled(recipe, *arrays)[:3]
  # The two GEMMs that take the tensor, the axis that each contracts, and the axis of the result
  # that comes from the tensor's other axis.
  uses = {
    Role.INPUT: (("fprop", 1, 0), ("wgrad", 0, 0)),
    Role.KERNEL: (("fprop", 0, 1), ("dgrad", 1, 1)),
    Role.OUTPUT_GRAD: (("dgrad", 1, 0), ("wgrad", 0, 1)),
  }[role]
  shapes = {"fprop": (M, N), "dgrad": (M, K), "wgrad": (K, N)}
  want = {gemm: np.zeros(shape, bool) for gemm, shape in shapes.items()}
  for gemm, contracted, axis in uses:
    if gemm in recipe.high_precision:
      lines = np.arange(arrays[which].shape[1 - contracted]) == SPOILED[1 - contracted]
    else:
      shared = shares_a_scale(recipe, role, arrays[which].shape, contracted)
      lines = np.any(shared, axis=contracted)
    want[gemm] |= np.expand_dims(lines, 1 - axis)
  for gemm, value in zip(shapes, got, strict=True):
    if gemm in recipe.high_precision and np.isinf(bad):
      np.testing.assert_array_equal(~np.isfinite(value), want[gemm], gemm)
    else:
      np.testing.assert_array_equal(np.isnan(value), want[gemm], gemm)


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("role", Role, ids=lambda role: role.value)
@pytest.mark.parametrize("bad", [np.nan, -np.inf], ids=str)
def test_state_never_sees_a_bad_value(name, role, bad):
  """NaN and infinity give NaN in the products, and the history records neither."""
  recipe = RECIPES[name]
  arrays = [X.copy(), W.copy(), C.copy()]
  arrays[list(Role).index(role)][SPOILED] = bad
  *products, state = compiled(recipe, *arrays)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))
  assert not np.any(state[role.value]["amax_history"])
  spoiled = [bool(np.any(np.isnan(product))) for product in products]
  takes_it = {Role.INPUT: (0, 2), Role.KERNEL: (0, 1), Role.OUTPUT_GRAD: (1, 2)}[role]
  assert spoiled == [i in takes_it for i in range(3)]


@pytest.mark.parametrize("name", [n for n in STATELESS if n != "mxfp8"])
def test_small_tensors_whose_scales_have_no_product(name):
  """1e-18 times 1e-17 with 16 terms is 1.6e-34, but the product of both scales underflows."""
  x, w = np.full((16, 16), 1e-18, np.float32), np.full((16, 16), 1e-17, np.float32)
  out = compiled(RECIPES[name], x, w, np.zeros((16, 16), np.float32))[0]
  np.testing.assert_allclose(out, 1.6e-34, rtol=0.1)
