"""Casting all variables, including FP8 state, raises an error; upgrade_variables repairs it."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_fp8 as fp8

OWG = fp8.OVERWRITE_WITH_GRADIENT
X = jnp.linspace(-3.0, 3.0, 8).reshape(2, 4)
MODEL = nn.Dense(4, dot_general_cls=fp8.DelayedScaling(amax_history_len=4).dot_general_cls)
VARIABLES = fp8.calibrate(MODEL, jax.jit(MODEL.init)(jax.random.key(0), X), [X], progress=False)
DTYPES = ("bfloat16", "float16", "float64")


@contextlib.contextmanager
def cast_as_a_whole(dtype):
  """Casts all variables to a dtype, as is common for mixed precision."""
  with jax.enable_x64(dtype == "float64"):
    yield jax.tree.map(lambda x: x.astype(dtype), VARIABLES)


def loss_fn(variables, x=X):
  return jnp.mean(MODEL.apply(variables, x.astype(jnp.float32)) ** 2)


USES = {
  "apply": ("Fp8DotGeneral", loss_fn),
  "jax.grad": ("Fp8DotGeneral", jax.grad(loss_fn)),
  "grad": ("as_max_grad", fp8.grad(loss_fn)),
  "accumulate": ("as_max_grad", lambda v: fp8.accumulate_gradients(loss_fn, v, X[None])),
  "freeze": ("freeze_for_inference", lambda v: fp8.freeze_for_inference(MODEL, v, X)),
  "create": (
    "TrainState.create",
    lambda v: fp8.TrainState.create(apply_fn=MODEL.apply, params=v, tx=optax.sgd(0.1)),
  ),
  "apply_updates": ("apply_updates", lambda v: fp8.apply_updates(v, {}, {OWG: v[OWG]})),
  "calibrate": ("calibrate", lambda v: fp8.calibrate(MODEL, v, [X], progress=False)),
  "check": ("check_train_step", lambda v: fp8.check_train_step(lambda state, x: state, v, X)),
  "stats": ("stats", fp8.stats),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("caller", "use"), USES.values(), ids=USES)
def test_one_message_everywhere(caller, use, dtype):
  message = (
    rf"^{caller}: FP8 state must be float32; got .*input_(scale|amax_history)'.* of dtype {dtype}. "
    r"Keep the collection '_overwrite_with_gradient' out of casts of variables; "
    r"upgrade_variables\(model, variables, \*inputs\) casts it back\."
  )
  with cast_as_a_whole(dtype) as variables, pytest.raises(TypeError, match=message):
    use(variables)


@pytest.mark.parametrize("dtype", DTYPES)
def test_upgrade_variables_casts_it_back(dtype):
  with cast_as_a_whole(dtype) as variables:
    mended = fp8.upgrade_variables(MODEL, variables, X)
    assert mended["params"]["kernel"].dtype == dtype
    pairs = zip(jax.tree.leaves(mended[OWG]), jax.tree.leaves(VARIABLES[OWG]), strict=True)
    for leaf, old in pairs:
      assert leaf.dtype == jnp.float32
      np.testing.assert_allclose(leaf, old, rtol=float(jnp.finfo(dtype).eps))
  mended = jax.tree.map(lambda x: x.astype(jnp.float32), mended)
  # Scales differ by a rounding, so outputs differ at most by a rounding to FP8.
  np.testing.assert_allclose(MODEL.apply(mended, X), MODEL.apply(VARIABLES, X), atol=0.3)
  fp8.grad(loss_fn)(mended)
  fp8.freeze_for_inference(MODEL, mended, X)


def test_upgrade_variables_drops_what_the_cast_lost():
  dense = "Fp8DotGeneral_0"
  state = dict(VARIABLES[OWG][dense])
  state |= {"output_grad_scale": jnp.array([1e-9]), "output_grad_amax_history": jnp.full(4, 1e-9)}
  state |= {"input_scale": jnp.array([1e6]), "input_amax_history": jnp.array([1e6, 1.0, 0.0, 2.0])}
  half = jax.tree.map(lambda x: x.astype(jnp.float16), {**VARIABLES, OWG: {dense: state}})
  new = fp8.upgrade_variables(MODEL, half, X)[OWG][dense]
  np.testing.assert_array_equal(new["output_grad_scale"], [1.0])  # zero in float16
  np.testing.assert_array_equal(new["output_grad_amax_history"], np.zeros(4))
  np.testing.assert_array_equal(new["input_scale"], [1.0])  # infinite in float16
  np.testing.assert_array_equal(new["input_amax_history"], [0.0, 1.0, 0.0, 2.0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_frozen_variables(dtype):
  served, frozen = fp8.freeze_for_inference(MODEL, VARIABLES, X)
  cast = jax.tree.map(lambda x: x.astype(dtype), frozen)
  message = (
    rf"^freeze_for_inference: FP8 kernels must stay FP8, .*got 'Fp8.*' of dtype {dtype}. "
    "Pass the variables that freeze_for_inference returned, and do not cast the collection "
    "'fp8_frozen'"
  )
  with pytest.raises(TypeError, match=message):
    served.apply(cast, X)
  params = jax.tree.map(lambda x: x.astype(dtype), frozen["params"])
  assert served.apply({**frozen, "params": params}, X).dtype == jnp.float32
