"""Converted modules behave like the original model in every use."""

import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from tests.linen.convert.models import CASES, TOKENS, AutoEncoder, ConvNet, EncoderDecoder, normal

OWG = fp8.OVERWRITE_WITH_GRADIENT
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def auto_encoder():
  converted = CASES["setup"].converted
  return converted, jax.jit(converted.init)(KEY, *CASES["setup"].args)


def test_is_of_the_same_class_and_fields():
  converted = fp8.fp8_linear_layers(EncoderDecoder(vocabulary=48))
  assert isinstance(converted, EncoderDecoder)
  assert type(converted).__name__ == "EncoderDecoder"
  assert converted.vocabulary == 48
  assert converted.clone(vocabulary=64).vocabulary == 64


def test_equal_converted_modules_compile_once():
  config = fp8.Fp8Config(recipes={"*/down": fp8.Float8CurrentScaling()})
  first, second = (fp8.fp8_linear_layers(AutoEncoder(), config) for _ in range(2))
  assert first == second
  assert hash(first) == hash(second)
  assert first != fp8.fp8_linear_layers(AutoEncoder())


def test_pickles():
  converted = fp8.fp8_linear_layers(ConvNet(), fp8.Fp8Config(min_kernel_size=2))
  assert pickle.loads(pickle.dumps(converted)) == converted


def test_converting_twice_equals_converting_once():
  current = fp8.Fp8Config(recipe=fp8.Float8CurrentScaling())
  again = fp8.fp8_linear_layers(fp8.fp8_linear_layers(AutoEncoder()), current)
  assert again == fp8.fp8_linear_layers(AutoEncoder(), current)


@pytest.mark.parametrize("method", ["encode", AutoEncoder.encode], ids=["name", "function"])
def test_apply_takes_methods(auto_encoder, method):
  converted, variables = auto_encoder
  x = CASES["setup"].args[0]
  wanted = AutoEncoder().apply(variables, x, method=method)
  got = converted.apply(variables, x, method=method)
  assert 0 < np.abs(got - wanted).max() < 0.2


def test_attributes_of_a_bound_module_run_in_fp8(auto_encoder):
  converted, variables = auto_encoder
  x = CASES["setup"].args[0]
  bound = converted.bind(variables)
  z = converted.apply(variables, x, method="encode")
  np.testing.assert_array_equal(bound.encode(x), z)
  np.testing.assert_array_equal(bound.encoder(x), z)
  whole = converted.apply(variables, x)
  np.testing.assert_array_equal(bound(x), whole)
  first, last = bound.decoders
  np.testing.assert_array_equal(bound.decoders[1](bound.decoders[0](z)), whole)
  np.testing.assert_array_equal(last(first(z)), whole)
  assert len(bound.decoders) == 2
  assert "AutoEncoder" in repr(bound)


def test_unbind_returns_the_module_and_its_variables(auto_encoder):
  converted, variables = auto_encoder
  module, found = converted.bind(variables).unbind()
  assert module == converted
  jax.tree.map(np.testing.assert_array_equal, dict(found), variables)


def test_apply_returns_the_requested_collections():
  case = CASES["convolution"]
  variables = jax.jit(case.converted.init)(KEY, *case.args)
  apply = lambda mutable: case.converted.apply(
    variables, *case.args, train=True, mutable=mutable, rngs={"dropout": KEY}
  )
  _, changed = apply(["batch_stats"])
  assert changed.keys() == {"batch_stats"}
  _, changed = apply(True)
  assert changed.keys() == {"params", "batch_stats", OWG}
  jax.tree.map(np.testing.assert_array_equal, changed[OWG], variables[OWG])


def test_intermediates_are_captured():
  case = CASES["compact"]
  variables = jax.jit(case.converted.init)(KEY, *case.args)
  _, seen = case.converted.apply(variables, *case.args, capture_intermediates=True)
  assert seen.keys() == {"intermediates"}
  assert "Fp8DotGeneral_0" in seen["intermediates"]["down"]


def test_init_returns_the_requested_collections():
  case = CASES["compact"]
  assert case.converted.init(KEY, *case.args, mutable=["params"]).keys() == {"params"}
  assert case.converted.init(KEY, *case.args, mutable=OWG).keys() == {OWG}
  shape = jax.ShapeDtypeStruct((4, 16), jnp.float32)
  assert case.converted.lazy_init(KEY, shape).keys() == {"params", OWG}


def test_tabulate_shows_the_state():
  case = CASES["compact"]
  table = case.converted.tabulate(KEY, *case.args, console_kwargs={"width": 200})
  assert "Fp8DotGeneral" in table
  assert "input_scale" in table


@pytest.mark.slow
def test_decoding_with_a_cache_matches_the_full_pass():
  case = CASES["encoder_decoder"]
  variables = jax.jit(case.converted.init)(KEY, *case.args)
  whole = case.converted.apply(variables, TOKENS, TOKENS)
  step_model = fp8.fp8_linear_layers(EncoderDecoder(decode=True))
  cache = jax.jit(step_model.init)(KEY, TOKENS, TOKENS)["cache"]
  encoded = step_model.apply(variables, TOKENS, method="encode")

  @jax.jit
  def step(cache, token):
    out, new = step_model.apply(
      {**variables, "cache": cache}, encoded, token, method="decode_step", mutable=["cache"]
    )
    return new["cache"], out

  for t in range(TOKENS.shape[1]):
    cache, out = step(cache, TOKENS[:, t : t + 1])
    # The same FP8 values in different GEMMs. The order of summation may flip a rounding.
    np.testing.assert_allclose(out[:, 0], whole[:, t], atol=0.02)


def test_threads_with_the_converted_and_the_original_model():
  import concurrent.futures

  case = CASES["moe"]
  variables = jax.jit(case.converted.init)(KEY, *case.args)
  wanted = [jax.jit(m.apply)(variables, *case.args) for m in (case.model, case.converted)]
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    runs = [
      pool.submit(jax.jit(m.apply), variables, *case.args) for m in (case.model, case.converted)
    ]
  for run, right in zip(runs, wanted, strict=True):
    np.testing.assert_array_equal(run.result(), right)
  assert jnp.einsum.__module__.startswith("jax.")


class Holder(nn.Module):
  inner: nn.Module

  @nn.compact
  def __call__(self, x):
    return self.inner(x)


def test_inside_another_module_raises():
  converted = fp8.fp8_linear_layers(AutoEncoder())
  with pytest.raises(ValueError, match=r"must be the outermost module.*AutoEncoder inside Holder"):
    Holder(converted).init(KEY, normal(4, 16))
  with pytest.raises(ValueError, match=r"run by its own init, apply or bind"):
    nn.init(lambda module, x: module(x), converted)(KEY, normal(4, 16))
