"""One layer under lifted transformations with every position of the lifted axes.

``LIFTS`` maps names to functions of a ``dot_general_cls`` that return a model. A name gives the
axes of parameters and state. The models in ``CONVERTIBLE`` lift only parameters, as plain models.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import flax_fp8 as fp8

OWG = fp8.OVERWRITE_WITH_GRADIENT
D, F = 16, 24
X = np.random.default_rng(0).normal(size=(4, D)).astype(np.float32)
ALL = "all steps share it"


class Body(nn.Module):
  """Layers with kernels that are not square, so that axes cannot be confused."""

  cls: Any = None

  @nn.compact
  def __call__(self, x, _):
    y = jnp.tanh(nn.Dense(F, dot_general_cls=self.cls, name="up")(x))
    return x + nn.Dense(D, dot_general_cls=self.cls, name="down", use_bias=False)(y), None


def scan(target, params, state, length, also=()):
  axes = {} if params == ALL else {"params": params}
  axes |= {} if state in (None, ALL) else {OWG: state}
  shared = [name for name, axis in (("params", params), (OWG, state)) if axis == ALL]
  rngs = {"params": params != ALL}
  return nn.scan(target, axes, variable_broadcast=shared, split_rngs=rngs, length=length)


@dataclasses.dataclass(frozen=True)
class Scans:
  """Scans, outermost first: axes of parameters and state, and lengths."""

  params: tuple[Any, ...]
  state: tuple[Any, ...]
  lengths: tuple[int, ...] = (3, 2)

  def __call__(self, cls):
    return Scanned(self.params, self.state, self.lengths, cls)


class Scanned(nn.Module):
  params: Any
  state: Any
  lengths: Any
  cls: Any

  @nn.compact
  def __call__(self, x, _=None):
    params, state, lengths = self.params, self.state, self.lengths
    if not params:
      return Body(self.cls, name="body")(x, None)[0]
    inner = lambda module, x: (module(x), None)
    below = Scanned(params[1:], state[1:], lengths[1:], self.cls, name="below")
    return scan(inner, params[0], state[0], lengths[0])(below, x)[0]


class Mapped(nn.Module):
  """Experts under ``nn.vmap``, with a scan inside or around it."""

  axis: int
  order: str
  cls: Any

  @nn.compact
  def __call__(self, x):
    axes = {"params": self.axis, OWG: self.axis} if self.cls else {"params": self.axis}
    state = self.axis if self.cls else None
    rngs = {"params": True}
    if self.order == "vmap":
      y, _ = nn.vmap(Body, axes, rngs, in_axes=None, axis_size=4)(self.cls, name="body")(x, None)
      return jnp.mean(y, 0)
    if self.order == "scan in vmap":
      once = Scanned((self.axis,), (state,), (2,), self.cls, name="scanned")
      return jnp.mean(nn.vmap(lambda m, x: m(x), axes, rngs, in_axes=None, axis_size=3)(once, x), 0)
    once = Mapped(self.axis, "vmap", self.cls, name="mapped")
    return scan(lambda m, x: (m(x), None), self.axis, state, 2)(once, x)[0]


LIFTS = {
  "0": Scans((0,), (0,)),
  "1": Scans((1,), (1,)),
  "-1": Scans((-1,), (-1,)),
  "-2": Scans((-2,), (-2,)),
  "1 in 1": Scans((1, 1), (1, 1)),
  "1 in 0": Scans((0, 1), (0, 1)),
  "0 in -1": Scans((-1, 0), (-1, 0)),
  "-2 in -1": Scans((-1, -2), (-1, -2), (2, 2)),
  "params 1, state 0": Scans((1,), (0,)),
  "params -1, state 1": Scans((-1,), (1,)),
  "params 0, state 1": Scans((0,), (1,)),
  "params 0 in 1, state 1 in 0": Scans((1, 0), (0, 1), (2, 2)),
  "params for all, state 1": Scans((ALL,), (1,)),
  "params 1, state for all": Scans((1,), (ALL,)),
  "params 1 in all, state all in 1": Scans((ALL, 1), (1, ALL), (2, 2)),
  **{
    f"{order} {axis}": lambda cls, axis=axis, order=order: Mapped(axis, order, cls)
    for order in ("vmap", "scan in vmap", "vmap in scan")
    for axis in (1, -1)
  },
}
CONVERTIBLE = [name for name, lift in LIFTS.items() if "state" not in name]


def converted(name, recipe):
  lift = LIFTS[name]
  plain = dataclasses.replace(lift, state=(None, None)) if isinstance(lift, Scans) else lift
  config = fp8.Fp8Config(recipe=recipe, multiple_of=1, min_kernel_size=0)
  return fp8.fp8_linear_layers(plain(None), config)


def written(name, recipe):
  return LIFTS[name](recipe.dot_general_cls)


def trained(model, steps=2, x=X):
  """Initializes the model and updates its state for some steps."""
  variables = jax.jit(model.init)(jax.random.key(0), x)
  if OWG in variables:
    step = jax.jit(fp8.grad(lambda v: jnp.mean(jnp.square(model.apply(v, x)))))
    for _ in range(steps):
      variables = {**variables, OWG: step(variables)[OWG]}
  return variables
