"""``check_train_step`` accepts correct training loops and names the errors of wrong ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from flax_fp8.training.check.fit import judge
from flax_fp8.training.check.report import _ADVICE, Finding
from tests.linen import lifts
from tests.training import loops
from tests.training.loops import BATCH, OWG, VARIABLES


def marked(loop):
  return pytest.param(loop, id=loop.name, marks=pytest.mark.slow if loop.slow else ())


@pytest.mark.parametrize("loop", [marked(loop) for loop in loops.LOOPS])
def test_loop(loop):
  report = loop.report
  assert report.kinds == loop.kinds, report
  assert report.ok == (not loop.kinds)


def test_a_gradient_tree_that_was_divided_as_a_whole_is_named():
  (report,) = (x.report for x in loops.LOOPS if x.name == "division_by_the_number_of_tokens")
  (finding,) = report.findings
  whole = "0.03125 times the correct value, for every tensor: the whole gradient tree was divided"
  assert finding.seen.startswith(whole), finding.seen
  assert "accumulate_gradients(..., weights=tokens)" in finding.advice
  assert "fp8.partition_for_grad_overwrite" in finding.advice


def test_figures():
  """Each verdict has a number: a sum of three, a division by 65536, an average."""
  right, old = np.random.default_rng(0).uniform(1, 2, (2, 4, 3)) * np.array([[1], [1], [8], [64]])
  for got, kind, seen in (
    (3 * right, "summed", "3 times the correct value"),
    (right / 65536, "scaled", "1.52588e-05 times the correct value"),
    (
      0.9 * old + 0.1 * right,
      "averaged",
      "0.1 times the correct value plus 0.9 times the old value",
    ),
    (right + 0.01 * old, "decayed", "1 times the correct value plus 0.01 times the old value"),
    (0.999 * right, "decayed", "0.999 times the correct value"),
    (0.999 * old, "decayed", "0.999 times the old value"),
    (old - 0.1 * right, "added", "-0.1 times the correct value plus 1 times the old value"),
    (old - 0.01, "added", "the old value plus -0.01"),
    (right / np.linalg.norm(right, axis=1, keepdims=True), "clipped", "less if it is larger"),
    (np.minimum(right, 1.5), "clipped", "never above 1.5"),
    (0 * right, "reset", "is 0"),
    (right * np.nan, "not finite", "100% of it"),
    (right**2, "unexplained", "times the correct value"),
    (right, "right", ""),
    (old, "kept", "is unchanged"),
  ):
    verdict = judge(right, old, got)
    assert verdict.kind == kind, (kind, verdict)
    assert seen in verdict.seen


def test_one_known_slot_is_enough():
  """Histories of two slots have one known value per run."""
  right, old = np.random.default_rng(1).uniform(1, 2, (2, 4, 1)) * np.array([[1], [1], [8], [64]])
  for got, kind in (
    (2 * right, "summed"),
    (0.5 * old + 0.5 * right, "averaged"),
    (right / np.maximum(right, 1.2), "clipped"),
    (old - 0.1 * right, "added"),
    (right * (1 - 1e-4), "decayed"),
  ):
    assert judge(right, old, got).kind == kind


LIFTED = [("1", 3), ("1 in 0", 3), ("params for all, state 1", 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "length"),
  [LIFTED[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in LIFTED[1:])],
)
def test_stacks_along_any_axis(name, length):
  """Histories of one slot are compared with kernels. Some stacks have the size of a history."""
  model = lifts.written(name, fp8.DelayedScaling(amax_history_len=length))
  variables = lifts.trained(model)

  def step(times, variables, x):
    grads = fp8.grad(lambda v: jnp.mean((model.apply(v, x) - 1) ** 2))(variables)
    new, rest = fp8.partition_for_grad_overwrite(grads)
    new = jax.tree.map(lambda leaf: times * leaf, new)
    return fp8.apply_updates(variables, jax.tree.map(lambda g: -0.1 * g, rest), new)

  for times, kinds in ((1, set()), (2, {"summed"})):
    report = fp8.check_train_step(jax.jit(functools.partial(step, times)), variables, lifts.X)
    assert report.kinds == kinds, report


def right_step(state, batch):
  return state.apply_gradients(grads=fp8.grad(loops.loss_fn)(state.params, batch))


class TestReport:
  def test_prints_paths_figures_and_advice(self):
    text = str(loops.NAMED["sum_over_microbatches"].report)
    assert "FP8 state of 6 tensors in params/_overwrite_with_gradient: 1 finding." in text
    assert "2 times the correct value" in text
    assert "all 6 tensors" in text
    assert "fp8.accumulate_gradients" in text

  def test_some_tensors_are_listed(self):
    tensors = tuple(f"params/{OWG}/layer{i}/input" for i in range(9))
    found = Finding("scaled", tensors[:7], "0.5 times the correct value")
    text = str(fp8.TrainStepReport((found,), tensors, 1, ("A note.",)))
    assert "layer3/input" in text
    assert "... and 3 more" in text
    assert text.endswith("A note.")

  def test_every_kind_is_documented(self):
    listed = " ".join((Finding.__doc__ or "").split())
    assert all(f'"{kind}"' in listed for kind in _ADVICE)

  @pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
  def test_arguments_do_not_change(self):
    state = loops.our_train_state()
    before = jax.tree.map(np.array, (state, BATCH))
    assert fp8.check_train_step(jax.jit(right_step, donate_argnums=(0, 1)), state, BATCH).ok
    jax.tree.map(np.testing.assert_array_equal, (state, BATCH), before)

  @pytest.mark.slow
  def test_unused_tensors_are_notes(self):
    report = loops.NAMED["most_recent_after_the_first_step"].report
    assert "aside" in report.notes[0]
    assert "Some tensors did not move" in str(report)


class TestErrors:
  def test_no_state(self):
    with pytest.raises(ValueError, match=r"check_train_step: state must hold amax histories.*none"):
      fp8.check_train_step(lambda state, _: state, {"params": VARIABLES["params"]}, BATCH)

  def test_step_raises(self):
    def step(state, batch):
      raise KeyError("lost")

    with pytest.raises(ValueError, match=r"check_train_step: step_fn must run.*KeyError in call 1"):
      fp8.check_train_step(step, VARIABLES, BATCH)

  def test_step_takes_several_arrays(self):
    step = lambda state, x, y: state
    with pytest.raises(ValueError, match=r"TypeError in call 1.*\*batch\) and \(x, y\)"):
      fp8.check_train_step(jax.jit(step), VARIABLES, BATCH)

  @pytest.mark.parametrize("returned", [jnp.ones(3), (jnp.ones(3), {"params": 1})])
  def test_no_state_comes_back(self, returned):
    with pytest.raises(ValueError, match=r"step_fn must return the new state.*missing: \["):
      fp8.check_train_step(lambda *_: returned, VARIABLES, BATCH)

  def test_step_does_not_train(self):
    with pytest.raises(ValueError, match=r"step_fn must train; got 24 calls"):
      fp8.check_train_step(lambda state, _: (state, 0.0), VARIABLES, BATCH)

  def test_step_skips(self):
    """The step trains at first, but skips with planted state."""

    def step(variables, batch):
      grow = lambda x: jnp.where(
        variables[OWG]["up"]["Fp8DotGeneral_0"]["input_scale"] == 1, 2 * x, x
      )
      return {**variables, "params": jax.tree.map(grow, variables["params"])}

    with pytest.raises(ValueError, match=r"step_fn must not skip steps; got 4 of 4 skipped"):
      fp8.check_train_step(step, jax.tree.map(lambda x: x[None], VARIABLES), BATCH)

  def test_as_many_steps_a_call_as_slots(self):
    step, state, _ = loops.NAMED["scan_over_steps"].make()
    with pytest.raises(
      ValueError, match=r"longer than the number of steps in one call; got amax_hist"
    ):
      fp8.check_train_step(step, state, loops.microbatches(BATCH, loops.LENGTH))

  def test_another_shape(self):
    def step(variables, batch):
      new, _ = loops.update(variables, fp8.grad(loops.loss_fn)(variables, batch))
      return {**new, OWG: jax.tree.map(lambda x: x[None], new[OWG])}

    report = fp8.check_train_step(jax.jit(step), VARIABLES, BATCH)
    assert report.kinds == {"reshaped"}
    assert "has shape (1, 4), not (4,)" in report.findings[0].seen
