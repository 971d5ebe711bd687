"""``Fp8DotGeneral`` and ``Fp8Einsum`` inside Linen's layers and lifted transformations."""

import functools
import gc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import flax_fp8 as fp8
from flax_fp8 import formats, state_cast

OWG = fp8.OVERWRITE_WITH_GRADIENT
RECIPE = fp8.DelayedScaling(amax_history_len=4)
CLS = RECIPE.dot_general_cls
KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 16)), jnp.float32)
ROLES = ("input", "kernel", "output_grad")


def flat(variables):
  return {"/".join(k): v for k, v in traverse_util.flatten_dict(variables[OWG]).items()}


def train(module, *inputs, **options):
  """Returns the variables and one jitted gradient."""
  variables = jax.jit(functools.partial(module.init, **options))(KEY, *inputs)
  loss = lambda v: jnp.sum(jnp.sin(module.apply(v, *inputs, **options)))
  return variables, jax.jit(jax.grad(loss))(variables)


class TestVariables:
  def test_names_shapes_and_values_are_those_of_flax(self):
    state = flat(nn.Dense(4, dot_general_cls=fp8.Fp8DotGeneral).init(KEY, X))
    assert set(state) == {
      f"Fp8DotGeneral_0/{role}_{kind}" for role in ROLES for kind in ("scale", "amax_history")
    }
    for name, value in state.items():
      assert value.dtype == jnp.float32
      assert value.shape == ((1,) if name.endswith("scale") else (1024,))
      assert np.all(value == (1 if name.endswith("scale") else 0))

  def test_recipe_chooses_the_length(self):
    state = flat(nn.Dense(4, dot_general_cls=CLS).init(KEY, X))
    assert state["Fp8DotGeneral_0/input_amax_history"].shape == (4,)

  def test_eval_shape(self):
    module = nn.Dense(4, dot_general_cls=CLS)
    shapes = jax.eval_shape(module.init, KEY, X)
    made = module.init(KEY, X)
    jax.tree.map(
      lambda s, v: np.testing.assert_equal((s.shape, s.dtype), (v.shape, v.dtype)), shapes, made
    )
    assert jax.eval_shape(module.apply, shapes, X).shape == (2, 6, 4)


def attention(**options):
  return nn.MultiHeadDotProductAttention(
    num_heads=4, qkv_dot_general_cls=CLS, out_dot_general_cls=CLS, **options
  )


LAYERS = {
  "Dense": (nn.Dense(8, dot_general_cls=CLS), 1),
  "Dense without bias": (nn.Dense(8, use_bias=False, dot_general_cls=CLS), 1),
  "DenseGeneral": (nn.DenseGeneral((4, 2), axis=(-2, -1), dot_general_cls=CLS), 1),
  "DenseGeneral, batched": (nn.DenseGeneral(4, batch_dims=(0,), dot_general_cls=CLS), 1),
  "attention": (attention(), 4),
}


@pytest.mark.parametrize(
  ("name", "dtype"),
  [
    ("Dense", "float32"),
    ("Dense", "bfloat16"),
    ("Dense without bias", "float16"),
    ("DenseGeneral", "bfloat16"),
    ("DenseGeneral, batched", "float16"),
    ("attention", "float32"),
  ],
)
def test_layers_train(name, dtype):
  module, sites = LAYERS[name]
  module = module.clone(dtype=jnp.dtype(dtype))
  variables, grads = train(module, X)
  state = flat(grads)
  assert len(state) == sites * 6
  for name, value in state.items():
    assert value.dtype == jnp.float32
    assert np.all(np.isfinite(value))
    if name.endswith("history"):
      assert value[0] > 0, f"{name} saw nothing"
  jax.tree.map(lambda g, p: np.testing.assert_equal(g.dtype, p.dtype), grads, variables)


@pytest.mark.parametrize(("module", "sites"), LAYERS.values(), ids=LAYERS)
def test_output_is_near_that_of_the_layer_without_fp8(module, sites):
  names = [
    f
    for f in ("dot_general_cls", "qkv_dot_general_cls", "out_dot_general_cls")
    if hasattr(module, f)
  ]
  plain = module.clone(**dict.fromkeys(names))
  variables = module.init(KEY, X)
  out, want = module.apply(variables, X), plain.apply({"params": variables["params"]}, X)
  error = np.linalg.norm(out - want) / np.linalg.norm(want)
  largest = formats.E4M3.epsilon / 2  # relative rounding error of one element of one operand
  in_series = 2 if sites > 1 else 1
  assert largest / 5 < error < largest * np.sqrt(2 * in_series)


class Expert(nn.Module):
  @nn.compact
  def __call__(self, x):
    w = self.param("w", nn.initializers.lecun_normal(), (16, 8))
    return RECIPE.einsum_cls()("tk,kn->tn", x, w)


def test_moe_state_per_expert():
  experts = nn.vmap(Expert, variable_axes={"params": 0, OWG: 0}, split_rngs={"params": True})()
  _, grads = train(experts, X)
  history = flat(grads)["Fp8Einsum_0/input_amax_history"]
  np.testing.assert_array_equal(history[:, 0], jnp.abs(X).max(axis=(1, 2)))


def test_share_scope():
  class Wrapper(nn.Module):
    layer: nn.Module

    def setup(self):
      nn.share_scope(self, self.layer)

    def __call__(self, x):
      return self.layer(x) * 2

  bare = nn.Dense(4, dot_general_cls=CLS)
  wrapped = Wrapper(bare)
  variables = bare.init(KEY, X)
  assert jax.tree.structure(variables) == jax.tree.structure(wrapped.init(KEY, X))
  np.testing.assert_array_equal(wrapped.apply(variables, X), bare.apply(variables, X) * 2)


def test_setup_style_and_several_calls():
  class Model(nn.Module):
    def setup(self):
      self.einsum = RECIPE.einsum_cls()

    def __call__(self, x):
      return self.einsum("bmk,bnk->bmn", x, x) + self.einsum("bmk,bnk->bmn", 3 * x, x)

  _, grads = train(Model(), X)
  state = flat(grads)
  assert float(state["einsum/input_amax_history"][0]) == float(3 * jnp.abs(X).max())
  assert float(state["einsum/kernel_amax_history"][0]) == float(jnp.abs(X).max())


class TestEvaluation:
  module = nn.Dense(4, dot_general_cls=CLS)

  def test_reads_state_without_changing_it(self):
    variables = self.module.init(KEY, X)
    out = self.module.apply(variables, X, mutable=False)
    again, updated = self.module.apply(variables, X, mutable=["batch_stats"])
    np.testing.assert_array_equal(out, again)
    assert OWG not in updated

  def test_works_with_max_grad_state(self):
    variables = self.module.init(KEY, X)
    out = self.module.apply(fp8.as_max_grad(variables), X)
    np.testing.assert_array_equal(out, self.module.apply(variables, X))

  def test_missing_collection(self):
    params = {"params": self.module.init(KEY, X)["params"]}
    with pytest.raises(ValueError, match=r"Fp8DotGeneral: .*'Fp8DotGeneral_0'.*upgrade_variables"):
      self.module.apply(params, X)

  def test_missing_state_of_one_layer(self):
    variables = self.module.init(KEY, X)
    two = nn.Sequential([self.module, nn.Dense(4, dot_general_cls=CLS)])
    params = two.init(KEY, X)["params"]
    with pytest.raises(ValueError, match="got variables without 'input_scale' at 'layers_1"):
      two.apply({"params": params, OWG: {"layers_0": variables[OWG]}}, X)

  def test_mutable_collection_makes_fresh_state(self):
    variables = self.module.init(KEY, X)
    _, made = self.module.apply({"params": variables["params"]}, X, mutable=[OWG])
    assert jax.tree.structure(made[OWG]) == jax.tree.structure(variables[OWG])


class TestRefusals:
  def call(self, x, **fields):
    return nn.Dense(4, **{"dot_general_cls": CLS, **fields}).init(KEY, x)

  def test_default_precision_is_fine(self):
    self.call(X, precision=jax.lax.Precision.DEFAULT)

  def test_errors_name_the_einsum(self):
    with pytest.raises(ValueError, match=r"Fp8Einsum: a label must have one size"):
      fp8.Fp8Einsum().init(KEY, "mk,kn->mn", jnp.ones((2, 3)), jnp.ones((4, 5)))
    with pytest.raises(
      ValueError, match=r"Fp8Einsum: precision must be None; got precision='high'"
    ):
      fp8.Fp8Einsum().init(KEY, "mk,kn->mn", jnp.ones((2, 3)), jnp.ones((3, 5)), precision="high")

  def test_complex_inputs(self):
    with pytest.raises(TypeError, match=r"Fp8DotGeneral: operands .*lhs of dtype complex64"):
      self.call(X.astype(jnp.complex64))

  def test_integer_operands(self):
    w = jnp.ones((16, 4), jnp.int8)
    with pytest.raises(TypeError, match=r"Fp8DotGeneral: operands .*rhs of dtype int8"):
      fp8.Fp8DotGeneral().init(KEY, X, w, (((2,), (0,)), ((), ())))

  def test_dimension_numbers(self):
    with pytest.raises(ValueError, match=r"Fp8DotGeneral: dimension_numbers must be"):
      fp8.Fp8DotGeneral().init(KEY, X, X, (((2,), (0,)), ((), ())))


E5M2 = fp8.Format(formats.E5M2, formats.E5M2)
SHAPE = jax.ShapeDtypeStruct((4, 4), jnp.float32)
DOT_DIMS = (((1,), (0,)), ((), ()))
MODULES = {
  "Fp8DotGeneral": lambda **fields: (
    lambda x, w: fp8.Fp8DotGeneral(**fields).init_with_output(KEY, x, w, DOT_DIMS)[0]
  ),
  "Fp8Einsum": lambda **fields: (
    lambda x, w: fp8.Fp8Einsum(**fields).init_with_output(KEY, "mk,kn->mn", x, w)[0]
  ),
}


@pytest.mark.parametrize("name", MODULES)
class TestDevices:
  """The default device is checked at trace time."""

  @pytest.mark.parametrize("device", ["l40s", "h100", "h200", "b200"])
  def test_with_fp8(self, described, name, device):
    with jax.default_device(described(device)):
      assert jax.eval_shape(MODULES[name](), SHAPE, SHAPE) == SHAPE

  def test_without_fp8(self, described, name):
    match = rf"{name}: .*NVIDIA A100.*\(compute capability 8.0\): no FP8.*pass emulate=True"
    with jax.default_device(described("a100")), pytest.raises(ValueError, match=match):
      jax.eval_shape(MODULES[name](), SHAPE, SHAPE)

  def test_without_the_recipes_formats(self, described, name):
    recipe = fp8.DelayedScaling(fp8_format=fp8.Format.HYBRID_FNUZ)
    match = rf"{name}: .*NVIDIA H100.*not float8_e4m3fnuz.*Use another device or recipe"
    with jax.default_device(described("h100")), pytest.raises(ValueError, match=match):
      jax.eval_shape(MODULES[name](recipe=recipe), SHAPE, SHAPE)

  def test_of_e5m2_by_e5m2(self, described, name):
    recipe = fp8.DelayedScaling(fp8_format=E5M2)
    match = rf"{name}: .*would multiply float8_e5m2 by float8_e5m2"
    with jax.default_device(described("h100")), pytest.raises(ValueError, match=match):
      jax.eval_shape(MODULES[name](recipe=recipe), SHAPE, SHAPE)

  def test_emulation_does_not_change_the_program(self, described, name):
    with jax.default_device(described("a100")):
      emulated = jax.make_jaxpr(MODULES[name](emulate=True))(SHAPE, SHAPE)
    with jax.default_device(described("h100")):
      assert str(jax.make_jaxpr(MODULES[name]())(SHAPE, SHAPE)) == str(emulated)

  def test_cpu_emulates_by_default(self, name):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 4)), jnp.float32)
    emulated = MODULES[name](emulate=True)(x, x)
    np.testing.assert_array_equal(MODULES[name]()(x, x), emulated)

  def test_lowering_for_another_platform_does_not_check_it(self, name):
    traced = jax.jit(MODULES[name]()).trace(SHAPE, SHAPE)
    assert "f8E4M3FN" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("cls", [fp8.Fp8DotGeneral, CLS], ids=["class", "recipe"])
def test_emulation_in_a_layer(described, cls):
  layer = nn.Dense(4, dot_general_cls=functools.partial(cls, emulate=True))
  with jax.default_device(described("a100")):
    shapes = jax.eval_shape(layer.init, KEY, X)
    loss = lambda v: jnp.sum(layer.apply(v, X))
    assert jax.tree.structure(jax.eval_shape(jax.grad(loss), shapes)) == jax.tree.structure(shapes)


def test_nothing_outlives_an_apply():
  module = nn.Dense(4, dot_general_cls=CLS)
  variables = module.init(KEY, X)
  gc.collect()
  before = len(state_cast._casts)  # entries of tracers that other tests hold
  with jax.checking_leaks():
    jax.jit(jax.grad(lambda v: jnp.sum(module.apply(v, X))))(variables)
  jax.grad(lambda v: jnp.sum(module.apply(v, X)))(variables)
  gc.collect()
  assert len(state_cast._casts) <= before


def test_equal_models_compile_once():
  compiled = jax.jit(lambda module, v, x: module.apply(v, x), static_argnums=0)
  make = lambda: nn.Dense(4, dot_general_cls=fp8.DelayedScaling(amax_history_len=4).dot_general_cls)
  variables = make().init(KEY, X)
  compiled(make(), variables, X)
  compiled(make(), variables, X)
  assert compiled._cache_size() == 1
