"""The origin of a value through scans, maps, transposes and casts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flax_fp8.linen.provenance import Level, mark, origins

KERNEL = jax.ShapeDtypeStruct((2, 3, 4), jnp.float32)
SCAN, INNER_SCAN = Level(0, is_scan=True), Level(1, is_scan=True)
VMAP, OUTER_VMAP = Level(0, is_scan=False), Level(1, is_scan=False)


def scanned(fun, *values):
  lax.scan(lambda _, x: (None, fun(*x)), None, values)


def scan_along(fun, axis):
  return lambda kernel: scanned(fun, jnp.moveaxis(kernel, axis, 0))


def leave(kernel):
  mark("kernel", kernel)


FUNCTIONS = {
  "as it is": (leave, ()),
  "cast": (lambda kernel: leave(kernel.astype(jnp.bfloat16)), ()),
  "jit and remat": (jax.jit(jax.checkpoint(leave)), ()),
  "transposed twice": (lambda kernel: leave(kernel.T.T), ()),
  "scan": (scan_along(leave, 0), ((SCAN, 0),)),
  "scan along 1": (scan_along(leave, 1), ((SCAN, 1),)),
  "scan along 0 in 2": (scan_along(scan_along(leave, 0), 2), ((SCAN, 2), (INNER_SCAN, 0))),
  "vmap": (jax.vmap(leave), ((VMAP, 0),)),
  "vmap along -1": (jax.vmap(leave, in_axes=-1), ((VMAP, 2),)),
  "vmap in vmap": (
    jax.vmap(jax.vmap(leave, in_axes=1), in_axes=1),
    ((OUTER_VMAP, 1), (VMAP, 2)),
  ),
  "scan in vmap": (jax.vmap(scan_along(leave, 1), in_axes=1), ((SCAN, 2), (VMAP, 1))),
  "vmap in scan": (scan_along(jax.vmap(leave, in_axes=-1), 1), ((SCAN, 1), (VMAP, 2))),
  "in a loop that lifts nothing": (
    lambda kernel: lax.scan(lambda c, _: (c + 1, scan_along(leave, 1)(kernel)), 0, None, 2)[0],
    ((SCAN, 1),),
  ),
  "cast before a scan": (
    lambda kernel: scan_along(leave, 1)(kernel.astype(jnp.bfloat16)),
    ((SCAN, 1),),
  ),
}


@pytest.mark.parametrize(("fun", "lifted"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_parameter_is_followed(fun, lifted):
  found = origins(lambda variables: fun(variables["params"]["layer"]["kernel"]), variables())
  ((origin,),) = found["kernel"]
  assert origin.path == ("params", "layer", "kernel")
  assert origin.casts <= 1
  assert origin.order == tuple(range(len(origin.axes)))
  assert origin.lifted == lifted


def variables():
  return {"params": {"layer": {"kernel": KERNEL}}, "other": {"scale": KERNEL}}


CHANGED = {
  "cast twice": lambda kernel: leave(kernel.astype(jnp.bfloat16).astype(jnp.float32)),
  "doubled": lambda kernel: leave(2 * kernel),
  "reshaped": lambda kernel: leave(kernel.reshape(3, 2, 4)),
  "carried": lambda kernel: lax.fori_loop(0, 2, lambda _, x: (leave(x), 2 * x)[1], kernel),
}


@pytest.mark.parametrize("fun", CHANGED.values(), ids=CHANGED)
def test_a_changed_value_has_no_origin(fun):
  found = origins(lambda variables: fun(variables["params"]["layer"]["kernel"]), variables())
  ((origin,),) = found["kernel"]
  assert origin is None or origin.casts > 1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_transposed_parameter_is_followed(axis):
  fun = scan_along(lambda kernel: leave(jnp.transpose(kernel, (1, 0))), axis)
  ((origin,),) = origins(lambda v: fun(v["params"]["layer"]["kernel"]), variables())["kernel"]
  assert origin.order == (1, 0)
  assert origin.lifted == ((SCAN, axis),)


def test_levels_tell_which_axes_of_two_values_belong_together():
  def fun(variables):
    kernel, scale = variables["params"]["layer"]["kernel"], variables["other"]["scale"]
    inner = jax.vmap(lambda kernel, scale: mark("both", kernel, scale), in_axes=(1, None))
    scanned(inner, jnp.moveaxis(kernel, 2, 0), jnp.moveaxis(scale, 1, 0))

  shapes = {**variables(), "other": {"scale": jax.ShapeDtypeStruct((5, 4), jnp.float32)}}
  ((kernel, scale),) = origins(fun, shapes)["both"]
  assert kernel.lifted == ((SCAN, 2), (VMAP, 1))
  assert scale.path == ("other", "scale")
  assert scale.lifted == ((SCAN, 1),)


def test_a_marked_value_in_a_function_that_is_differentiated():
  def fun(variables):
    kernel = variables["params"]["layer"]["kernel"]

    @jax.grad
    def grad(x):
      mark("kernel", kernel, x)
      return jnp.sum(x * kernel)

    return jax.jit(grad)(kernel)

  ((origin, _),) = origins(fun, variables())["kernel"]
  assert origin is not None
  run = jax.jit(lambda x: jax.grad(lambda x: (mark("name", x), jnp.sum(x**2))[1])(x))
  np.testing.assert_array_equal(run(jnp.ones(2)), 2 * jnp.ones(2))
