"""Mesh axes along which arrays vary."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from flax_fp8 import varying
from tests.transformations import mesh


@pytest.mark.parametrize("check_vma", [True, False])
def test_axes_are_tracked_only_where_jax_checks(check_vma):
  seen = {}

  def local(x, w):
    seen["x"], seen["w"] = varying.varying_axes(x), varying.varying_axes(w)
    seen["unchecked"] = varying.unchecked_manual_axes()
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
  assert varying.unchecked_manual_axes() == ()
  assert varying.varying_axes(jnp.ones(3)) == frozenset()
