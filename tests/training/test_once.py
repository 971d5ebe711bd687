"""Kernels are quantized once, outside the loop over microbatches, with equal results."""

import functools

import chex
import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from flax_fp8.training import accumulate

MICROBATCHES, HIDDEN = 3, 48
X = jnp.asarray(np.random.default_rng(0).normal(size=(MICROBATCHES, 4, 32)), jnp.float32)


class Block(nn.Module):
  """An MLP as the body of a scan."""

  cls: object

  @nn.compact
  def __call__(self, x, _):
    layer = functools.partial(nn.Dense, dtype=jnp.float16, dot_general_cls=self.cls)
    return x + layer(32, name="down")(nn.relu(layer(HIDDEN, name="up")(x))), None


class Model(nn.Module):
  """Two blocks: plain, scanned, or with remat."""

  recipe: object
  lift: str = ""
  policy: object = None

  @nn.compact
  def __call__(self, x):
    cls = self.recipe.dot_general_cls
    remat = functools.partial(nn.remat, prevent_cse=False, policy=self.policy)
    block = remat(Block) if "remat" in self.lift else Block
    if "scan" in self.lift:
      layers = fp8.scan(block, {"params": 0}, split_rngs={"params": True}, length=2)
      return layers(cls)(x.astype(jnp.float16), None)[0]
    for _ in range(2):
      x, _ = block(cls)(x.astype(jnp.float16), None)
    return x


DELAYED = fp8.DelayedScaling(amax_history_len=3)
JAX, OURS = jax.checkpoint_policies, fp8.remat_policies
CASES = {
  "unrolled": Model(DELAYED),
  "scan, remat": Model(DELAYED, "scan, remat"),
  "scan, inputs": Model(DELAYED, "scan, remat", OURS.save_fp8_inputs),
  "scan, everything": Model(DELAYED, "scan, remat", JAX.everything_saveable),
  "first step current": Model(fp8.DelayedScaling(amax_history_len=3, first_step="current"), "scan"),
  "current": Model(fp8.Float8CurrentScaling(), "scan, remat"),
  "rowwise": Model(fp8.Float8RowwiseScaling(), "scan"),
  "block": Model(fp8.Float8BlockScaling()),
  "mxfp8": Model(fp8.MXFP8BlockScaling(), "scan"),
}
QUICK = ("scan, everything",)


def loss(model, variables, x):
  return jnp.mean(jnp.square(model.apply(variables, x).astype(jnp.float32)))


def step(model, variables):
  return fp8.accumulate_gradients(functools.partial(loss, model), variables, X)


def train(model, steps=2):
  """Runs some steps; from the second step on, scales use the whole range of the format."""
  variables, seen = jax.jit(model.init)(jax.random.key(0), X[0]), []
  run = jax.jit(functools.partial(step, model))
  for _ in range(steps):
    seen.append(run(variables))
    state = seen[-1][1].get(fp8.OVERWRITE_WITH_GRADIENT)
    variables = {**variables, **({} if state is None else {fp8.OVERWRITE_WITH_GRADIENT: state})}
  return seen


def each_time(monkeypatch):
  """Disables the optimization: kernels are quantized for each microbatch."""
  as_it_is = lambda fun, variables, _: functools.partial(fun, variables)
  monkeypatch.setattr(accumulate, "kernels_first", as_it_is)


cases = pytest.mark.parametrize(
  "model",
  [
    pytest.param(model, id=name, marks=() if name in QUICK else pytest.mark.slow)
    for name, model in CASES.items()
    if name not in ("scan, inputs", "current")  # of "scan, remat", no bit differs
  ],
)


@pytest.mark.slow
@cases
def test_the_bits_of_quantizing_each_time(monkeypatch, model):
  found = train(model)
  each_time(monkeypatch)
  chex.assert_trees_all_equal(found, train(model))


def passes_over_kernels(jaxpr, in_loop=False):
  """Counts casts to FP8 and maxima of arrays of a kernel's size in the loop over microbatches."""
  count, is_kernel = 0, lambda var: var.aval.size == 32 * HIDDEN
  for equation in jaxpr.eqns:
    name, given = equation.primitive.name, equation.params
    inside = in_loop or (name == "scan" and given["length"] == MICROBATCHES)
    if name == "convert_element_type" and inside:
      (out,) = equation.outvars
      count += out.aval.dtype.itemsize == 1 and is_kernel(out)
    if name == "reduce_max" and inside:
      count += is_kernel(equation.invars[0])
    for inner in jax.tree.leaves(given, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        count += passes_over_kernels(inner, inside)
  return count


PADDED = ("block", "mxfp8")  # the cast arrays have other sizes than the tensor


@pytest.mark.parametrize("name", [name for name in CASES if name not in PADDED])
def test_no_kernel_is_read_for_quantization_in_the_loop(monkeypatch, name):
  model = CASES[name]
  variables = jax.eval_shape(model.init, jax.random.key(0), X[0])
  count = lambda: passes_over_kernels(jax.make_jaxpr(lambda v: step(model, v))(variables).jaxpr)
  assert count() == 0
  each_time(monkeypatch)
  assert count() > 0


@pytest.mark.slow
def test_a_loss_that_prints(capfd):
  def printing(variables, x):
    jax.debug.print("microbatch {}", x[0, 0])
    return loss(CASES["unrolled"], variables, x)

  variables = CASES["unrolled"].init(jax.random.key(0), X[0])
  jax.block_until_ready(jax.jit(lambda v: fp8.accumulate_gradients(printing, v, X))(variables))
  jax.effects_barrier()
  assert capfd.readouterr().out.count("microbatch") == MICROBATCHES


def test_what_a_loss_closes_over():
  """The loss closes over arrays of an enclosing jit."""
  model = CASES["unrolled"]
  variables = model.init(jax.random.key(0), X[0])

  def scaled(variables, factor):
    return fp8.accumulate_gradients(lambda v, x: factor * loss(model, v, x), variables, X)

  got = jax.jit(scaled)(variables, jnp.float32(2))
  want = jax.jit(scaled)(variables, jnp.float32(1))
  np.testing.assert_allclose(got[0], 2 * want[0], rtol=1e-6)
