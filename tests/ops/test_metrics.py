"""Metrics of each recipe, compared with float64 NumPy and the oracle. Absent, they cost nothing."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import flax_fp8 as fp8
from flax_fp8 import ops
from flax_fp8.ops import metrics
from flax_fp8.recipes import Role
from tests import oracle
from tests.recipes import cases

M, K, N = 3, 140, 5  # more than one block of 128, and no multiples of 32
AMAX = 0.25  # recorded amax for delayed scaling; many values exceed it


def wide(seed, *shape):
  """Makes magnitudes over nine decades, and zeros. Some saturate, and some flush to zero."""
  random = np.random.default_rng(seed)
  x = random.normal(size=shape) * 10.0 ** random.uniform(-9, 0, shape)
  return np.where(random.random(shape) < 0.1, 0, x).astype(np.float32)


X, W, C = wide(0, M, K), wide(1, K, N), wide(2, M, N)
TENSORS = dict(zip(Role, (X, W, C), strict=True))
RECIPES = {
  **{name: fp8.get_recipe(name) for name in fp8.RECIPES if name != "mxfp8"},
  "mxfp8, down": fp8.MXFP8BlockScaling(scale_rounding="down", fp8_format=fp8.Format.HYBRID),
  "rowwise, wgrad whole": fp8.Float8RowwiseScaling(high_precision=("wgrad",)),
}


def with_metrics(recipe):
  state = ops.init_state(recipe)
  if "amax_history" in state["input"]:
    state = jax.tree.map(lambda leaf: leaf if leaf.size == 1 else leaf.at[3].set(AMAX), state)
  return {role: {**leaves, **metrics.init_metrics()} for role, leaves in state.items()}


def blocks_along(x, axis, size):
  """Yields parts of at most ``size`` along an axis, with their places in ``x``."""
  for other in range(x.shape[1 - axis]):
    for start in range(0, x.shape[axis], size):
      part = slice(start, start + size)
      yield (other, part) if axis == 1 else (part, other)


def tiles(x, size):
  for row in range(0, x.shape[0], size):
    for column in range(0, x.shape[1], size):
      yield slice(row, row + size), slice(column, column + size)


def dequantized(recipe, role, axis):
  """Quantizes a tensor with the oracle for a GEMM that sums along ``axis``. Adds its range."""
  x, name = TENSORS[role], np.dtype(recipe.float8(role).dtype).name
  x_hat, limit = np.zeros(x.shape), np.zeros(x.shape)

  def write(where, q, scale):
    x_hat[where] = q * np.float64(scale)
    limit[where] = np.float64(scale) * oracle.magnitudes(name)[-1]

  match recipe:
    case fp8.DelayedScaling():
      scale = np.float32(AMAX) / np.float32(oracle.magnitudes(name)[-1])
      write(..., oracle.quantize(x, scale, name), scale)
    case fp8.Float8CurrentScaling():
      write(..., *oracle.quantize_by_amax(x, name))
    case fp8.Float8RowwiseScaling():
      for where in blocks_along(x, axis, x.shape[axis]):
        write(where, *oracle.quantize_by_amax(x[where], name))
    case fp8.Float8BlockScaling():
      for where in tiles(x, 128) if role is Role.KERNEL else blocks_along(x, axis, 128):
        write(where, *oracle.quantize_by_amax(x[where], name, power_of_two=True))
    case fp8.MXFP8BlockScaling():
      for where in blocks_along(x, axis, 32):
        q, code = oracle.quantize_mx(x[where], name, recipe.scale_rounding)
        write(where, q, 2.0 ** (code - 127))
    case _:
      raise NotImplementedError(recipe)
  return x_hat, limit


# The axis of a tensor that each of its GEMMs sums over.
SUMMED = {
  Role.INPUT: {"fprop": 1, "wgrad": 0},
  Role.KERNEL: {"fprop": 0, "dgrad": 1},
  Role.OUTPUT_GRAD: {"dgrad": 1, "wgrad": 0},
}


def expected(recipe, role):
  """Computes the metrics in float64, as the maximum over the FP8 GEMMs."""
  x = np.float64(TENSORS[role])
  found = []
  for gemm, axis in SUMMED[role].items():
    if gemm in recipe.high_precision:
      continue
    x_hat, limit = dequantized(recipe, role, axis)
    found.append([
      np.abs(x).max(),
      np.mean(np.abs(x) > limit * (1 + 2**-20)),
      np.sum((x != 0) & (x_hat == 0)) / np.sum(x != 0),
      np.sum((x - x_hat) ** 2) / np.sum(x**2),
      0.0,
    ])  # fmt: skip
  return dict(zip(metrics.METRICS, np.max(found, axis=0), strict=True))


@functools.cache
def measured(name):
  return cases.compiled_quickly(RECIPES[name], X, W, C, with_metrics(RECIPES[name]))


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("name", RECIPES)
def test_equal_the_oracle(name, role):
  """Counts are exact. Float32 sums have an error of one epsilon for each addition."""
  state = measured(name)[3][role.value]
  want = expected(RECIPES[name], role)
  got = {key: float(state[key][0]) for key in metrics.METRICS}
  assert got == pytest.approx(want, rel=1e-4, abs=1e-12)
  assert all(state[key].shape == (1,) for key in metrics.METRICS)


def test_the_oracle_meets_every_case():
  delayed, down = expected(RECIPES["delayed"], Role.INPUT), RECIPES["mxfp8, down"]
  assert all(value > 0 for name, value in delayed.items() if name != "nonfinite")
  assert expected(RECIPES["current"], Role.INPUT)["saturated"] == 0
  assert max(expected(down, role)["saturated"] for role in Role) > 0


@pytest.mark.parametrize("name", ["delayed", "rowwise, wgrad whole", "block"])
def test_change_nothing_else(name):
  """Values and the recipe's own state equal those of the contraction without metrics."""
  out, dx, dw, state = measured(name)
  plain = {role: metrics.split(leaves)[0] for role, leaves in with_metrics(RECIPES[name]).items()}
  want = cases.compiled_quickly(RECIPES[name], X, W, C, plain)
  own = {role: metrics.split(leaves)[0] for role, leaves in state.items()}
  cases.equal((out, dx, dw, own), want)


def instructions(recipe, state):
  """Returns the optimized program without source locations."""
  run = lambda *arrays: cases.step(
    recipe, *arrays
  )  # a new function each time, so nothing is cached
  text = jax.jit(run).lower(X, W, C, state).compile().as_text()
  assert text is not None
  text = re.sub(r", metadata=\{[^}]*\}", "", text)
  return re.sub(r"(?ms)^(FileNames|FunctionNames|FileLocations|StackFrames)$.*?^$", "", text)


def test_cost_nothing_when_absent(monkeypatch):
  """The program equals one without the measuring code, instruction by instruction."""
  recipe = RECIPES["delayed"]
  without, measuring = (
    instructions(recipe, state) for state in (ops.init_state(recipe), with_metrics(recipe))
  )
  calls = []
  monkeypatch.setattr(metrics, "split", lambda state: calls.append(1) or (dict(state), {}))
  monkeypatch.delattr(metrics, "measure")
  assert instructions(recipe, ops.init_state(recipe)) == without
  assert calls
  assert len(measuring) > len(without)


BAD = np.array([[1.0, np.nan, -2.0, np.inf, 1e-9, 0.0]], np.float32)


@pytest.mark.parametrize("name", ["delayed", "current"])
def test_leave_out_what_is_not_finite(name):
  """Under current scaling a NaN makes the whole tensor NaN, so nothing is measured."""
  recipe = RECIPES[name]
  state = with_metrics(recipe)
  new = cases.compiled_quickly(recipe, BAD, np.ones((6, 1), np.float32), np.ones((1, 1)), state)[3]
  got = [float(new["input"][key][0]) for key in metrics.METRICS]
  if name == "current":
    assert got[:4] == [0, 0, 0, 0]
  else:  # AMAX is the largest value in range
    assert got[:3] == [2.0, 0.5, pytest.approx(1 / 3)]
    assert got[3] == pytest.approx((0.75**2 + 1.75**2) / 5)
  nonfinite = [float(new[role.value]["nonfinite"][0]) for role in Role]
  assert nonfinite == [pytest.approx(1 / 3), 0, 0]


def test_of_tiny_values_do_not_underflow():
  """Float32 can't represent squares of 1e-30, but it can represent their ratio."""
  state = with_metrics(RECIPES["current"])
  tiny = np.float32(1e-30) * cases.normal(0, 4, 8)
  new = cases.compiled_quickly(RECIPES["current"], tiny, np.ones((8, 1)), np.ones((4, 1)), state)
  x_hat = np.float64(1) * np.multiply(*oracle.quantize_by_amax(tiny, "float8_e4m3fn"))
  want = np.sum((tiny - x_hat) ** 2) / np.sum(np.float64(tiny) ** 2)
  assert float(new[3]["input"]["noise"][0]) == pytest.approx(want, rel=1e-4)


PARTS = cases.normal(3, 4, 8, 16) * np.array([1, 4, 0.5, 2], np.float32).reshape(4, 1, 1)


def of_parts(recipe, w, c):
  one = cases.quickly(lambda x: cases.step(recipe, x, w, c, with_metrics(recipe))[3]["input"])
  each = [one(x) for x in PARTS]
  return jax.tree.map(lambda *leaves: np.max(leaves, axis=0), *each)


@pytest.mark.parametrize(
  ("how", "name"),
  [("vmap", "delayed"), ("vmap", "rowwise"), ("check_vma", "current"), ("unchecked", "delayed")],
)
def test_of_shared_state_are_the_largest_of_the_parts(name, how):
  recipe = RECIPES[name]
  w, c = cases.normal(4, 16, 2), cases.normal(5, 8, 2)
  apply = lambda x, w, state: ops.dot_general(x, w, cases.DIMS, recipe=recipe, state=state)
  if how == "vmap":
    apply, xs = jax.vmap(apply, in_axes=(0, None, None)), PARTS
    cs = np.stack([c] * 4)
  else:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": (P("data"), P(), P()), "out_specs": P("data")}
    apply = jax.shard_map(apply, mesh=mesh, check_vma=how == "check_vma", **specs)
    xs, cs = PARTS.reshape(-1, 16), np.concatenate([c] * 4)
  run = lambda x, w, c, state: jax.vjp(apply, x, w, state)[1](jnp.asarray(c))[2]
  new = cases.quickly(run)(xs, w, cs, with_metrics(recipe))["input"]
  for key, want in of_parts(recipe, w, c).items():
    np.testing.assert_allclose(new[key], want, rtol=1e-6)


def test_of_a_whole_tensor_stay():
  recipe = fp8.DelayedScaling(high_precision=("fprop", "wgrad"))  # the input is never quantized
  new = cases.compiled_quickly(recipe, X, W, C, with_metrics(recipe))[3]
  assert [float(new["input"][key][0]) for key in metrics.METRICS] == [0] * 5
  assert float(new["kernel"]["amax"][0]) == np.abs(W).max()


def test_all_or_none():
  state = ops.init_state(RECIPES["current"])
  state["kernel"]["amax"] = jnp.zeros((1,))
  message = r"of kernel must hold \['amax', 'flushed', .*got \['amax'\].*with all metrics or none"
  with pytest.raises(ValueError, match=message):
    ops.dot_general(X, W, cases.DIMS, recipe=RECIPES["current"], state=state)
