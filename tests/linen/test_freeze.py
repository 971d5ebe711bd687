"""A frozen model gives the outputs of the trained model from half the bytes of BF16."""

import dataclasses
import functools
from itertools import cycle

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import flax_fp8 as fp8
from flax_fp8.training.paths import leaves_by_path
from tests.linen import lifts
from tests.linen.convert.models import CASES, D, normal

OWG = fp8.OVERWRITE_WITH_GRADIENT
KEY = jax.random.key(0)
RECIPES = {
  "delayed": fp8.DelayedScaling(amax_history_len=4),
  "interval": fp8.DelayedScaling(
    amax_history_len=4, amax_compute_algo="most_recent", interval=3, margin=1, power_of_two=True
  ),
  "fprop_kept": fp8.DelayedScaling(amax_history_len=4, high_precision=("fprop",)),
  "current": fp8.Float8CurrentScaling(),
  "rowwise": fp8.Float8RowwiseScaling(),
  "block": fp8.Float8BlockScaling(),
  "mxfp8": fp8.MXFP8BlockScaling(),
}


def train(module, variables, args, steps=2):
  """Updates the state and keeps the parameters."""
  if OWG not in variables:
    return variables
  step = jax.jit(fp8.grad(lambda v: jnp.mean(jnp.square(module.apply(v, *args))), allow_int=True))
  for _ in range(steps):
    variables = {**variables, OWG: step(variables)[OWG]}
  return variables


def initialized(model, x):
  """Initializes, and fills the state with values that differ, as if it had seen other tensors."""
  variables = jax.jit(model.init)(KEY, *x)
  random = np.random.default_rng(0)

  def fill(path, leaf):
    steps = path[-1].key.endswith("steps_to_update")
    values = random.integers(0, 3, leaf.shape) if steps else random.uniform(0.5, 4, leaf.shape)
    return jnp.asarray(values, jnp.float32)

  return variables | {
    name: jax.tree_util.tree_map_with_path(fill, variables[name]) for name in {OWG} & {*variables}
  }


def trained(case, recipe):
  converted = fp8.fp8_linear_layers(case.model, dataclasses.replace(case.config, recipe=recipe))
  return converted, initialized(converted, case.args)


def size(tree):
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def assert_serves_the_same(module, variables, args):
  served, frozen = fp8.freeze_for_inference(module, variables, *args)
  wanted, got = jax.jit(module.apply)(variables, *args), jax.jit(served.apply)(frozen, *args)
  np.testing.assert_array_equal(got, wanted)
  assert np.all(np.isfinite(got))
  return served, frozen


EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive)
QUICK_RECIPES = ("delayed", "fprop_kept", "rowwise", "block")


@pytest.mark.parametrize(
  "recipe",
  [pytest.param(name, marks=() if name in QUICK_RECIPES else EXHAUSTIVE) for name in RECIPES],
)
def test_every_recipe_serves_the_same_bits(recipe):
  module, variables = trained(CASES["scanned"], RECIPES[recipe])
  _, frozen = assert_serves_the_same(module, variables, CASES["scanned"].args)
  assert OWG not in frozen
  # down has no bias, so it has no parameters once its kernel is removed.
  assert ("down" in frozen["params"]["layers"]["mlp"]) == (recipe == "fprop_kept")


@pytest.mark.parametrize("name", ["shared", "moe", "vmapped"])
def test_every_kind_of_model_serves_the_same_bits(name):
  module, variables = trained(CASES[name], RECIPES["delayed"])
  _, frozen = assert_serves_the_same(module, variables, CASES[name].args)
  kernels = [leaf for leaf in jax.tree.leaves(frozen) if leaf.dtype == jnp.float8_e4m3fn]
  assert len(kernels) == len(CASES[name].fp8_layers)


class HandEdited(nn.Module):
  @nn.compact
  def __call__(self, x):
    recipe = RECIPES["delayed"]
    x = nn.DenseGeneral((2, D), dot_general_cls=recipe.dot_general_cls)(x)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (2 * D, D))
    y = recipe.einsum_cls()("km,bk->bm", kernel.reshape(2 * D, D), x.reshape(-1, 2 * D))
    doubled = fp8.fp8_ops.Fp8Einsum()("bk,km->bm", x.reshape(-1, 2 * D), 2 * kernel)
    return y + doubled


def test_a_hand_edited_model_and_kernels_computed_from_parameters():
  model, x = HandEdited(), normal(4, D)
  variables = initialized(model, (x,))
  _, frozen = assert_serves_the_same(model, variables, (x,))
  assert "kernel" in frozen["fp8_frozen"]["DenseGeneral_0"]["Fp8DotGeneral_0"]
  # Twice a parameter is not a parameter, so the parameter stays and is quantized in each run.
  assert "kernel" in frozen["params"]
  assert "kernel" not in frozen["fp8_frozen"]["Fp8Einsum_1"]


class Fused(nn.Module):
  scales: str = "joint"

  @nn.compact
  def __call__(self, x):
    options = {"kernel_scales": self.scales, "dtype": jnp.bfloat16}
    heads = fp8.Fp8FusedQKV(2, 8, num_kv_heads=1, **options)(x)
    mixed = jnp.concatenate([part.reshape(*x.shape[:-1], -1) for part in heads], -1)
    return fp8.Fp8SwiGLU(2 * D, **options)(mixed)


@pytest.mark.parametrize("scales", ["joint", "separate"])
def test_fused_projections_serve_the_same_bits(scales):
  model, x = Fused(scales), normal(4, D)
  variables = initialized(model, (x,))
  _, frozen = assert_serves_the_same(model, variables, (x,))
  # With separate scales, the kernel is computed from the parameter in each run.
  kernels = [leaf for leaf in jax.tree.leaves(frozen) if leaf.dtype == jnp.float8_e4m3fn]
  assert len(kernels) == {"joint": 3, "separate": 1}[scales]


class Wide(nn.Module):
  @nn.compact
  def __call__(self, x):
    for _ in range(2):
      x = nn.Dense(512, use_bias=False, dtype=jnp.bfloat16)(x)
    return x


@pytest.fixture(scope="module")
def wide():
  converted = fp8.fp8_linear_layers(Wide(), fp8.Fp8Config(recipe=RECIPES["delayed"]))
  x = jnp.asarray(normal(8, 512), jnp.bfloat16)
  return converted, initialized(converted, (x,)), x


def test_half_the_bytes_of_bf16_in_memory_and_on_disk(wide, tmp_path):
  converted, variables, x = wide
  _, frozen = fp8.freeze_for_inference(converted, variables, x)
  bf16 = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables["params"])
  assert size(frozen) <= 0.55 * size(bf16)
  on_disk = {}
  with ocp.StandardCheckpointer() as checkpointer:
    for name, tree in {"frozen": frozen, "bf16": bf16}.items():
      checkpointer.save(tmp_path / name, tree)
      checkpointer.wait_until_finished()
      files = (f for f in (tmp_path / name).rglob("*") if f.is_file())
      on_disk[name] = sum(f.stat().st_size for f in files)
  # The checkpoint is compressed and has metadata. Random BF16 data compresses slightly better.
  assert on_disk["frozen"] <= 0.55 * on_disk["bf16"]


def test_a_checkpoint_is_restored_by_shapes_alone(wide, tmp_path):
  converted, variables, x = wide
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
  served, frozen = fp8.freeze_for_inference(converted, variables, x)
  abstract_x = jax.ShapeDtypeStruct(x.shape, x.dtype)
  same, target = fp8.freeze_for_inference(converted, shapes, abstract_x)
  assert same == served
  fp8.save_checkpoint(tmp_path / "frozen", frozen)
  restored = fp8.restore_checkpoint(tmp_path / "frozen", target).tree
  jax.tree.map(np.testing.assert_array_equal, restored, frozen)


def test_is_exported(wide):
  converted, variables, x = wide
  served, frozen = fp8.freeze_for_inference(converted, variables, x)
  exported = jax.export.export(jax.jit(served.apply))(frozen, x)
  loaded = jax.export.deserialize(exported.serialize())
  np.testing.assert_array_equal(loaded.call(frozen, x), jax.jit(converted.apply)(variables, x))


def test_the_compiled_program_reads_fp8_kernels_and_quantizes_none(wide):
  converted, variables, x = wide
  served, frozen = fp8.freeze_for_inference(converted, variables, x)
  report = fp8.explain(served.apply, frozen, x, target="h100")
  assert (report.fp8_gemms, report.total_gemms) == (2, 2)
  # The arguments are FP8 kernels, scales and x. There are no arrays of NaN and no wide kernels.
  assert report.memory.argument < 2 * 512 * 512 + x.nbytes + 200
  # No kernel is transposed, quantized or read twice, so most of the traffic is one read of each.
  moved = sum((kernel.read + kernel.written) * kernel.times for kernel in report.kernels)
  assert moved < 1.5 * 2 * 512 * 512


def test_bind_and_methods_serve_too():
  case = CASES["setup"]
  module, variables = trained(case, RECIPES["delayed"])
  served, frozen = fp8.freeze_for_inference(module, variables, *case.args)
  z = module.apply(variables, *case.args, method="encode")
  np.testing.assert_array_equal(served.apply(frozen, *case.args, method="encode"), z)
  np.testing.assert_array_equal(served.bind(frozen).encoder(*case.args), z)


class Tripled(nn.Dense):
  def param(self, name, *args, **kwargs):
    value = super().param(name, *args, **kwargs)
    return 3 * value if name == "kernel" else value


def masked():
  return lambda x, kernel, *args, **kwargs: fp8.Fp8DotGeneral()(
    x, jnp.tril(kernel), *args, **kwargs
  )


class Lifted(nn.Module):
  lift: object

  @nn.compact
  def __call__(self, x):
    return self.lift(nn.Dense)(D, dot_general_cls=fp8.Fp8DotGeneral)(x)


class Stacked(nn.Module):
  @nn.compact
  def __call__(self, x):
    layer = lambda scope, x: (nn.Dense(D, dot_general_cls=fp8.Fp8DotGeneral)(x), None)
    return fp8.scan(layer, {"params": 0}, split_rngs={"params": True}, length=2)(self, x)[0]


def transposed(x, kernel, dimension_numbers, **kwargs):
  """Contracts along the other axis of a square kernel."""
  del dimension_numbers
  return fp8.Fp8DotGeneral()(x, kernel.T, (((1,), (0,)), ((), ())), **kwargs)


CHANGED = {
  "a subclass": (Tripled(D, dot_general_cls=fp8.Fp8DotGeneral), False),
  "a subclass, cast": (Tripled(D, dtype=jnp.bfloat16, dot_general_cls=fp8.Fp8DotGeneral), False),
  "a function": (nn.Dense(D, dot_general_cls=masked), False),
  "WeightNorm": (
    nn.WeightNorm(
      nn.Dense(D, dot_general_cls=fp8.Fp8DotGeneral), variable_filter={"layer_instance/kernel"}
    ),
    False,
  ),
  "twice cast": (
    nn.Dense(
      D,
      dot_general_cls=lambda: (
        lambda x, kernel, *args, **kwargs: fp8.Fp8DotGeneral()(
          x, kernel.astype(jnp.bfloat16).astype(jnp.float32), *args, **kwargs
        )
      ),
    ),
    False,
  ),
  "transposed": (nn.Dense(D, dot_general_cls=lambda: transposed), True),
  "remat": (Lifted(nn.remat), True),
  "jit": (Lifted(nn.jit), True),
  "scanned": (Stacked(), True),
}


@pytest.mark.parametrize(("model", "stored"), CHANGED.values(), ids=CHANGED)
def test_only_a_kernel_that_is_the_parameter_is_stored(model, stored):
  x = normal(4, D)
  variables = initialized(model, (x,))
  _, frozen = assert_serves_the_same(model, variables, (x,))
  assert stored == any(leaf.dtype == jnp.float8_e4m3fn for leaf in jax.tree.leaves(frozen))


class LooksUp(nn.Module):
  """A lookup table that is also the kernel of the head, and a penalty on another kernel."""

  @nn.compact
  def __call__(self, ids):
    table = self.param("table", nn.initializers.normal(0.1), (32, D))
    layer = nn.Dense(D, dot_general_cls=fp8.Fp8DotGeneral, name="layer")
    x = layer(table[ids])
    penalty = jnp.sum(layer.variables["params"]["kernel"] ** 2)
    return fp8.Fp8DotGeneral()(x, table.T, (((1,), (0,)), ((), ()))) + penalty


def test_a_kernel_with_other_uses_stays():
  model, ids = LooksUp(), jnp.arange(4)
  variables = jax.jit(model.init)(KEY, ids)
  served, frozen = fp8.freeze_for_inference(model, variables, ids)
  jax.tree.map(np.testing.assert_array_equal, frozen["params"], variables["params"])
  np.testing.assert_array_equal(
    jax.jit(served.apply)(frozen, ids), jax.jit(model.apply)(variables, ids)
  )


class Flagged(nn.Module):
  @nn.compact
  def __call__(self, x, flag=False, twice=False):
    einsum = fp8.Fp8Einsum(recipe=RECIPES["current"])
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (D, D))
    y = einsum("mk,kn->mn", x, 2 * kernel if flag else kernel)
    return y + einsum("mk,nk->mn", x, kernel) if twice else y

  def decode(self, x):
    return self(x, flag=True)


def test_a_kernel_used_in_two_layouts_is_not_stored():
  model, x = Flagged(), normal(4, D)
  variables = jax.jit(model.init)(KEY, x)
  served, frozen = fp8.freeze_for_inference(model, variables, x, twice=True)
  want = jax.jit(lambda v: model.apply(v, x, twice=True))(variables)
  got = jax.jit(lambda v: served.apply(v, x, twice=True))(frozen)
  np.testing.assert_array_equal(got, want)


def test_another_kernel_than_the_frozen_one_raises():
  model, x = Flagged(), normal(4, D)
  variables = jax.jit(model.init)(KEY, x)
  served, frozen = fp8.freeze_for_inference(model, variables, x)
  np.testing.assert_array_equal(
    jax.jit(served.apply)(frozen, x), jax.jit(model.apply)(variables, x)
  )
  for how in ({"flag": True}, {"twice": True}, {"method": "decode"}):
    with pytest.raises(ValueError, match=r"got another kernel at 'Fp8Einsum_0'. Freeze it with"):
      served.apply(frozen, x, **how)


def test_bad_input(wide):
  converted, variables, x = wide
  freeze = fp8.freeze_for_inference
  with pytest.raises(TypeError, match="must be an instance of a Linen module"):
    freeze(Wide, variables, x)
  with pytest.raises(ValueError, match=r"with the collection 'params'; got \['Dense_0'"):
    freeze(converted, variables["params"], x)
  with pytest.raises(ValueError, match="must have at least one FP8 contraction; got none in Wide"):
    freeze(Wide(), {"params": variables["params"]}, x)
  with pytest.raises(ValueError, match="needs the collection '_overwrite_with_gradient'"):
    freeze(converted, {"params": variables["params"]}, x)
  served, frozen = freeze(converted, variables, x)
  assert not served.init(KEY, x)
  with pytest.raises(ValueError, match=r"needs the collection 'fp8_frozen'; got .* 'Dense_0/Fp8"):
    served.apply({"params": frozen["params"]}, x)


MAKE = {"written": lifts.written, "converted": lifts.converted}
LIFTED = [
  *(("written", name, "delayed") for name in lifts.LIFTS),
  *(("written", name, recipe) for name, recipe in (("1", "block"), ("-1", "mxfp8"))),
  ("converted", "-1", "delayed"),
  ("converted", "0 in -1", "block"),
  ("converted", "scan in vmap 1", "delayed"),
]
QUICK = {
  *("0 in -1", "params 0 in 1, state 1 in 0", "params 1 in all, state all in 1"),
  *("params for all, state 1", "params 1, state for all"),
}
SLOW = [  # stateless recipes ignore the axes of state
  *(("written", *case) for case in zip(lifts.CONVERTIBLE, cycle(("rowwise", "block", "mxfp8")))),
  *(("converted", name, "delayed") for name in lifts.CONVERTIBLE[::2]),
]


def lifted_cases():
  for case in dict.fromkeys([*LIFTED, *SLOW]):
    slow = case not in LIFTED or case[1] not in QUICK or case[2] == "mxfp8"
    yield pytest.param(*case, marks=EXHAUSTIVE if slow else (), id=", ".join(case))


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(("make", "name", "recipe"), [*lifted_cases()])
def test_axes_of_lifted_transformations_anywhere(make, name, recipe):
  model = MAKE[make](name, RECIPES[recipe])
  variables = initialized(model, (lifts.X,))
  _, frozen = assert_serves_the_same(model, variables, (lifts.X,))
  # A kernel that the steps share, with a scale for each step, stays a parameter.
  shared = recipe == "delayed" and name in (
    "params for all, state 1",
    "params 1 in all, state all in 1",
  )
  kernels = [leaf for leaf in jax.tree.leaves(frozen) if leaf.dtype == jnp.float8_e4m3fn]
  assert len(kernels) == (0 if shared else 2)
  state = leaves_by_path(variables.get(OWG, {}))
  for path, leaf in leaves_by_path(frozen["fp8_frozen"]).items():
    if "input" in path:
      scale = state[path.replace("amax_history", "scale")]
      assert leaf.shape == scale.shape


def test_a_frozen_stack_has_the_axes_of_its_parameter():
  for name, axes in (("0", (0, 1, 2)), ("1", (1, 0, 2)), ("-1", (2, 0, 1))):
    model = lifts.written(name, RECIPES["delayed"])
    shapes = jax.eval_shape(model.init, KEY, lifts.X)
    _, frozen = fp8.freeze_for_inference(model, shapes, lifts.X)
    up = frozen["fp8_frozen"]["below"]["body"]["up"]["Fp8DotGeneral_0"]
    stack, *rest = (up["kernel"].shape[axis] for axis in axes)
    assert (stack, rest) == (3, [lifts.F, lifts.D])
    assert up["kernel_scale"].size == 3
    assert up["kernel_scale"].ndim == (1 if name == "0" else 3)


class Decoder(nn.Module):
  """Layers under a scan. With ``steps``, a loop runs all of them in each step."""

  @nn.compact
  def __call__(self, x, steps=None):
    stack = lifts.Scanned((1,), (1,), (2,), RECIPES["delayed"].dot_general_cls, name="stack")
    if steps is None:
      return stack(x)
    loop = nn.scan(
      lambda stack, x, _: (stack(x), None),
      variable_broadcast=("params", OWG),
      split_rngs={"params": False},
      length=steps,
    )
    return loop(stack, x, None)[0]


def test_a_loop_around_frozen_layers():
  model = Decoder()
  variables = initialized(model, (lifts.X,))
  served, frozen = fp8.freeze_for_inference(model, variables, lifts.X)
  want = jax.jit(lambda v: model.apply(v, lifts.X, steps=3))(variables)
  got = jax.jit(lambda v: served.apply(v, lifts.X, steps=3))(frozen)
  np.testing.assert_array_equal(got, want)


FIRST = fp8.DelayedScaling(
  first_step="current", amax_history_len=4, amax_compute_algo="most_recent"
)


class Query(nn.Module):
  """A decoder whose queries start at zero."""

  recipe: object

  @nn.compact
  def __call__(self, x):
    queries = self.param("queries", nn.initializers.zeros, (4, D))
    layer = functools.partial(nn.Dense, D, dot_general_cls=self.recipe.dot_general_cls)
    twice = self.recipe.einsum_cls(name="twice")
    kernel = self.param("kernel", nn.initializers.zeros, (D, D))
    return layer(name="query")(queries) + layer(name="key")(x) + twice("mk,kn->mn", x, 2 * kernel)


def amaxes_read(served, frozen, x):
  return str(jax.make_jaxpr(served.apply)(frozen, x)).count("reduce_max")


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("interval", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_tensor_that_was_always_zero(interval):
  recipe = dataclasses.replace(FIRST, interval=interval)
  model, x = Query(recipe), normal(4, D)
  variables = jax.jit(model.init)(KEY, x)
  calibrated = fp8.calibrate(model, variables, [x, 2 * x], progress=False)
  run = jax.jit(model.apply)
  for each in (variables, calibrated, train(model, calibrated, (x,))):
    served, frozen = fp8.freeze_for_inference(model, each, x)
    serve = jax.jit(served.apply)
    for other in ({}, {"queries": 3 * normal(4, D), "kernel": 5 * normal(D, D)}):
      want = run({**each, "params": each["params"] | other}, x)
      got = serve({**frozen, "params": frozen["params"] | other}, x)
      assert np.all(np.isfinite(got))
      np.testing.assert_array_equal(got, want)
  # With shapes only, every tensor may be unseen.
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
  served, like = fp8.freeze_for_inference(model, shapes, x)
  assert jax.tree.map(jnp.shape, like) == jax.tree.map(jnp.shape, frozen)
  np.testing.assert_array_equal(jax.jit(served.apply)(frozen, x), run(each, x))


def test_seen_tensors_are_not_read_for_their_amax():
  layer, x = nn.Dense(D, dot_general_cls=FIRST.dot_general_cls), normal(4, D)
  variables = jax.jit(layer.init)(KEY, x)
  assert amaxes_read(*assert_serves_the_same(layer, variables, (x,)), x) > 0
  variables = fp8.calibrate(layer, variables, [x], progress=False)
  assert amaxes_read(*assert_serves_the_same(layer, variables, (x,)), x) == 0
  # Only the newest amax in the history is zero.
  variables = fp8.calibrate(layer, variables, [0 * x], progress=False)
  assert amaxes_read(*assert_serves_the_same(layer, variables, (x,)), x) == 0


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["1", pytest.param("vmap 1", marks=pytest.mark.slow)])
def test_stacks_without_recorded_amaxes(name):
  model = lifts.written(name, FIRST)
  assert_serves_the_same(model, lifts.trained(model, steps=0), (lifts.X,))


class Teacher(nn.Module):
  cls: object

  @nn.compact
  def __call__(self, x):
    return nn.Dense(D, dot_general_cls=self.cls)(x)


class Nested(nn.Module):
  """A layer, and a layer with the same path in a nested ``apply`` or ``bind``."""

  cls: object
  how: str

  @nn.compact
  def __call__(self, x):
    inner = Teacher(self.cls, parent=None)
    if self.how != "own variables":
      x = nn.Dense(D, dot_general_cls=self.cls)(x)
      params = self.param("teacher", lambda key: inner.init(key, x))
      return inner.bind(params)(x) if self.how == "bind" else inner.apply(params, x)
    own = Teacher(self.cls, name="own")
    x = own(x)
    return inner.apply(own.variables, x)


@pytest.mark.parametrize(
  ("recipe", "how"),
  [
    ("delayed", "a parameter"),
    ("delayed", "bind"),
    ("delayed", "own variables"),
    ("rowwise", "own variables"),
  ],
)
def test_a_model_that_is_run_by_a_nested_apply(recipe, how):
  model, x = Nested(RECIPES[recipe].dot_general_cls, how), normal(4, D)
  variables = initialized(model, (x,))
  served, frozen = assert_serves_the_same(model, variables, (x,))
  kernels = [leaf for leaf in jax.tree.leaves(frozen) if leaf.dtype == jnp.float8_e4m3fn]
  assert len(kernels) == (how != "own variables")
  _, new = served.apply(frozen, x, mutable=True)
  assert leaves_by_path(new).keys() == leaves_by_path(frozen).keys() - {
    path for path in leaves_by_path(frozen) if path.startswith("fp8_frozen")
  }


class Tied(nn.Module):
  """One kernel in three contractions: as stored, transposed, and in high precision."""

  recipe: object

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (D, D))
    kept = dataclasses.replace(self.recipe, high_precision=("fprop",))
    x = self.recipe.einsum_cls(name="first")("mk,kn->mn", x, kernel)
    x = self.recipe.einsum_cls(name="second")("mk,kn->mn", x, kernel.T)
    return kept.einsum_cls(name="third")("mk,kn->mn", x, kernel)


@pytest.mark.parametrize("recipe", ["delayed", "rowwise"])
def test_a_parameter_that_another_contraction_reads_is_not_removed(recipe):
  model, x = Tied(RECIPES[recipe]), normal(4, D)
  _, frozen = assert_serves_the_same(model, initialized(model, (x,)), (x,))
  assert "kernel" in frozen["params"]


class Later(nn.Module):
  @nn.compact
  def __call__(self, x, more=False):
    first, second = (nn.Dense(D, name=name) for name in ("first", "second"))
    x = first(x)
    return second(x) if more or self.is_initializing() else x


def test_a_contraction_that_was_not_frozen_raises():
  converted, x = fp8.fp8_linear_layers(Later()), normal(4, D)
  variables = jax.jit(converted.init)(KEY, x)
  served, frozen = fp8.freeze_for_inference(converted, variables, x)
  with pytest.raises(ValueError, match=r"got another contraction at 'second/Fp8DotGeneral_0'"):
    served.apply(frozen, x, more=True)
