"""``downgrade_variables`` removes only FP8 state."""

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8

OWG = fp8.OVERWRITE_WITH_GRADIENT
X = jnp.ones((2, 16))
FP8 = nn.Dense(4, dot_general_cls=fp8.Fp8DotGeneral)
VARIABLES = jax.jit(FP8.init)(jax.random.key(0), X)
VARIABLES |= {"batch_stats": {"mean": jnp.ones(3), "none": {}}}


@pytest.mark.parametrize("wrap", [dict, flax.core.freeze], ids=["dict", "FrozenDict"])
def test_removes_state_and_keeps_the_rest(wrap):
  variables = wrap(VARIABLES)
  got = fp8.downgrade_variables(variables)
  assert type(got) is type(variables)
  want = {key: VARIABLES[key] for key in ("params", "batch_stats")}
  assert jax.tree.structure(flax.core.unfreeze(got)) == jax.tree.structure(want)
  assert all(a is b for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
  assert OWG in variables
  nn.Dense(4).apply(got, X)
  again = fp8.upgrade_variables(FP8, got, X)
  assert jax.tree.structure(again[OWG]) == jax.tree.structure(variables[OWG])


def test_nested_state_goes_too():
  state = VARIABLES[OWG]["Fp8DotGeneral_0"]
  params = {**VARIABLES["params"], "Fp8DotGeneral_0": {OWG: state}, "Dense_0": {OWG: state, "a": 1}}
  got = fp8.downgrade_variables({"params": flax.core.freeze(params)})
  assert isinstance(got["params"], flax.core.FrozenDict)
  assert set(got["params"]) == {"kernel", "bias", "Dense_0"}
  assert got["params"]["Dense_0"] == {"a": 1}


def test_without_state_nothing_changes():
  plain = nn.Dense(4).init(jax.random.key(0), X)
  jax.tree.map(np.testing.assert_array_equal, fp8.downgrade_variables(plain), plain)


@pytest.mark.parametrize(
  ("variables", "got"),
  [(VARIABLES["params"], r"\['bias', 'kernel'\]"), (X, "ArrayImpl"), (None, "NoneType")],
  ids=["bare", "array", "None"],
)
def test_other_arguments_are_refused(variables, got):
  with pytest.raises(ValueError, match=f"downgrade_variables: .*'params'; got .*{got}.*Wrap bare"):
    fp8.downgrade_variables(variables)
