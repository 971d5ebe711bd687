"""Checks for JAX's private features."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from flax_fp8 import _compat
from tests.transformations import mesh


@pytest.mark.parametrize(
  ("module", "attribute"), [("jax._src.core", "nothing"), ("jax._src.nothing", "core")]
)
def test_a_missing_feature_says_what_to_do(module, attribute):
  with pytest.raises(
    ImportError, match=rf"flax_fp8: .*{module}.{attribute}.*jax=={jax.__version__}"
  ):
    _compat.require(module, attribute)


@pytest.mark.parametrize("check_vma", [True, False])
def test_axes_are_tracked_only_where_jax_checks(check_vma):
  seen = {}

  def local(x, w):
    seen["x"], seen["w"] = _compat.varying_axes(x), _compat.varying_axes(w)
    seen["unchecked"] = _compat.unchecked_manual_axes()
    return x + w

  run = jax.shard_map(
    local, mesh=mesh(), in_specs=(P("data"), P()), out_specs=P("data"), check_vma=check_vma
  )
  jax.jit(run)(jnp.ones(4), jnp.ones(1))
  axes = frozenset({"data"})
  assert seen["x"] == (axes if check_vma else frozenset())
  assert seen["w"] == frozenset()
  assert seen["unchecked"] == (() if check_vma else ("data",))


def test_outside_of_shard_map_no_axis_is_manual():
  assert _compat.unchecked_manual_axes() == ()
  assert _compat.varying_axes(jnp.ones(3)) == frozenset()
