"""Every recipe under vmap, scan, remat, shard_map and jit with shardings.

Sums of products are exact here (see ``cases.integers``), so results are equal bit for bit.
``tests/test_transformations.py`` tests the state of delayed scaling under these transformations.
"""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import flax_fp8 as fp8
from flax_fp8 import ops
from tests.recipes import cases
from tests.recipes.cases import RECIPES, STATEFUL, STATELESS, compiled_quickly, integers, quickly

OWG = fp8.OVERWRITE_WITH_GRADIENT
COPIES, TOKENS, IN, OUT = 4, 8, 40, 12
# Each copy has values of another magnitude, so a wrongly shared scale shows.
SIZES = np.array([1.0, 4.0, 0.5, 2.0], np.float32).reshape(COPIES, 1, 1)
XS = integers(0, COPIES, TOKENS, IN) * SIZES
WS = integers(1, COPIES, IN, OUT) * SIZES[::-1]
CS = integers(2, COPIES, TOKENS, OUT) * SIZES
by_recipe = pytest.mark.parametrize("name", RECIPES)
by_stateless = pytest.mark.parametrize("name", STATELESS)
by_class = pytest.mark.parametrize("name", cases.ONE_OF_EACH_CLASS)
by_stateful = pytest.mark.parametrize("name", STATEFUL)


@functools.cache
def one_by_one(name, shared):
  """Runs each copy on its own. Stacks outputs and gradients."""
  recipe, keys = RECIPES[name], jax.random.split(cases.KEY, COPIES)
  ws = [WS[0]] * COPIES if shared else WS
  steps = [
    compiled_quickly(recipe, x, w, c, key=key)[:3]
    for x, w, c, key in zip(XS, ws, CS, keys, strict=True)
  ]
  return jax.tree.map(lambda *leaves: np.stack(leaves), *steps)


@by_stateless
@pytest.mark.parametrize("shared", [True, False], ids=["shared kernel", "kernel per expert"])
def test_vmap(name, shared):
  """A mapped run equals stacked runs: no copy depends on another's values."""
  recipe, keys = RECIPES[name], jax.random.split(cases.KEY, COPIES)
  run = lambda x, w, c, key: cases.step(recipe, x, w, c, key=key)[:3]
  mapped = quickly(jax.vmap(run, in_axes=(0, None if shared else 0, 0, 0)))
  cases.equal(mapped(XS, WS[0] if shared else WS, CS, keys), one_by_one(name, shared))


@by_stateful
def test_vmap_with_state_per_expert(name):
  recipe = RECIPES[name]
  state = jax.tree.map(lambda leaf: jnp.stack([leaf] * COPIES), ops.init_state(recipe))
  mapped = quickly(jax.vmap(functools.partial(cases.step, recipe)))(XS, WS, CS, state)
  each = [compiled_quickly(recipe, *copy) for copy in zip(XS, WS, CS, strict=True)]
  cases.equal(mapped, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))


@by_stateful
def test_vmap_with_shared_state_sees_all_copies(name):
  recipe = RECIPES[name]

  def run(x, w, c, state):
    apply = lambda x, w, state: ops.dot_general(x, w, cases.DIMS, recipe=recipe, state=state)
    return jax.vjp(jax.vmap(apply, in_axes=(0, None, None)), x, w, state)[1](c)[2]

  state = quickly(run)(XS, WS[0], CS, ops.init_state(recipe))
  for role, seen in (("input", XS), ("kernel", WS[0]), ("output_grad", CS)):
    assert float(state[role]["amax_history"][0]) == np.abs(seen).max()


@pytest.mark.parametrize("mapped", [*itertools.product((False, True), repeat=3)], ids=str)
def test_vmap_that_maps_the_state_of_some_tensors(mapped):
  recipe = RECIPES["delayed"]
  seen = cases.step(recipe, XS[0], WS[0], CS[0])[3]
  states = jax.tree.map(lambda leaf: jnp.stack([leaf * 2**i for i in range(COPIES)]), seen)
  is_mapped = dict(zip(seen, mapped, strict=True))
  take = lambda role, i: jax.tree.map(lambda leaf: leaf[i], states[role])
  state = {role: states[role] if is_mapped[role] else take(role, 0) for role in states}
  of_copy = lambda i: {role: take(role, i if is_mapped[role] else 0) for role in states}

  def run(x, w, c, state):
    axes = {role: 0 if is_mapped[role] else None for role in state}
    apply = lambda x, w, state: ops.dot_general(x, w, cases.DIMS, recipe=recipe, state=state)
    out, vjp = jax.vjp(jax.vmap(apply, in_axes=(0, None, axes)), x, w, state)
    x_grad, _, new = vjp(c)
    return out, x_grad, new

  out, x_grad, new = quickly(run)(XS, WS[0], CS, state)
  each = [
    compiled_quickly(recipe, x, WS[0], c, of_copy(i))
    for i, (x, c) in enumerate(zip(XS, CS, strict=True))
  ]
  cases.equal(
    (out, x_grad), jax.tree.map(lambda *leaves: jnp.stack(leaves), *(e[:2] for e in each))
  )
  for role in new:
    join = jnp.stack if is_mapped[role] else lambda leaves: jnp.max(jnp.stack(leaves), axis=0)
    want = jax.tree.map(lambda *leaves, join=join: join(leaves), *(e[3][role] for e in each))
    cases.equal(new[role], want)


OWN_AMAX = {
  "delayed": fp8.DelayedScaling(amax_history_len=2),
  "first step": fp8.DelayedScaling(amax_history_len=2, first_step="current"),
  "overflow": fp8.DelayedScaling(amax_history_len=2, overflow="current"),
}


@pytest.mark.parametrize("bad", [1.0, np.nan], ids=["finite", "NaN"])
@pytest.mark.parametrize("name", OWN_AMAX)
def test_a_mapped_state_of_the_kernel_does_not_split_the_other_tensors(name, bad):
  recipe = OWN_AMAX[name]
  state = ops.init_state(recipe)
  copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * COPIES), state["kernel"])
  large = jnp.asarray(XS * 2.0 ** np.arange(10, 10 + COPIES)[:, None, None]).at[1, 0, 0].mul(bad)

  def run(kernel, axis):
    def apply(x, other):
      one = lambda x, kernel: ops.dot_general(
        x, WS[0], cases.DIMS, recipe=recipe, state={**other, "kernel": kernel}
      )
      return jax.vmap(one, in_axes=(0, axis))(x, kernel)

    other = {role: leaves for role, leaves in state.items() if role != "kernel"}
    out, vjp = jax.vjp(apply, large, other)
    return out, vjp(jnp.asarray(CS))

  compiled = quickly(run, static_argnums=1)
  cases.equal(compiled(copies, 0), compiled(state["kernel"], None))


@pytest.mark.parametrize("role", ["input", "kernel", "output_grad"])
def test_vmap_of_grad_that_maps_the_history_of_a_tensor_but_not_its_scale(role):
  recipe = RECIPES["delayed"]
  state = ops.init_state(recipe)
  histories = jnp.stack([jnp.full((4,), 4.48 * 100**i, jnp.float32) for i in range(COPIES)])

  def run(history, x, w, c):
    own = {**state, role: {**state[role], "amax_history": history}}
    out, x_grad, w_grad, new = cases.step(recipe, x, w, c, own)
    return out, x_grad, w_grad, new[role]  # the states of other tensors see all copies

  mapped = quickly(jax.vmap(run))(histories, XS, WS, CS)
  each = [quickly(run)(*copy) for copy in zip(histories, XS, WS, CS, strict=True)]
  cases.equal(mapped, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))


class Layers(nn.Module):
  """Two layers in sequence: scanned or unrolled, with or without remat."""

  recipe: fp8.Recipe
  scan: bool
  remat: bool = False

  @nn.compact
  def __call__(self, x):
    dense = nn.remat(nn.Dense) if self.remat else nn.Dense
    make = lambda name: dense(IN, dot_general_cls=self.recipe.dot_general_cls, name=name)
    if not self.scan:
      for i in range(2):
        x = make(f"layer_{i}")(x)
      return x
    body = nn.scan(
      lambda module, x, _: (module(x), None),
      variable_axes={"params": 0, OWG: 0},
      split_rngs={"params": True},
      length=2,
    )
    return body(make("layers"), x, None)[0]


def gradients(model, variables):
  loss = lambda v: jnp.sum(jnp.sin(model.apply(v, XS[0], rngs={"sr_rng": cases.KEY})))
  return quickly(jax.value_and_grad(loss))(variables)


def initialized(model):
  return jax.jit(model.init)(jax.random.key(0), XS[0])


@by_class
def test_scan_over_layers(name):
  """A scanned stack with remat equals its layers in sequence."""
  recipe = RECIPES[name]
  scanned = Layers(recipe, scan=True, remat=True)
  variables = initialized(scanned)
  assert set(variables) == ({"params", OWG} if name in STATEFUL else {"params"})
  take = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree["layers"])
  spread = lambda tree: {
    collection: {f"layer_{i}": take(tree[collection], i) for i in range(2)} for collection in tree
  }
  loss, grads = gradients(scanned, variables)
  spelled_out = gradients(Layers(recipe, scan=False), spread(variables))
  # Two programs may round sums differently. Then a value may fall on the other side of a tie.
  for got, want in zip(*map(jax.tree.leaves, (spelled_out, (loss, spread(grads)))), strict=True):
    assert np.linalg.norm(got - want) <= 2.0**-6 * np.linalg.norm(want)


@pytest.mark.parametrize("name", ["delayed", "block", "stochastic"])
def test_remat_changes_no_bit(name):
  def run(dense):
    layer = dense(OUT, dot_general_cls=RECIPES[name].dot_general_cls)
    variables = initialized(layer)
    return gradients(layer, variables)

  cases.equal(run(nn.remat(nn.Dense)), run(nn.Dense))


class Expert(nn.Module):
  """A module with one expert's kernel."""

  recipe: fp8.Recipe

  @nn.compact
  def __call__(self, x):
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (IN, OUT))
    return self.recipe.einsum_cls()("tk,kn->tn", x, kernel)


@pytest.mark.parametrize("name", ["delayed", "mxfp8"])
def test_nn_vmap_over_experts(name):
  recipe = RECIPES[name]
  axes = {"params": 0, OWG: 0}
  experts = nn.vmap(Expert, variable_axes=axes, split_rngs={"params": True}, axis_size=COPIES)(
    recipe
  )
  variables = jax.jit(experts.init)(jax.random.key(0), XS)
  variables = {**variables, "params": {"kernel": jnp.asarray(WS)}}

  @quickly
  def run(variables, xs, cs):
    out, vjp = jax.vjp(lambda v: experts.apply(v, xs), variables)
    return out, vjp(cs)[0]

  out, grads = run(variables, XS, CS)
  steps = [compiled_quickly(recipe, *copy) for copy in zip(XS, WS, CS, strict=True)]
  cases.equal(out, jnp.stack([step[0] for step in steps]))
  cases.equal(grads["params"]["kernel"], jnp.stack([step[2] for step in steps]))
  for role in ("input", "kernel", "output_grad") if name in STATEFUL else ():
    got = grads[OWG]["Fp8Einsum_0"][f"{role}_amax_history"]
    cases.equal(got, jnp.stack([step[3][role]["amax_history"] for step in steps]))


@functools.cache
def mesh():
  return jax.make_mesh((COPIES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def shard_mapped(recipe, check_vma):
  """Runs a step with sharded tokens, and with replicated kernel and state."""

  def apply(x, w, state):
    key = jax.random.fold_in(cases.KEY, jax.lax.axis_index("data"))
    return ops.dot_general(x, w, cases.DIMS, recipe=recipe, state=state, key=key)

  sharded = jax.shard_map(
    apply,
    mesh=mesh(),
    in_specs=(P("data"), P(), P()),
    out_specs=P("data"),
    check_vma=check_vma,
  )

  def run(x, w, c, state):
    out, vjp = jax.vjp(sharded, x, w, state)
    return (out, *vjp(c))

  return quickly(run)


SHARD_MAPPED = [(name, True) for name in (*cases.ONE_OF_EACH_CLASS, "delayed, first step")]
SHARD_MAPPED += [(name, False) for name in ("delayed", "delayed, first step", "block")]
SHARD_MAPPED += [("stochastic", False)]


@pytest.mark.parametrize(("name", "check_vma"), SHARD_MAPPED)
def test_shard_map(name, check_vma):
  """Without state, each device's part has its own scale. With state, all devices share one."""
  recipe = RECIPES[name]
  x, c = XS.reshape(-1, IN), CS.reshape(-1, OUT)
  out, dx, dw, state = shard_mapped(recipe, check_vma)(x, WS[0], c, ops.init_state(recipe))
  if name in STATEFUL:
    cases.equal(state, compiled_quickly(recipe, x, WS[0], c)[3])
  if name == "delayed, first step":  # its first scale covers the whole tensor
    cases.equal((out, dx, dw), compiled_quickly(recipe, x, WS[0], c)[:3])
    return
  steps = [
    compiled_quickly(recipe, XS[i], WS[0], CS[i], key=jax.random.fold_in(cases.KEY, i))
    for i in range(COPIES)
  ]
  cases.equal(out, jnp.concatenate([step[0] for step in steps]))
  cases.equal(dx, jnp.concatenate([step[1] for step in steps]))
  total = np.sum(np.stack([step[2] for step in steps]).astype(np.float64), axis=0)
  # Four float32 terms. Each addition rounds by half an epsilon of the partial sum.
  tolerance = 4 * np.finfo(np.float32).eps * np.abs(np.stack([step[2] for step in steps])).sum(0)
  assert np.all(np.abs(dw - total) <= tolerance)


SHARDINGS = {
  "data parallel": (P("data"), P(), P("data")),
  "tensor parallel, columns": (P(), P(None, "data"), P(None, "data")),
  "tensor parallel, rows": (P(None, "data"), P("data"), P()),
}


SHARDED = [(name, layout) for name in ("delayed", "block") for layout in SHARDINGS]
SHARDED += [(name, "tensor parallel, rows") for name in ("current", "rowwise", "mxfp8")]


@pytest.mark.parametrize(("name", "layout"), SHARDED)
def test_jit_with_shardings(name, layout):
  """Sharding changes neither values nor state, even if it cuts a block."""
  recipe = RECIPES[name]
  arrays = XS.reshape(-1, IN), WS[1], CS.reshape(-1, OUT)
  placed = [
    jax.device_put(a, NamedSharding(mesh(), spec))
    for a, spec in zip(arrays, SHARDINGS[layout], strict=True)
  ]
  cases.equal(
    jax.device_get(compiled_quickly(recipe, *placed)),
    jax.device_get(compiled_quickly(recipe, *arrays)),
  )
