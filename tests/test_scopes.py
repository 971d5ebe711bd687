"""The reason in a name scope survives any characters."""

import pytest

from flax_fp8 import scopes
from flax_fp8.explain import names

REASONS = [
  "JAX 0.8.1 is older than 0.10",
  "K = 100/128 (not whole)",
  'unbalanced ")( and \\ and transpose(jvp(x))',
  "50 % of 1×128, a->b",
  "",
]


@pytest.mark.parametrize("reason", REASONS, ids=range(len(REASONS)))
def test_a_reason_survives(reason):
  scope = scopes.plain_jax(reason)
  assert scopes.plain_reason(scope) == reason
  assert scope.isascii()
  stack = f"jit(f)/transpose(jvp(Net))/up/fp8_gemm/{scope}/while/body/closed_call/dot_general"
  assert names.plain_reason(stack) == reason
  assert names.model_path(stack) == "Net/up"


def test_a_readable_reason_stays_readable():
  assert scopes.plain_jax(REASONS[0]) == f"plain_jax({REASONS[0]})"


@pytest.mark.parametrize("scope", ["", "plain_jax", "fp8_gemm", "plain_jax(a)/b", "plain_jax(a"])
def test_other_names_have_no_reason(scope):
  assert scopes.plain_reason(scope) is None
