"""``Fp8Config``: the layers that the rules select, and the report of the dry run."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import flax_fp8 as fp8
from flax_fp8.linen.convert import DEFAULT_EXCLUSIONS, Layer
from tests.linen.convert.models import CASES, Block, Mlp, MoeModel, Scanned, Shared, normal

X = jax.ShapeDtypeStruct((4, 16), jnp.float32)


class Decoder(nn.Module):
  """A model with common layer names."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(32, name="patch_embed")(x)
    for i in range(3):
      x = Mlp(32, name=f"layers_{i}")(x)
    weight = nn.Dense(4, name="gate")(nn.Dense(32, name="router")(x))
    wide = nn.Dense(64, name="gate_proj")(x)
    return nn.Dense(48, name="lm_head")(wide) * weight.sum()


def rules(config, model=None, *args):
  report = config.report(model or Decoder(), *(args or (X,)))
  return {row.layer.path: row.rule for row in report.rows}


def taken(config, model=None, *args):
  return [row.layer.path for row in config.report(model or Decoder(), *(args or (X,))).taken]


BLOCKS = [f"layers_{i}/{name}" for i in range(3) for name in ("Dense_0", "down")]


def test_default_exclusions_appear_in_the_report():
  said = rules(fp8.Fp8Config())
  assert said.pop("patch_embed") == "embedding, by default"
  assert said.pop("router") == "router, by default"
  assert said.pop("gate") == "router, by default"
  assert said.pop("lm_head") == "output head, by default"
  assert said == dict.fromkeys([*BLOCKS, "gate_proj"], "target '*'")


def test_a_wide_gate_is_not_a_router():
  gate = Layer(path="mlp/gate", kind="Dense", inputs=1, contracted=4096, features=14336)
  router = Layer(path="moe/gate", kind="Dense", inputs=1, contracted=4096, features=8)
  assert not any(exclusion.applies(gate) for exclusion in DEFAULT_EXCLUSIONS)
  assert any(exclusion.applies(router) for exclusion in DEFAULT_EXCLUSIONS)


def test_default_exclusions_can_be_dropped():
  assert "lm_head" in taken(fp8.Fp8Config(default_exclude=()))


@pytest.mark.parametrize(
  "targets",
  ["layers_1/*", re.compile(r"layers_1\b"), lambda layer: layer.path.startswith("layers_1")],
  ids=["glob", "regex", "function"],
)
def test_patterns(targets):
  assert taken(fp8.Fp8Config(targets=targets)) == BLOCKS[2:4]
  excluded = taken(fp8.Fp8Config(exclude=targets))
  assert excluded == [*BLOCKS[:2], *BLOCKS[4:], "gate_proj"]


def test_skips_count_all_linear_layers_in_the_order_of_their_calls():
  config = fp8.Fp8Config(skip_first=2, skip_last=2, default_exclude=())
  said = rules(config)
  assert {path for path, rule in said.items() if rule == "skip_first=2"} == {
    "patch_embed",
    "layers_0/Dense_0",
  }
  assert {path for path, rule in said.items() if rule == "skip_last=2"} == {
    "gate_proj",
    "lm_head",
  }


def test_skips_hold_when_the_converted_module_runs():
  config = fp8.Fp8Config(skip_first=1)
  variables = jax.jit(fp8.fp8_linear_layers(Mlp(), config).init)(jax.random.key(0), normal(4, 16))
  assert variables[fp8.OVERWRITE_WITH_GRADIENT].keys() == {"down"}


def test_skips_need_the_whole_model():
  case = CASES["setup"]
  config = fp8.Fp8Config(skip_last=1)
  unknown = fp8.fp8_linear_layers(case.model, config)
  variables = jax.jit(unknown.init)(jax.random.key(0), *case.args)
  with pytest.raises(ValueError, match=r"need the layers of the whole model; got the method"):
    unknown.apply(variables, *case.args, method="encode")
  known = fp8.fp8_linear_layers(case.model, config, *case.args)
  known.apply(variables, *case.args, method="encode")


def test_skips_cannot_split_a_scan():
  with pytest.raises(ValueError, match=r"layers/mlp/Dense_0.*one program for 3 layers"):
    fp8.Fp8Config(skip_first=1).report(Scanned(), X)


def test_sizes():
  said = rules(fp8.Fp8Config(multiple_of=32, min_kernel_size=1025), Mlp(48), X)
  assert said["Dense_0"] == "contracted 16 not a multiple of 32"
  assert said["down"] == "features 48 not a multiple of 32"
  said = rules(fp8.Fp8Config(min_kernel_size=513), Mlp(), X)
  assert said["down"] == "kernel size 512 below 513"


def test_recipes_by_path():
  wgrad = fp8.Float8CurrentScaling(high_precision=("wgrad",))
  config = fp8.Fp8Config(recipes={"*down": wgrad})
  by_path = {row.layer.path: row.recipe for row in config.report(Mlp(), X).rows}
  assert by_path == {"Dense_0": fp8.DelayedScaling(), "down": wgrad}
  variables = jax.jit(fp8.fp8_linear_layers(Mlp(), config).init)(jax.random.key(0), normal(4, 16))
  assert variables[fp8.OVERWRITE_WITH_GRADIENT].keys() == {"Dense_0"}


def test_report_counts_calls_and_stacked_layers():
  shared = {row.layer.path: row for row in fp8.Fp8Config().report(Shared(), X).rows}
  assert (shared["layer"].calls, shared["common"].calls, shared["a/Dense_0"].calls) == (3, 2, 1)
  scanned = {row.layer.path: row for row in fp8.Fp8Config().report(Scanned(layers=5), X).rows}
  row = scanned["layers/mlp/Dense_0"]
  assert (row.calls, row.stacked) == (1, 5)


def kept_for_backward(module, x):
  variables = jax.eval_shape(module.init, jax.random.key(0), x)
  pull_back = jax.eval_shape(lambda v, x: jax.vjp(module.apply, v, x)[1], variables, x)
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull_back))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bytes_saved_match_the_residuals_that_jax_stores(dtype):
  model = nn.Dense(512, dtype=dtype, use_bias=False)
  x = jax.ShapeDtypeStruct((1024, 256), jnp.dtype(dtype))
  config = fp8.Fp8Config(recipe=fp8.DelayedScaling(amax_history_len=16))
  converted = fp8.fp8_linear_layers(model, config)
  saved = kept_for_backward(model, x) - kept_for_backward(converted, x)
  # Beside the state: the operands' scales, and as one array scale and amax of both operands and
  # scale and inverse of the output gradient.
  scales = (2 + 6) * 4
  parameter = 256 * 512 * 4 if dtype == "float32" else 0  # in memory with and without FP8
  assert config.report(model, x).rows[0].bytes_saved == saved + scales - parameter


def test_report_is_a_table(monkeypatch):
  monkeypatch.setenv("COLUMNS", "120")
  config = fp8.Fp8Config(functions="moe")
  text = str(config.report(MoeModel(), jax.ShapeDtypeStruct((2, 3, 16), jnp.float32)))
  assert re.search(r"moe/Fp8Einsum_1 +jnp\.einsum +4 x 32 x 16 +1 +delayed", text)
  assert re.search(r"moe/router +Dense +16 x 4 +1 +no +router, by default", text)
  assert "3 of 4 layers become FP8" in text
  assert (
    "| heads | Einsum |"
    in config.report(MoeModel(), jax.ShapeDtypeStruct((2, 3, 16), jnp.float32)).to_markdown()
  )


def test_report_of_a_converted_module_is_that_of_its_model():
  assert taken(fp8.Fp8Config(), fp8.fp8_linear_layers(Mlp())) == ["Dense_0", "down"]


@pytest.mark.parametrize("field", ["targets", "exclude", "recipes"])
def test_an_unmatched_pattern_lists_close_matches(field):
  value = {"*/dwn": fp8.Float8CurrentScaling()} if field == "recipes" else ("*", "*/dwn")
  config = fp8.Fp8Config(**{field: value})
  message = rf"'\*/dwn' in {field}, which matches none of 11\. Close matches: \['layers_0/down'"
  with pytest.raises(ValueError, match=message):
    config.report(Decoder(), X)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(fp8.fp8_linear_layers(Decoder(), config).init, jax.random.key(0), X)
  with pytest.raises(ValueError, match=message):
    fp8.fp8_linear_layers(Decoder(), config, X)


def test_an_unmatched_pattern_is_found_by_apply_too():
  config = fp8.Fp8Config(recipe=fp8.Float8CurrentScaling(), exclude="*/dwn")
  variables = jax.jit(Mlp().init)(jax.random.key(0), normal(4, 16))
  with pytest.raises(ValueError, match=r"every pattern must match a layer; got '\*/dwn'"):
    fp8.fp8_linear_layers(Mlp(), config).apply(variables, normal(4, 16))


class Staged(nn.Module):
  """A model that may run only some of its layers."""

  @nn.compact
  def __call__(self, x, stages=2):
    x = nn.Dense(20, name="narrow")(x)
    return nn.Dense(32, name="wide")(nn.Dense(16, name="last")(x)) if stages == 2 else x


def test_patterns_may_match_layers_that_a_run_does_not_execute():
  config = fp8.Fp8Config(targets=("narrow", "wide"))
  converted = fp8.fp8_linear_layers(Staged(), config)
  variables = jax.jit(converted.init)(jax.random.key(0), normal(4, 16))
  assert converted.apply(variables, normal(4, 16), stages=1).shape == (4, 20)


def test_a_predicate_selects_functions():
  config = fp8.Fp8Config(functions=lambda layer: layer.path == "moe")
  assert "moe/Fp8Einsum_0" in taken(config, MoeModel(), normal(2, 3, 16))


def test_functions_that_match_no_call():
  words = r"must match a module that itself calls.*got 'heads'.*Modules with such calls: \['moe'\]"
  with pytest.raises(ValueError, match=words):
    fp8.Fp8Config(functions="heads").report(MoeModel(), normal(2, 3, 16))


def test_a_config_that_selects_no_layer_raises():
  config = fp8.Fp8Config(min_kernel_size=10**6)
  with pytest.raises(ValueError, match=r"got none of 2, by the rules {'kernel size 512 below"):
    fp8.fp8_linear_layers(Mlp(), config, X)
  with pytest.raises(ValueError, match=r"got none of 2"):
    jax.eval_shape(fp8.fp8_linear_layers(Mlp(), config).init, jax.random.key(0), X)


@pytest.mark.parametrize(
  ("fields", "error", "message"),
  [
    ({"recipe": "delayed"}, TypeError, "recipe must be a recipe"),
    ({"recipes": {"*": "delayed"}}, TypeError, "recipe must be a recipe"),
    ({"recipes": ("*",)}, TypeError, "recipes must pair patterns with recipes"),
    ({"targets": 3}, TypeError, "targets must be patterns; got targets=3"),
    (
      {"exclude": ("*", None)},
      TypeError,
      "a glob, an re.Pattern or a function of a Layer; got None",
    ),
    ({"skip_first": -1}, ValueError, "skip_first must be an integer of at least 0; got"),
    ({"multiple_of": 0}, ValueError, "multiple_of must be an integer of at least 1; got"),
  ],
)
def test_bad_fields(fields, error, message):
  with pytest.raises(error, match=re.escape(message)):
    fp8.Fp8Config(**fields)


def test_bad_modules():
  with pytest.raises(TypeError, match="must be an instance of a Linen module; got"):
    fp8.fp8_linear_layers(Block)
  with pytest.raises(TypeError, match=r"config must be an Fp8Config; got config=DelayedScaling"):
    fp8.fp8_linear_layers(Mlp(), fp8.DelayedScaling())
  bound = Mlp().bind(jax.jit(Mlp().init)(jax.random.key(0), normal(4, 16)))
  with pytest.raises(ValueError, match="module must be unbound; got Mlp bound"):
    fp8.fp8_linear_layers(bound)


def test_repr_shows_what_is_not_the_default():
  assert repr(fp8.Fp8Config(skip_first=1)) == "Fp8Config(skip_first=1)"
