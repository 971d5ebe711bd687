"""Gated activations: values and derivatives near float64, what is saved, what is compiled."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import flax_fp8 as fp8
from flax_fp8 import remat_policies

FUNCTIONS = {
  "swiglu": (fp8.swiglu, jax.nn.silu),
  "geglu": (fp8.geglu, jax.nn.gelu),
  "geglu_erf": (
    functools.partial(fp8.geglu, approximate=False),
    functools.partial(jax.nn.gelu, approximate=False),
  ),
  "reglu": (fp8.reglu, jax.nn.relu),
}
DTYPES = ("float32", "bfloat16", "float16")
SCALES = (1e-3, 1.0, 4.0, 30.0)
NAMES = pytest.mark.parametrize("name", FUNCTIONS)


def normal(seed, dtype, scale=1.0, shape=(64, 128)):
  x = jax.random.normal(jax.random.key(seed), shape) * scale
  return x.astype(dtype)


def arrays(dtype, scale=1.0, shape=(64, 128)):
  """Makes gate, up, and a cotangent."""
  return normal(0, dtype, scale, shape), normal(1, dtype, 1.0, shape), normal(2, dtype, 1.0, shape)


def plain(activation):
  return lambda gate, up: activation(gate) * up


def value_and_pullback(fun, gate, up, grad):
  out, pull = jax.vjp(fun, gate, up)
  return (out, *pull(grad))


def in_float64(activation, *args):
  """Computes the product and its gradients in float64 from the given values."""
  with jax.enable_x64(True):
    wide = [jnp.asarray(np.asarray(x, np.float64)) for x in args]
    return [np.asarray(x) for x in value_and_pullback(plain(activation), *wide)]


def widened(*arrays):
  return [np.asarray(x, np.float64) for x in arrays]


@NAMES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_values_and_gradients_are_rounded_once(name, dtype, scale):
  fun, activation = FUNCTIONS[name]
  args = arrays(dtype, scale)
  got = jax.jit(functools.partial(value_and_pullback, fun))(*args)
  assert all(x.dtype == dtype for x in got)
  kind = jnp.finfo(dtype)
  # Half a unit in the last place, and float32's own error. Near -4, 1 + tanh(gate) cancels.
  float32 = 1e-4 if name == "geglu" and scale > 1 else 2e-6 * max(1.0, scale)
  bound = lambda want: np.abs(want) * (kind.eps / 2) * 1.01 + float(kind.smallest_subnormal)
  for value, want in zip(widened(*got), in_float64(activation, *args), strict=True):
    assert (np.abs(value - want) <= bound(want) + float32).all()


@NAMES
@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0, 100.0])
def test_bfloat16_gradients_are_no_worse_than_by_jaxs_rule(name, scale):
  fun, activation = FUNCTIONS[name]
  args = arrays("bfloat16", scale)
  want = in_float64(activation, *args)
  # Not compiled as one program, where XLA may skip roundings to bfloat16.
  ours = widened(*value_and_pullback(fun, *args))
  theirs = widened(*value_and_pullback(plain(activation), *args))
  for mine, other, exact in zip(ours, theirs, want, strict=True):
    mine, other = np.abs(mine - exact), np.abs(other - exact)
    assert mine.mean() <= other.mean()
    assert mine.max() <= other.max()


def test_the_gradient_of_the_gate_is_more_accurate_than_by_jaxs_rule():
  args = arrays("bfloat16")
  exact = in_float64(jax.nn.silu, *args)[1]
  error = lambda fun: np.abs(widened(value_and_pullback(fun, *args)[1])[0] - exact).mean()
  assert error(fp8.swiglu) < 0.6 * error(plain(jax.nn.silu))


@NAMES
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values_are_those_of_the_plain_formula_in_float32(name, dtype):
  fun, activation = FUNCTIONS[name]
  largest, tiny = float(jnp.finfo(dtype).max), float(jnp.finfo(dtype).tiny)
  values = [0.0, -0.0, 1.0, tiny, -tiny, 100.0, -100.0, largest, -largest, np.inf, -np.inf, np.nan]
  gate, up = (jnp.ravel(x).astype(dtype) for x in jnp.meshgrid(*2 * [jnp.float32(values)]))
  ones = jnp.ones_like(gate)
  got = value_and_pullback(fun, gate, up, ones)
  wide = [x.astype(jnp.float32) for x in (gate, up, ones)]
  want = [x.astype(dtype) for x in value_and_pullback(plain(activation), *wide)]
  for value, reference in zip(got, want, strict=True):
    np.testing.assert_array_equal(*widened(value, reference))


@pytest.mark.parametrize(
  ("gate", "up", "want"),
  [
    ("bfloat16", "float32", "float32"),
    ("float16", "bfloat16", "float32"),
    ("float32", "float16", "float32"),
  ],
)
def test_mixed_dtypes_promote_and_gradients_keep_theirs(gate, up, want):
  out, gate_grad, up_grad = value_and_pullback(
    fp8.swiglu, normal(0, gate), normal(1, up), normal(2, want)
  )
  assert (out.dtype, gate_grad.dtype, up_grad.dtype) == (want, gate, up)


def test_float64_stays_float64():
  with jax.enable_x64(True):
    gate, up = np.linspace(-3, 3, 7), np.linspace(1, 2, 7)
    out = fp8.swiglu(gate, up)
    assert out.dtype == "float64"
    np.testing.assert_allclose(out, gate / (1 + np.exp(-gate)) * up, rtol=1e-14)


@NAMES
def test_only_gate_and_up_are_saved(name):
  fun, _ = FUNCTIONS[name]
  gate, up, _ = arrays("bfloat16")
  jaxpr = jax.make_jaxpr(lambda *args: jax.vjp(fun, *args)[1])(gate, up).jaxpr
  assert {*jaxpr.outvars} == {*jaxpr.invars}


@NAMES
def test_second_derivatives_and_forward_mode(name):
  fun, activation = FUNCTIONS[name]
  gate, up, dot = arrays("float32", shape=(32,))

  def second(fun):
    total = lambda gate, up: jnp.sum(fun(gate, up) * jnp.sin(up))
    return jax.hessian(total, (0, 1))

  with jax.enable_x64(True):
    gate64, up64, dot64 = (jnp.asarray(np.asarray(x, np.float64)) for x in (gate, up, dot))
    want = second(plain(activation))(gate64, up64)
    want_dot = jax.jvp(plain(activation), (gate64, up64), (dot64, gate64))
  got = jax.jit(second(fun))(gate, up)
  assert max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(got)) > 0.1
  near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(near, got, want)
  jax.tree.map(near, jax.jvp(fun, (gate, up), (dot, gate)), want_dot)


def grads_of(wrap):
  """Gradients of a function of gate and up, by way of a transformation of ``fp8.swiglu``."""
  return jax.jit(jax.grad(lambda *args: jnp.sum(jnp.sin(wrap(*args))), (0, 1)))


def scanned(gate, up):
  return jax.lax.scan(lambda carry, row: (carry, fp8.swiglu(*row)), None, (gate, up))[1]


def sharded(gate, up):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  spec = PartitionSpec("data")
  return jax.shard_map(fp8.swiglu, mesh=mesh, in_specs=spec, out_specs=spec)(gate, up)


def rematted(policy, **options):
  return jax.checkpoint(fp8.swiglu, policy=policy, **options)


WRAPPED = {
  "vmap": jax.vmap(fp8.swiglu, in_axes=1, out_axes=1),
  "scan": scanned,
  "remat": rematted(None),
  "remat dots_saveable": rematted(remat_policies.dots_saveable),
  "remat save_fp8_inputs": rematted(remat_policies.save_fp8_inputs, prevent_cse=False),
  "remat everything": rematted(jax.checkpoint_policies.everything_saveable),
  "shard_map": sharded,
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformations_do_not_change_gradients(name, dtype):
  gate, up, _ = arrays(dtype)
  got, want = grads_of(WRAPPED[name])(gate, up), grads_of(fp8.swiglu)(gate, up)
  tolerance = 4 * float(jnp.finfo(dtype).eps)
  near = lambda x, y: np.testing.assert_allclose(*widened(x, y), rtol=tolerance, atol=tolerance)
  jax.tree.map(near, got, want)


def test_second_derivative_in_a_scan():
  gate, up, _ = arrays("float32", shape=(4, 8))
  second = lambda fun: jax.grad(lambda g, u: jnp.sum(jax.grad(fun, 0)(g, u) ** 2), (0, 1))
  total = lambda wrap: lambda g, u: jnp.sum(wrap(g, u) ** 2)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
    second(total(scanned))(gate, up),
    second(total(fp8.swiglu))(gate, up),
  )


def test_explicit_sharding_is_kept():
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
  with jax.set_mesh(mesh):
    spec = PartitionSpec("data", "model")
    gate, up, grad = (jax.device_put(x, spec) for x in arrays("bfloat16"))
    for x in jax.jit(functools.partial(value_and_pullback, fp8.swiglu))(gate, up, grad):
      assert jax.typeof(x).sharding.spec == spec


def test_symbolic_shapes_are_exported():
  rows = jax.export.symbolic_shape("rows, 8")
  args = [jax.ShapeDtypeStruct(rows, jnp.bfloat16)] * 3
  exported = jax.export.export(jax.jit(functools.partial(value_and_pullback, fp8.swiglu)))(*args)
  given = arrays("bfloat16", shape=(6, 8))
  got, want = exported.call(*given), value_and_pullback(fp8.swiglu, *given)
  for x, y in zip(got, want, strict=True):
    np.testing.assert_allclose(*widened(x, y), rtol=2**-7)


@NAMES
def test_shapes_must_be_equal(name):
  fun, _ = FUNCTIONS[name]
  words = (
    rf"{name[:5]}.*: gate and up must have the same shape; got gate=float32\[4, 1\], up=float3"
  )
  with pytest.raises(ValueError, match=words):
    fun(jnp.ones((4, 1)), jnp.ones((4, 8)))


# Llama 3 8B's sizes. XLA fuses small arrays differently.
TOKENS, WIDTH, HIDDEN = 8192, 4096, 14336


class Mlp(nn.Module):
  """A gated MLP in bfloat16."""

  gated: object
  cls: object

  @nn.compact
  def __call__(self, x):
    dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    dense = functools.partial(nn.Dense, use_bias=False, dot_general_cls=self.cls, **dtypes)
    hidden = self.gated(dense(HIDDEN, name="gate")(x), dense(HIDDEN, name="up")(x))
    return dense(WIDTH, name="down")(hidden)


def compiled(gated, recipe):
  """Reports on the forward and backward pass of the MLP on an H100."""
  layer = Mlp(gated, fp8.get_recipe(recipe).dot_general_cls)
  x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.bfloat16)
  variables = jax.eval_shape(layer.init, jax.random.key(0), x)

  def step(variables, x, grad):
    out, pullback = jax.vjp(layer.apply, variables, x)
    return out, pullback(grad)

  return fp8.explain(step, variables, x, x, target="h100")


def test_one_kernel_makes_both_gradients_in_fp8():
  elements = TOKENS * HIDDEN
  report = compiled(fp8.swiglu, "delayed")
  # It reads gate, up and the gradient of their product in bfloat16. It writes one byte an element
  # for each gradient, or a third for the input of down, and the amaxes.
  writes = [k.written for k in report.kernels if 6 * elements <= k.read < 6.1 * elements]
  assert len(writes) == 1
  assert any(n * elements <= writes[0] < (n + 0.1) * elements for n in (2, 3))
  plain_report = compiled(plain(jax.nn.silu), "delayed")
  assert plain_report.bytes_outside_gemms - report.bytes_outside_gemms >= 3.9 * elements


def test_rowwise_moves_no_more_bytes():
  ours, plain_report = compiled(fp8.swiglu, "rowwise"), compiled(plain(jax.nn.silu), "rowwise")
  assert ours.bytes_outside_gemms <= 1.01 * plain_report.bytes_outside_gemms


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("fun", [fp8.swiglu, fp8.geglu, fp8.reglu], ids=lambda fun: fun.__name__)
def test_strict_promotion(fun, dtype):
  x = jnp.ones((2, 3), dtype)
  with jax.numpy_dtype_promotion("strict"):
    grads = jax.grad(lambda gate, up: jnp.sum(fun(gate, up)), (0, 1))(x, x)
  assert {grad.dtype for grad in grads} == {jnp.dtype(dtype)}


def test_a_weak_scalar_takes_the_dtype_of_the_other():
  assert fp8.swiglu(1.0, jnp.bfloat16(2)).dtype == jnp.bfloat16
