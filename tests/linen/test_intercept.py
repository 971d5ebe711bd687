"""Interceptors end with their context, even under ``python -O``."""

import contextlib

import flax.linen as nn
import flax.linen.module as linen_module
import jax
import numpy as np
import pytest

import flax_fp8 as fp8
from flax_fp8.linen.intercept import intercept_methods

X = np.ones((2, 16), np.float32)


@contextlib.contextmanager
def left_in(interceptor):
  """``nn.intercept_methods`` under ``python -O``."""
  linen_module._global_interceptor_stack.push(interceptor)
  yield


@pytest.fixture(autouse=True)
def optimized(monkeypatch):
  monkeypatch.setattr(nn, "intercept_methods", left_in)
  yield
  assert not len(linen_module._global_interceptor_stack)


def test_ends_with_its_context():
  seen = []
  with intercept_methods(lambda f, args, kwargs, _: seen.append(1) or f(*args, **kwargs)):
    nn.Dense(2).init(jax.random.key(0), X)
  count = len(seen)
  nn.Dense(2).init(jax.random.key(0), X)
  assert len(seen) == count > 0


def test_ends_with_an_error():
  with pytest.raises(KeyError), intercept_methods(lambda *_: None):
    raise KeyError


def test_unrelated_models_do_not_change():
  converted = fp8.fp8_linear_layers(nn.Dense(16))
  variables = converted.init(jax.random.key(0), X)
  served, frozen = fp8.freeze_for_inference(converted, variables, X)
  np.testing.assert_array_equal(served.apply(frozen, X), converted.apply(variables, X))
  assert set(nn.Dense(16).init(jax.random.key(0), X)) == {"params"}
