"""Tests FP8 state under JAX's transformations. ``python -m tests.transformations`` prints a table.

Rows are programs that use one FP8 layer under a transformation. Columns are ways to differentiate:
plain ``jax.grad``, ``fp8.value_and_grad``, and ``TrainState``. The last is plain ``jax.grad`` of
``state.apply_fn`` followed by ``apply_gradients``. If the loop is outside of the model,
``state.apply_fn`` is the looped function. A cell is right if the scales and histories of all three
tensors equal those of the float64 oracle, which gets every tensor of the layer.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.linen.fp8_ops as reference
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import flax_fp8 as fp8
from tests import conftest as _devices  # noqa: F401 - for ``python -m``
from tests import oracle

OWG = fp8.OVERWRITE_WITH_GRADIENT
COLUMNS = ("jax.grad", "value_and_grad", "TrainState")
RECIPE = fp8.DelayedScaling(amax_history_len=4)
ROLES = {"input": "float8_e4m3fn", "kernel": "float8_e4m3fn", "output_grad": "float8_e5m2"}
HISTORY = {
  "input": np.array([0.5, 3.0, 1.0, 0.25], np.float32),
  "kernel": np.array([0.25, 0.125, 2.0, 1.0], np.float32),
  "output_grad": np.array([4.0, 1.0, 0.5, 0.0], np.float32),
}
STEPS, BATCH, WIDTH = 4, 4, 8  # four microbatches, calls, experts or layers

_random = np.random.default_rng(0)
X = _random.normal(size=(STEPS, BATCH, WIDTH)).astype(np.float32)
# Cotangents of the outputs: the loss is sum(out * C). Magnitudes differ by step, so a sum shows.
C = (_random.normal(size=X.shape) * np.array([1, 3, 2, 0.5]).reshape(STEPS, 1, 1)).astype(
  np.float32
)
KERNELS = _random.normal(size=(STEPS, WIDTH, WIDTH)).astype(np.float32) / 3


# The last one is in use. Flax's is appended for the last column of the printed table.
DOT_GENERAL: list[Any] = [RECIPE.dot_general_cls]


class Layer(nn.Module):
  """The FP8 layer, with a kernel that tests can set."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param("kernel", nn.initializers.ones, (WIDTH, WIDTH))
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    return DOT_GENERAL[-1](name="dot")(x, kernel, dims)


class ThreeCalls(nn.Module):
  """Calls one layer four times, under ``wrap``."""

  wrap: Callable[[type[nn.Module]], Any] = staticmethod(lambda module: module)

  @nn.compact
  def __call__(self, xs: jax.Array, cs: jax.Array) -> jax.Array:
    layer = self.wrap(Layer)(name="layer")
    return sum(jnp.sum(layer(x) * c) for x, c in zip(xs, cs, strict=True))


class Inside(nn.Module):
  """Calls ``ThreeCalls`` inside a remat."""

  @nn.compact
  def __call__(self, xs: jax.Array, cs: jax.Array) -> jax.Array:
    return nn.remat(ThreeCalls)(name="inner")(xs, cs)


class Mapped(nn.Module):
  """Maps the layer over the leading axis with ``nn.vmap``."""

  axis: int | None

  @nn.compact
  def __call__(self, xs: jax.Array, cs: jax.Array) -> jax.Array:
    axes = {"params": self.axis, OWG: self.axis}
    mapped = nn.vmap(Layer, variable_axes=axes, split_rngs={"params": self.axis is not None})
    return jnp.sum(mapped(name="layer")(xs) * cs)


class Step(nn.Module):
  """One step of a loop over calls: ``carry`` accumulates the loss."""

  @nn.compact
  def __call__(self, carry: jax.Array, x_c: Any) -> tuple[jax.Array, None]:
    x, c = x_c
    return carry + jnp.sum(Layer(name="layer")(x) * c), None


class Scanned(nn.Module):
  """Scans the layer over calls, with one state for all steps or one per step."""

  per_layer: bool

  @nn.compact
  def __call__(self, xs: jax.Array, cs: jax.Array) -> jax.Array:
    how = {"variable_broadcast": ["params", OWG], "split_rngs": {"params": False}}
    if self.per_layer:
      how = {"variable_axes": {"params": 0, OWG: 0}, "split_rngs": {"params": True}}
    return nn.scan(Step, **how)(name="step")(jnp.float32(0), (xs, cs))[0]


class Recurrent(nn.Module):
  """A linear recurrence ``h = layer(h) + x``. All steps share the state."""

  @nn.compact
  def __call__(self, xs: jax.Array, cs: jax.Array) -> jax.Array:
    def step(layer: nn.Module, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
      h = layer(h) + x
      return h, h

    scan = nn.scan(step, variable_broadcast=["params", OWG], split_rngs={"params": False})
    _, hs = scan(Layer(name="layer"), jnp.zeros_like(xs[0]), xs)
    return jnp.sum(hs * cs)


@dataclasses.dataclass(frozen=True)
class Seen:
  """All tensors that one state observed."""

  inputs: Any = dataclasses.field(default_factory=lambda: X)
  kernel: Any = dataclasses.field(default_factory=lambda: KERNELS[0])
  grads: Any = dataclasses.field(default_factory=lambda: C)


Loss = Callable[[Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Case:
  """A row.

  Attributes:
    name: the transformation and its target.
    model: the model that makes the variables.
    program: makes the loss, a function of the variables, from an ``apply``.
    seen: the tensors that the state observed; a list for state with a leading axis.
    jit: whether the gradient is compiled.
    outside: whether the loop is outside of the model.
    inside: "pmap", "shard_map" or "closure". With the first two, each device computes the gradient
      of a scan over two halves of its part, and gradients are averaged. "closure" is a shard_map
      that closes over variables.
    nested: whether the variables belong to one of several models.
    expect: the outcome by column, if it is not "right".
    inputs: arguments of ``model.init``.
  """

  name: str
  model: nn.Module
  program: Callable[[Callable[..., Any]], Loss]
  seen: Seen | list[Seen] = dataclasses.field(default_factory=Seen)
  jit: bool = True
  outside: bool = False
  inside: str = ""
  nested: bool = False
  expect: dict[str, str] = dataclasses.field(default_factory=dict)
  inputs: Any = (X, C)


def whole(apply: Callable[..., Any]) -> Loss:
  """Returns the model's own loss."""
  return lambda variables: apply(variables, X, C)


def _loss(apply: Callable[..., Any], variables: Any, x: Any, c: Any) -> jax.Array:
  return jnp.sum(apply(variables, x) * c)


def vmapped(apply: Callable[..., Any]) -> Loss:
  """``jax.vmap`` of the layer with shared variables."""
  return lambda v: jnp.sum(jax.vmap(apply, in_axes=(None, 0))(v, X) * C)


def applied_again(apply: Callable[..., Any]) -> Loss:
  """Several applies of one model in one loss, as in siamese networks."""
  return lambda v: sum(_loss(apply, v, jnp.asarray(x), c) for x, c in zip(X, C, strict=True))


def microbatches(apply: Callable[..., Any], x: Any = X, c: Any = C) -> Loss:
  """``lax.scan`` over microbatches with shared variables."""

  def loss(variables: Any) -> jax.Array:
    step = lambda total, xc: (total + _loss(apply, variables, *xc), None)
    return jax.lax.scan(step, jnp.float32(0), (jnp.asarray(x), jnp.asarray(c)))[0]

  return loss


def scan_of_vmap(apply: Callable[..., Any]) -> Loss:
  """Scans over microbatches of a layer mapped over their examples."""
  return microbatches(lambda v, x: jax.vmap(apply, in_axes=(None, 0))(v, x))


def vmap_of_scan(apply: Callable[..., Any]) -> Loss:
  """Maps a scan over microbatches over examples."""

  def loss(variables: Any) -> jax.Array:
    one = lambda x, c: microbatches(apply, x[:, None], c[:, None])(variables)
    return jnp.sum(jax.vmap(one, in_axes=1)(jnp.asarray(X), jnp.asarray(C)))

  return loss


def cond(apply: Callable[..., Any]) -> Loss:
  """One of two branches uses the layer."""

  def loss(variables: Any) -> jax.Array:
    use = lambda v: _loss(apply, v, X[0], C[0])
    return jax.lax.cond(jnp.asarray(X[0, 0, 0]) < 9, use, lambda v: jnp.float32(0), variables)

  return loss


def not_taken(apply: Callable[..., Any]) -> Loss:
  """The branch that uses the layer is not taken, so the state does not change."""

  def loss(variables: Any) -> jax.Array:
    use = lambda v: _loss(apply, v, X[0], C[0])
    return jax.lax.cond(jnp.asarray(X[0, 0, 0]) > 9, use, lambda v: jnp.float32(0), variables)

  return loss


def fori_loop(apply: Callable[..., Any]) -> Loss:
  """``lax.fori_loop`` over microbatches."""

  def loss(variables: Any) -> jax.Array:
    xs, cs = jnp.asarray(X), jnp.asarray(C)
    body = lambda i, total: total + _loss(apply, variables, xs[i], cs[i])
    return jax.lax.fori_loop(0, STEPS, body, jnp.float32(0))

  return loss


@functools.cache
def mesh() -> jax.sharding.Mesh:
  """Makes a mesh of four devices."""
  return jax.make_mesh((STEPS,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def sharded(check_vma: bool) -> Callable[[Callable[..., Any]], Loss]:
  """``shard_map`` over the batch with replicated variables."""

  def program(apply: Callable[..., Any]) -> Loss:
    def local(variables: Any, x: jax.Array, c: jax.Array) -> jax.Array:
      return jax.lax.psum(_loss(apply, variables, x[0], c[0]), "data")

    run = jax.shard_map(
      local, mesh=mesh(), in_specs=(P(), P("data"), P("data")), out_specs=P(), check_vma=check_vma
    )
    return lambda variables: run(variables, X, C)

  return program


def closed_over(apply: Callable[..., Any]) -> Loss:
  """``shard_map(check_vma=False)`` that closes over the variables, inside and outside of a loop."""

  def loss(variables: Any) -> jax.Array:
    def local(x: jax.Array, c: jax.Array) -> jax.Array:
      first = _loss(apply, variables, x[0, :2], c[0, :2])
      rest = microbatches(apply, x[0, 2:, None], c[0, 2:, None])(variables)
      return jax.lax.psum(first + rest, "data")

    specs = {"in_specs": (P("data"), P("data")), "out_specs": P(), "check_vma": False}
    return jax.shard_map(local, mesh=mesh(), **specs)(jnp.asarray(X), jnp.asarray(C))

  return loss


def switch(apply: Callable[..., Any]) -> Loss:
  """``lax.switch``, once for each of its branches."""

  def loss(variables: Any) -> jax.Array:
    branches = [lambda i=i: _loss(apply, variables, X[i], C[i]) for i in range(STEPS)]
    return sum(jax.lax.switch(jnp.int32(X[0, 0, 0] > 9) + i, branches) for i in range(STEPS))

  return loss


class Bound:
  """A bound module that is called like ``apply``."""

  def __init__(self, model: nn.Module) -> None:
    """Takes the model to bind."""
    self.model = model

  def __call__(self, variables: Any) -> jax.Array:
    """Uses one bound module in a loop and after it."""
    layer, xs, cs = self.model.bind(variables), jnp.asarray(X), jnp.asarray(C)
    body = lambda i, total: total + jnp.sum(layer(xs[i]) * cs[i])
    total = jax.lax.fori_loop(0, STEPS - 1, body, jnp.float32(0))
    return total + jnp.sum(layer(xs[-1]) * cs[-1])


def bound(apply: Callable[..., Any]) -> Loss:
  """A bound module, or the given ``apply_fn``, in a loop and after it."""
  model = getattr(apply, "__self__", None)
  return applied_again(apply) if model is None else Bound(model)


def in_scan_and_out(apply: Callable[..., Any]) -> Loss:
  """A scan over microbatches, and one more apply after it."""
  return lambda v: microbatches(apply, X[1:], C[1:])(v) + _loss(apply, v, X[0], C[0])


def nested(apply: Callable[..., Any]) -> Loss:
  """The variables of one of two models. The other model is not used."""
  return lambda v: applied_again(apply)(v["one"])


def pjit(apply: Callable[..., Any]) -> Loss:
  """A sharded batch under jit with replicated variables."""
  batch = NamedSharding(mesh(), P("data"))

  def loss(variables: Any) -> jax.Array:
    x, c = (jax.lax.with_sharding_constraint(jnp.asarray(t), batch) for t in (X, C))
    return _loss(apply, variables, x, c)

  return loss


def jitted_inside(apply: Callable[..., Any]) -> Loss:
  """jit inside grad."""
  return jax.jit(whole(apply))


def recurrence() -> Seen:
  """Computes the tensors of ``Recurrent``: forward values and backpropagated gradients."""
  s = {role: oracle.scale(HISTORY[role], 1.0, name) for role, name in ROLES.items()}
  kernel = oracle.qdq(KERNELS[0], s["kernel"], ROLES["kernel"])
  h, inputs = np.zeros_like(X[0]), []
  for x in X:
    inputs.append(h)
    h = np.float32(oracle.qdq(h, s["input"], ROLES["input"]) @ kernel) + x
  grads = [C[-1]]
  for c in C[-2::-1]:
    back = oracle.qdq(grads[-1], s["output_grad"], ROLES["output_grad"]) @ kernel.T
    grads.append(c + np.float32(back))
  return Seen(inputs=np.stack(inputs), grads=np.stack(grads))


SUMS = {"jax.grad": "sums"}
PER_STEP = [Seen(X[i], KERNELS[i], C[i]) for i in range(STEPS)]
FIRST = Seen(X[0], KERNELS[0], C[0])
LAYER = {"model": Layer(), "inputs": (X[0],)}

CASES = [
  Case("several calls, jit", ThreeCalls(), whole),
  Case("several calls, eager", ThreeCalls(), whole, jit=False),
  Case("jit inside grad", ThreeCalls(), jitted_inside, jit=False),
  Case("several applies", program=applied_again, **LAYER),
  Case("several applies, eager", program=applied_again, jit=False, **LAYER),
  Case("several applies, nested variables", program=nested, nested=True, **LAYER),
  Case("vmap, shared", program=vmapped, **LAYER),
  Case("vmap, shared, eager", program=vmapped, jit=False, **LAYER),
  Case("nn.vmap, shared", Mapped(None), whole),
  Case("nn.vmap, per expert", Mapped(0), whole, PER_STEP),
  Case("lax.scan over microbatches", program=microbatches, **LAYER),
  Case("recurrent carry", Recurrent(), whole, recurrence()),
  Case("nn.scan, per layer", Scanned(True), whole, PER_STEP),
  Case("nn.scan, broadcast", Scanned(False), whole),
  Case("several calls in a remat, jit", Inside(), whole),
  Case("several calls in a remat, eager", Inside(), whole, jit=False),
  Case("several calls of a remat, jit", ThreeCalls(nn.remat), whole, expect=SUMS),
  Case("several calls of a remat, eager", ThreeCalls(nn.remat), whole, jit=False, expect=SUMS),
  Case("cond", program=cond, seen=FIRST, **LAYER),
  Case("switch", program=switch, **LAYER),
  Case("bind in a loop and behind it", program=bound, **LAYER),
  Case("scan over microbatches, then one apply", program=in_scan_and_out, **LAYER),
  Case("fori_loop", program=fori_loop, **LAYER),
  Case("shard_map, check_vma=True", program=sharded(True), **LAYER),
  Case("shard_map, check_vma=True, eager", program=sharded(True), jit=False, **LAYER),
  Case(
    "shard_map, check_vma=False",
    program=sharded(False),
    expect={"value_and_grad": "clear error"},
    **LAYER,
  ),
  Case("shard_map, check_vma=False, closed over", program=closed_over, **LAYER),
  Case("shard_map, check_vma=False, pmean", program=microbatches, inside="shard_map", **LAYER),
  Case("shard_map, closure, pmean", program=microbatches, inside="closure", **LAYER),
  Case(
    "shard_map, closure, pmean, eager", program=microbatches, inside="closure", jit=False, **LAYER
  ),
  Case("pmap, pmean", program=microbatches, inside="pmap", **LAYER),
  Case("pjit, sharded batch", program=pjit, **LAYER),
  Case("vmap of scan", program=vmap_of_scan, **LAYER),
  Case("scan of vmap", program=scan_of_vmap, **LAYER),
]


def make_variables(case: Case) -> Any:
  """Makes variables with the known kernel and history."""
  fresh = jax.eval_shape(case.model.init, jax.random.key(0), *case.inputs)

  def fill(path: Any, leaf: Any) -> jax.Array:
    name = path[-1].key
    if name == "kernel":
      return jnp.asarray(KERNELS if leaf.ndim == 3 else KERNELS[0])
    role = next(role for role in ROLES if name.startswith(role))
    value = HISTORY[role] if name.endswith("history") else np.ones(1, np.float32)
    return jnp.broadcast_to(value, leaf.shape)

  variables = jax.tree_util.tree_map_with_path(fill, fresh)
  return {"one": variables, "two": variables} if case.nested else variables


def gradient_of(
  case: Case, gradient: Any, program: Callable[..., Loss], apply: Callable[..., Any]
) -> Callable[[Any], Any]:
  """Makes the function that computes the gradient with respect to variables."""
  if not case.inside:
    return gradient(program(apply))

  def local(variables: Any, x: jax.Array, c: jax.Array) -> Any:
    halves = (t.reshape(2, -1, WIDTH) for t in (x, c))
    grads = gradient(microbatches(apply, *halves))(variables)
    return jax.lax.pmean(grads, "data")

  if case.inside == "pmap":
    mapped = jax.pmap(local, "data", in_axes=(None, 0, 0))
    return lambda variables: jax.tree.map(lambda leaf: leaf[0], mapped(variables, X, C))
  specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": P(), "check_vma": False}
  if case.inside == "closure":
    specs["in_specs"] = specs["in_specs"][1:]
    over = lambda variables: lambda x, c: local(variables, x[0], c[0])
    return lambda variables: jax.shard_map(over(variables), mesh=mesh(), **specs)(X, C)
  mapped = jax.shard_map(lambda v, x, c: local(v, x[0], c[0]), mesh=mesh(), **specs)
  return lambda variables: mapped(variables, X, C)


def new_state(case: Case, column: str) -> dict[str, np.ndarray]:
  """Returns the state after one step, by variable name."""
  variables = make_variables(case)
  wrap = jax.jit if case.jit and case.inside != "pmap" else (lambda f: f)
  if column == "TrainState":
    program = (lambda apply: apply) if case.outside else case.program
    apply_fn = case.program(case.model.apply) if case.outside else case.model.apply
    state = fp8.TrainState.create(apply_fn=apply_fn, params=variables, tx=optax.sgd(0.1))
    grads = wrap(gradient_of(case, jax.grad, program, state.apply_fn))(variables)
    tree = state.apply_gradients(grads=grads).params
  else:
    gradient = jax.grad if column == "jax.grad" else fp8.grad
    tree = wrap(gradient_of(case, gradient, case.program, case.model.apply))(variables)
  tree = tree["one"] if case.nested else tree
  leaves = jax.tree_util.tree_leaves_with_path(tree[OWG])
  return {path[-1].key: np.asarray(leaf) for path, leaf in leaves}


def expected_state(seen: Seen) -> dict[str, np.ndarray]:
  """Returns the oracle's state after one step."""
  met = {"input": seen.inputs, "kernel": seen.kernel, "output_grad": seen.grads}
  state = {}
  for role, name in ROLES.items():
    state[f"{role}_scale"] = np.array([oracle.scale(HISTORY[role], 1.0, name)])
    state[f"{role}_amax_history"] = oracle.roll(HISTORY[role], oracle.amax(met[role]))
  return state


def outcome(case: Case, column: str) -> str:
  """Returns the text of a cell: "right", "sums", "clear error", or another outcome."""
  per_index = isinstance(case.seen, list)
  all_seen = case.seen if per_index else [case.seen]
  try:
    got = new_state(case, column)
  except TypeError as error:
    return "clear error" if "check_vma=True" in str(error) else f"TypeError: {error}"
  for i, seen in enumerate(all_seen):
    for name, want in expected_state(seen).items():
      value = got[name][i] if per_index else got[name]
      if value.shape != want.shape or not np.allclose(value, want, rtol=1e-6, atol=0):
        summed = value.shape == want.shape and np.all(value >= want)
        return "sums" if summed else f"wrong {name}: {value}, not {want}"
  return "right"


def flaxs_outcome(case: Case) -> str:
  """Returns the text for ``flax.linen.fp8_ops`` under plain ``jax.grad``."""
  DOT_GENERAL.append(lambda name: reference.Fp8DotGeneral(amax_history_length=4, name=name))
  try:
    return outcome(case, "jax.grad")
  except Exception as error:  # any error is the content of the cell
    return type(error).__name__
  finally:
    DOT_GENERAL.pop()


FOOT = """
{total} cells of ours, {surprises} not as documented. Flax's ops: {flax} of {rows} rows right.
sums: float32 state was an argument of a remat that is called several times. Differentiate with
fp8.value_and_grad, or cast with fp8.as_max_grad outside of it.
clear error: JAX cannot take a maximum at that boundary; the message names the ways out."""


def main() -> int:
  """Prints the table. Returns the number of cells that differ from the documented outcome."""
  surprises = flax = 0
  print(f"| case | {' | '.join(COLUMNS)} | Flax's ops, jax.grad |\n|---|---|---|---|---|")
  for case in CASES:
    cells = {column: outcome(case, column) for column in COLUMNS}
    surprises += sum(cells[c] != case.expect.get(c, "right") for c in COLUMNS)
    theirs = flaxs_outcome(case).split(":")[0]
    flax += theirs == "right"
    print(f"| {case.name} | {' | '.join(cells[c].splitlines()[0] for c in COLUMNS)} | {theirs} |")
  rows = len(CASES)
  print(FOOT.format(total=rows * len(COLUMNS), surprises=surprises, flax=flax, rows=rows))
  return surprises


if __name__ == "__main__":
  sys.exit(main())
