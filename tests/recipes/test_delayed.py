"""Delayed scaling compared with the float64 oracle, step by step."""

import re

import flax.linen.fp8_ops as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import flax_fp8 as fp8
from flax_fp8 import ops
from flax_fp8.contraction import View
from flax_fp8.recipes import Role
from flax_fp8.recipes.delayed import resize_history, roll_history
from tests import oracle
from tests.recipes import cases
from tests.transformations import mesh

OWG = fp8.OVERWRITE_WITH_GRADIENT
ARRAYS = (jnp.ones((4, 8)), jnp.ones((8, 2)), jnp.ones((4, 2)))
VIEWS = (View(shape=(1,), batch=(), kept=(), contracting=(0,)),) * 2
AMAXES = [3.0, 0.5, np.nan, 7.0, 0.0, 2.0, np.inf, 1e-3, 9.0, 0.25, 0.25, 0.25]


def run(recipe, role=Role.INPUT, amaxes=AMAXES):
  """Returns the scales and histories of a tensor with these amaxes, step by step."""
  state = jax.tree.map(jnp.asarray, recipe.init_state(role))
  seen = []
  for amax in amaxes:
    x = jnp.array([0.1, -1.0]) * amax
    (q, _), state = recipe.quantize(x, state, role, VIEWS)
    assert float(q.scale) == float(state["scale"][0])
    seen.append((float(q.scale), np.asarray(state["amax_history"])))
  return seen


@pytest.mark.parametrize("role", Role, ids=lambda r: r.value)
@pytest.mark.parametrize("fp8_format", [fp8.Format.HYBRID, fp8.Format.E4M3, fp8.Format.HYBRID_FNUZ])
@pytest.mark.parametrize("length", [1, 2, 5, 1024])
def test_follows_the_oracle(length, fp8_format, role):
  recipe = fp8.DelayedScaling(amax_history_len=length, fp8_format=fp8_format)
  float8 = fp8_format.backward if role is Role.OUTPUT_GRAD else fp8_format.forward
  is_small = fp8_format is fp8.Format.E4M3 and role is Role.OUTPUT_GRAD
  scale, history = 2.0**-7 if is_small else 1.0, np.zeros(length)
  for amax, (got_scale, got_history) in zip(AMAXES, run(recipe, role), strict=True):
    scale = oracle.scale(history, scale, float8.name)
    history = oracle.roll(history, np.float32(amax))
    assert got_scale == pytest.approx(scale, rel=3e-7)
    np.testing.assert_array_equal(got_history, history.astype(np.float32))


@pytest.mark.parametrize(
  ("name", "smallest"), [("HYBRID", 16), ("E4M3", 16), ("HYBRID_FNUZ", 17), ("E4M3_FNUZ", 16)]
)
def test_first_gradients_reach_as_far_down_as_e5m2(name, smallest):
  """``2**-smallest`` is the smallest gradient of the first step, and is exact."""
  recipe = fp8.DelayedScaling(fp8_format=getattr(fp8.Format, name))
  x = jnp.array([2.0**-smallest, 0.49 * 2.0**-smallest])
  (q, _), _ = recipe.quantize(x, ops.init_state(recipe)["output_grad"], Role.OUTPUT_GRAD, VIEWS)
  values = q.data.astype(jnp.float32) * q.scale
  np.testing.assert_array_equal(values, [2.0**-smallest, 0.0])


def test_most_recent_forgets_at_once():
  recipe = fp8.DelayedScaling(amax_history_len=4, amax_compute_algo="most_recent")
  scales = [scale for scale, _ in run(recipe, amaxes=[448.0, 4.48, 44.8, 1.0])]
  assert scales == pytest.approx([1.0, 1.0, 0.01, 0.1], rel=1e-6)


@pytest.mark.parametrize("margin", [0, 1, 2.5, -1])
def test_margin_leaves_headroom(margin):
  recipe = fp8.DelayedScaling(amax_history_len=2, margin=margin)
  assert run(recipe, amaxes=[448.0, 1.0])[-1][0] == pytest.approx(2.0**margin, rel=1e-6)


def test_power_of_two():
  recipe = fp8.DelayedScaling(amax_history_len=2, power_of_two=True)
  assert run(recipe, amaxes=[500.0, 1.0])[-1][0] == 2.0


def test_slots():
  history = jnp.array([4.0, 1.0, 2.0, 3.0])  # 4 is the newest, then 3 and 2; 1 is the oldest
  np.testing.assert_array_equal(roll_history(history, jnp.float32(5)), [5.0, 2.0, 3.0, 4.0])


def due(amaxes, interval):
  """Returns the steps with a new scale: the first with a nonempty history, then each n-th."""
  seen = [i for i, amax in enumerate(amaxes) if np.isfinite(amax) and amax > 0]
  first = seen[0] + 1 if seen else len(amaxes)
  return set(range(first, len(amaxes), interval))


@pytest.mark.parametrize("first_step", ["stored", "current"])
@pytest.mark.parametrize("interval", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("amaxes", [AMAXES, [0.0, np.nan, *AMAXES]], ids=["", "late"])
def test_interval_and_first_step_follow_the_oracle(amaxes, interval, first_step):
  """Amaxes are recorded at each step, for any interval."""
  recipe = fp8.DelayedScaling(amax_history_len=16, interval=interval, first_step=first_step)
  scale, history = 1.0, np.zeros(16)
  steps = due(amaxes, interval)
  for i, (amax, (got, got_history)) in enumerate(
    zip(amaxes, run(recipe, amaxes=amaxes), strict=True)
  ):
    empty = not np.any(history)
    if i in steps:
      scale = oracle.scale(history, scale, "float8_e4m3fn")
    elif first_step == "current" and empty and np.isfinite(amax) and amax > 0:
      scale = float(np.float32(amax)) / 448
    history = oracle.roll(history, np.float32(amax))
    assert got == pytest.approx(scale, rel=3e-7), i
    np.testing.assert_array_equal(got_history, history.astype(np.float32))


def test_first_step_uses_margin_and_power_of_two():
  recipe = fp8.DelayedScaling(first_step="current", margin=1, power_of_two=True)
  assert run(recipe, amaxes=[500.0])[0][0] == 4.0


OVERFLOWING = [2.0, 1.9, 2.5, np.nan, 300.0, 1.0, np.inf, 299.0, 600.0, 0.0, 0.1]


@pytest.mark.parametrize("margin", [0, 1])
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("length", [2, 8])
def test_overflow_follows_the_oracle(length, interval, margin):
  """An amax out of range sets its own scale. Otherwise scales and histories do not change."""
  fields = {"amax_history_len": length, "interval": interval, "margin": margin}
  seen = run(fp8.DelayedScaling(overflow="current", **fields), amaxes=OVERFLOWING)
  plain = run(fp8.DelayedScaling(**fields), amaxes=OVERFLOWING)
  scale, history, overflows = 1.0, np.zeros(length), []
  steps = due(OVERFLOWING, interval)
  for i, (amax, (got, got_history)) in enumerate(zip(OVERFLOWING, seen, strict=True)):
    if i in steps:
      scale = oracle.scale(history, scale, "float8_e4m3fn", margin)
    if np.isfinite(amax) and np.float32(amax) > 448 * scale * (1 + 1e-6):
      scale = float(np.float32(amax)) / 448 * 2.0**margin
      overflows.append(i)
    history = oracle.roll(history, np.float32(amax))
    assert got == pytest.approx(scale, rel=3e-7), i
    np.testing.assert_array_equal(got_history, plain[i][1])
  assert {4} <= set(overflows) <= {2, 4, 7, 8, 10}


@pytest.mark.parametrize("role", Role, ids=lambda r: r.value)
def test_overflow_gives_what_current_scaling_gives(role):
  """Equal bit for bit. A tensor within the range keeps the scale from its history."""
  recipe = fp8.DelayedScaling(amax_history_len=2, overflow="current")
  state = {"scale": jnp.ones(1), "amax_history": jnp.array([3.0, 2.0])}
  x = cases.normal(0, 8, 16)
  name = recipe.float8(role).name
  for amax, scale in ((50.0, 50.0), (2.9, 3.0)):
    tensor = x / np.abs(x).max() * np.float32(amax)
    (q, _), _ = recipe.quantize(jnp.asarray(tensor), state, role, VIEWS, None)
    want, _ = oracle.quantize_by_amax(tensor, name)
    assert float(q.scale) == pytest.approx(scale / oracle.magnitudes(name)[-1], rel=1e-6)
    if amax == scale:
      np.testing.assert_array_equal(np.asarray(q.data, np.float64), want)


class TestOverflowUnderTransformations:
  """One part of four is out of range. All parts use its scale, like the whole batch."""

  recipe = fp8.DelayedScaling(amax_history_len=4, overflow="current")
  x = cases.integers(0, 4, 8, 16) * np.array([1, 1, 64, 1], np.float32)[:, None, None]
  w = cases.integers(1, 16, 8)

  @property
  def state(self):
    leaves = {"scale": jnp.ones(1), "amax_history": jnp.array([8.0, 0, 0, 0])}
    return {role.value: leaves for role in Role}

  def loss(self, state, x):
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    out = ops.dot_general(x, jnp.asarray(self.w), dims, recipe=self.recipe, state=state)
    return jnp.sum(out * jnp.sign(out)), out

  def mapped(self, state, x):
    losses, out = jax.vmap(self.loss, in_axes=(None, 0))(state, x)
    return jnp.sum(losses), out

  def sharded(self, state, x):
    local = lambda state, x: (jax.lax.psum(self.loss(state, x)[0], "data"), self.loss(state, x)[1])
    specs = {"in_specs": (P(), P("data")), "out_specs": (P(), P("data"))}
    return jax.shard_map(local, mesh=mesh(), **specs)(state, x)

  def new_state(self, loss):
    (_, out), state = cases.quickly(jax.value_and_grad(loss, has_aux=True))(self.state, self.x)
    return out, state

  @pytest.mark.parametrize("how", ["mapped", "sharded"])
  def test_equals_the_whole(self, how):
    out, state = self.new_state(self.loss)
    assert float(state["input"]["scale"][0]) == np.float32(7 * 64) / 448
    cases.equal(self.new_state(getattr(self, how)), (out, state))

  def test_in_a_scan(self):
    """Each microbatch uses its own scale. The new scale and history are the maximum."""

    def looped(variables, x):
      state = variables[OWG]
      step = lambda total, part: (total + self.loss(state, part)[0], None)
      return jax.lax.scan(step, 0.0, x)[0]

    got = cases.quickly(fp8.grad(looped))({OWG: self.state}, self.x)[OWG]
    cases.equal(got, self.new_state(self.loss)[1])


def test_overflow_costs_nothing_where_it_saturates(monkeypatch):
  """The default traces to the same program as without the code for this scale."""
  text = lambda recipe: str(jax.make_jaxpr(lambda *a: cases.step(recipe, *a))(*ARRAYS))
  trace = lambda recipe: re.sub("0x[0-9a-f]+", "", text(recipe))  # JAX 0.8.1 prints addresses
  before = trace(fp8.DelayedScaling())
  monkeypatch.delattr(fp8.DelayedScaling, "_scale_of")
  assert trace(fp8.DelayedScaling()) == before
  with pytest.raises(AttributeError):
    trace(fp8.DelayedScaling(overflow="current"))


def test_frozen_scales_do_not_follow():
  assert fp8.DelayedScaling(overflow="current").frozen.overflow == "saturate"


def flax_steps(inputs):
  """Returns the output and state of each step of ``flax.linen.fp8_ops``."""
  module = reference.Fp8DotGeneral(amax_history_length=4)
  dims = (((1,), (0,)), ((), ()))
  variables = module.init(jax.random.key(0), *inputs[0][:2], dims)

  @jax.jit
  def step(variables, x, w, c):
    out, vjp = jax.vjp(lambda v: module.apply(v, x, w, dims), variables)
    return out, vjp(c)[0]

  steps = []
  for arrays in inputs:
    out, variables = step(variables, *arrays)
    steps.append((out, variables[fp8.OVERWRITE_WITH_GRADIENT]))
  return steps


def our_steps(recipe, inputs):
  """Returns the output and state of each step, with Flax's names for the state."""
  state, steps = None, []
  for arrays in inputs:
    out, _, _, state = cases.compiled(recipe, *arrays, state)
    names = {f"{role}_{key}": v for role, leaves in state.items() for key, v in leaves.items()}
    steps.append((out, {k: v for k, v in names.items() if not k.endswith("steps_to_update")}))
  return steps


class TestAgainstFlax:
  """Equal to ``flax.linen.fp8_ops`` bit for bit, if the fields allow it."""

  inputs = tuple(
    tuple(cases.normal(3 * i + j, *shape) * np.float32(1.5**-i) for j, shape in enumerate(shapes))
    for i, shapes in enumerate([((8, 16), (16, 12), (8, 12))] * 6)
  )

  def test_first_step(self):
    """After the first step, both are equal."""
    theirs = flax_steps(self.inputs)
    ours = our_steps(fp8.DelayedScaling(amax_history_len=4, first_step="current"), self.inputs)
    assert not np.array_equal(ours[0][0], theirs[0][0])
    cases.equal(ours[1:], theirs[1:])

  def test_interval(self):
    """Scales equal Flax's at the last step with a new scale. Histories always equal Flax's."""
    theirs = flax_steps(self.inputs)
    ours = our_steps(fp8.DelayedScaling(amax_history_len=4, interval=2), self.inputs)
    for i, last in enumerate((0, 1, 1, 3, 3, 5)):
      for name, value in ours[i][1].items():
        cases.equal(value, theirs[last if name.endswith("scale") else i][1][name])
    for i in (0, 1, 3, 5):
      cases.equal(ours[i][0], theirs[i][0])


class TestResizedHistory:
  """A resized history continues like one of the new length with the same entries."""

  def replay(self, length, amaxes):
    history = jnp.zeros(length)
    for amax in amaxes:
      history = roll_history(history, jnp.float32(amax))
    return history

  @pytest.mark.parametrize("new", [1, 2, 3, 5, 8])
  @pytest.mark.parametrize("old", [1, 2, 3, 5])
  @pytest.mark.parametrize("steps", [0, 1, 4, 12], ids=lambda n: f"after{n}")
  def test_against_a_replay(self, old, new, steps):
    amaxes = np.arange(1.0, steps + 1)
    got = resize_history(self.replay(old, amaxes), new)
    remembered = amaxes[-old:] if steps else []
    np.testing.assert_array_equal(got, self.replay(new, remembered))
    for extra in range(1, new + 1):
      got = roll_history(got, jnp.float32(100 + extra))
      seen = [*remembered, *range(101, 101 + extra)]
      np.testing.assert_array_equal(np.sort(got)[::-1][:extra], seen[-extra:][::-1])
      np.testing.assert_array_equal(got, self.replay(new, seen))

  @pytest.mark.parametrize("axis", [0, 1, -1])
  def test_other_axes_are_left_alone(self, axis):
    rows = np.arange(1.0, 9.0).reshape(2, 4)
    got = resize_history(jnp.asarray(rows.T if axis == 0 else rows), 3, axis)
    want = [[1, 3, 4], [5, 7, 8]]  # slot 1 held the oldest entry
    np.testing.assert_array_equal(got.T if axis == 0 else got, want)
