"""The drop-in namespace: all names of ``flax.linen.fp8_ops``, its modules and deprecations."""

import inspect
import types
import warnings

import flax.linen as nn
import flax.linen.fp8_ops as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from flax_fp8 import fp8_ops

OWG = fp8.OVERWRITE_WITH_GRADIENT
KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16)), jnp.float32)
BORROWED = {"Any", "DTypeLike", "custom_jvp", "custom_vjp", "partial"}


def public(module):
  return {
    name
    for name, value in vars(module).items()
    if not name.startswith("_") and not isinstance(value, types.ModuleType)
  } - BORROWED


def test_has_every_public_name_of_flax():
  assert public(reference) - {"CAN_USE_EARRAY"} <= set(fp8_ops.__all__)


@pytest.mark.parametrize("name", sorted(fp8_ops.__all__))
def test_signatures_match_flax(name):
  theirs, ours = getattr(reference, name), getattr(fp8_ops, name)
  if not inspect.isfunction(inspect.unwrap(theirs)) or name.endswith("_fwd"):
    return
  want = inspect.signature(theirs).parameters
  assert list(inspect.signature(ours).parameters)[: len(want)] == list(want)


@pytest.mark.parametrize("name", ["Fp8DotGeneral", "Fp8DirectDotGeneralOp"])
def test_dense_variables_are_those_of_flax(name):
  """So checkpoints of ``flax.linen.fp8_ops`` load."""
  make = lambda ops: nn.Dense(4, dot_general_cls=getattr(ops, name)).init(jax.random.key(0), X)
  ours, theirs = make(fp8_ops), make(reference)
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_einsum_variables_are_those_of_flax():
  make = lambda ops: ops.Fp8Einsum(amax_history_length=3).init(
    jax.random.key(0), "mk,kn->mn", X, X.T
  )
  jax.tree.map(np.testing.assert_array_equal, make(fp8_ops), make(reference))


def test_fields_make_the_recipe():
  op = fp8_ops.Fp8DotGeneral(amax_history_length=7, e4m3_dtype=jnp.float8_e4m3fnuz)
  assert op.recipe == fp8.DelayedScaling(
    amax_history_len=7,
    fp8_format=fp8.Format(fp8.Format.HYBRID_FNUZ.forward, fp8.Format.HYBRID.backward),
  )


@pytest.mark.parametrize("field", ["e4m3_dtype", "e5m2_dtype"])
def test_other_dtypes_are_refused(field):
  with pytest.raises(ValueError, match=rf"{field} must be one of .*int8"):
    nn.Dense(4, dot_general_cls=lambda: fp8_ops.Fp8DotGeneral(**{field: jnp.int8})).init(
      jax.random.key(0), X
    )


def test_result_has_the_kernels_dtype():
  module = fp8_ops.Fp8DotGeneral()
  dims = (((1,), (0,)), ((), ()))
  kernel = jnp.ones((16, 2), jnp.bfloat16)
  out, _ = module.init_with_output(jax.random.key(0), X, kernel, dims)
  assert out.dtype == jnp.bfloat16


def test_a_precision_is_ignored_with_a_warning():
  dense = nn.Dense(4, precision="highest", dot_general_cls=fp8_ops.Fp8DotGeneral)
  with pytest.warns(UserWarning, match=r"Fp8DirectDotGeneralOp: .* is ignored"):
    dense.init(jax.random.key(0), X)
  with pytest.warns(UserWarning, match=r"Fp8Einsum: .* is ignored"):
    fp8_ops.Fp8Einsum().init(jax.random.key(0), "mk,kn->mn", X, X.T, precision="highest")


WARNED = {
  "Fp8DirectDotGeneralOp": "float8_e4m3fn",
  "Fp8DotGeneralOp": "float8_e4m3fn",
  "NANOOFp8DotGeneralOp": "float8_e4m3fnuz",
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
class TestDevices:
  """The modules run on any device, as in Flax, but with a warning."""

  def shapes(self, *names):
    model = nn.Sequential([nn.Dense(8, dot_general_cls=getattr(fp8_ops, name)) for name in names])
    return jax.eval_shape(model.init, KEY, X)

  @pytest.mark.parametrize("name", WARNED)
  def test_without_fp8(self, described, name):
    match = rf"^{name}: NVIDIA A100.*no FP8.*wider type, which is correct but slow"
    with jax.default_device(described("a100")), pytest.warns(UserWarning, match=match):
      self.shapes(name)

  def test_einsum(self, described):
    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    init = lambda x: fp8_ops.Fp8Einsum().init(KEY, "mk,kn->mn", x, x)
    match = r"^Fp8Einsum: NVIDIA A100.*no FP8"
    with jax.default_device(described("a100")), pytest.warns(UserWarning, match=match):
      jax.eval_shape(init, x)

  @pytest.mark.parametrize(("name", "dtype"), WARNED.items())
  def test_by_their_dtypes(self, described, name, dtype):
    with jax.default_device(described("h100")), warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter("always", UserWarning)
      self.shapes(name)
    messages = [str(w.message) for w in caught if w.category is UserWarning]
    assert len(messages) == (dtype == "float8_e4m3fnuz")
    assert all(f"not {dtype}" in message for message in messages)

  def test_a_model_warns_once(self, described):
    """With Python's default filters, which show a warning once for each source line."""
    with jax.default_device(described("a100")), warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter("default")
      self.shapes(*["Fp8DotGeneral"] * 3)
      self.shapes(*["Fp8DotGeneral"] * 2)
    assert len(caught) == 1

  def test_cpu_is_silent(self):
    with warnings.catch_warnings():
      warnings.simplefilter("error", UserWarning)
      self.shapes(*WARNED)


DEPRECATED = {
  "Fp8DotGeneralOp": "flax_fp8.Fp8DotGeneral or flax_fp8.Fp8Einsum",
  "NANOOFp8DotGeneralOp": r"flax_fp8.Fp8DotGeneral with .*HYBRID_FNUZ",
}


@pytest.mark.parametrize(("name", "replacement"), DEPRECATED.items())
def test_deprecated_classes_name_their_replacement(name, replacement):
  with pytest.warns(DeprecationWarning, match=f"{name} is deprecated.*{replacement}"):
    getattr(fp8_ops, name)()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DEPRECATED)
def test_deprecated_classes_compute_as_flaxs(name):
  def step(ops):
    module = nn.Dense(8, dot_general_cls=getattr(ops, name))
    variables = module.init(jax.random.key(0), X)
    gradient = jax.jit(jax.value_and_grad(lambda v: jnp.sum(jnp.sin(module.apply(v, X)))))
    for _ in range(3):
      value, grads = gradient(variables)
      variables = {**variables, OWG: grads[OWG]}
    return value, grads

  jax.tree.map(np.testing.assert_array_equal, step(fp8_ops), step(reference))


def test_dtype_names():
  assert fp8_ops.fm32 is fp8_ops.fp32_max_grad is fp8.fp32_max_grad
  assert fp8_ops.fp8_meta_dtype_wrapper(jnp.float32) == fp8_ops.fm32
  assert jnp.issubdtype(fp8_ops.fm32, fp8_ops.fp8_meta_dtype)
