"""The paired experiment: its statistics, its arms, and files that depend on the seed alone."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convergence
import flax_fp8 as fp8
import lm.explain
from lm.config import UsageError
from lm.step import perturb
from lm.text import Corpus
from tests import oracle
from trials import files, proof
from trials.arms import ARMS, GATES, QUESTIONS, Arm
from trials.paired import MARGINS, compare, summarize, verdict
from trials.proof import explain_arm
from trials.report import draw, make_content, show
from trials.rounding import RoundedDot, rounded
from trials.sizes import PRESETS_OF_TRIALS
from trials.trial import initializer, run_trial, spike, stretch, stretches

MICRO = PRESETS_OF_TRIALS["micro"]
RNG = np.random.default_rng(0)


def records(gap=0.0, spread=0.2, pairs=12):
  """Trials whose losses are ``gap`` percent above 2.0, give or take ``spread`` percent."""
  factors = 1 + (gap + spread * RNG.standard_normal(pairs)) / 100
  return {
    seed: {"training": [2.0 * f] * 400, "held_out": [2.0 * f] * GATES, "held_out_in_bf16": 2.0 * f}
    for seed, f in enumerate(factors)
  }


BASE = records(spread=0.0)


class TestStatistics:
  def test_against_a_textbook(self):
    """Four gaps of mean 1 and variance 2/3; Student's quantile for three degrees is 3.182."""
    found = summarize([0.0, 1.0, 1.0, 2.0])
    half = 3.18245 * np.sqrt(2 / 3 / 4)
    assert found["interval"] == pytest.approx([1 - half, 1 + half], rel=1e-5)
    assert found["standard_deviation"] == pytest.approx(np.sqrt(2 / 3))
    assert found["p"] == pytest.approx(2 * found["p_worse"])
    assert found["equivalent_within"] == pytest.approx(1 + 2.35336 * np.sqrt(2 / 3 / 4), rel=1e-5)

  @pytest.mark.parametrize("spread", [0.05, 0.4])
  def test_an_arm_equal_to_bf16_is_equivalent(self, spread):
    found = compare(records(spread=spread), BASE)["training"]
    assert verdict(found) == f"{MARGINS[0]} %"
    assert found["equivalent_within"] < MARGINS[0]

  @pytest.mark.parametrize("spread", [0.05, 0.4])
  def test_an_arm_with_one_percent_added_is_not(self, spread):
    found = compare(records(1.0, spread), BASE)["training"]
    assert found["p_equivalent"][str(MARGINS[0])] > 0.5
    assert found["p_worse"] < 0.01
    assert found["mean"] == pytest.approx(1.0, abs=3 * spread / np.sqrt(12))

  def test_a_shift_is_found_in_each_loss(self):
    arm = {seed: dict(record) for seed, record in BASE.items()}
    for seed, record in arm.items():
      record["held_out_in_bf16"] *= 1.01 + 1e-5 * (-1) ** seed
    found = compare(arm, BASE)
    assert [found[name]["mean"] for name in ("training", "held_out", "held_out_in_bf16")] == (
      pytest.approx([0.0, 0.0, 1.0])
    )

  def test_bits_that_are_equal_are_equivalent(self):
    found = compare(BASE, BASE)
    assert (found["training"]["p"], verdict(found["training"])) == (1.0, f"{MARGINS[0]} %")
    assert found["gates"] == 0

  def test_too_few_pairs_show_nothing(self):
    found = summarize([0.3, -0.6])
    assert verdict(found) == "-"
    assert found["p"] > 0.05
    assert summarize([0.3]) == {"pairs": 1, "mean": 0.3}

  def test_only_seeds_of_both_and_only_gates_that_differ_count(self):
    arm = {seed: {**BASE[0], "held_out": [2.0, 2.1, *[1.9] * (GATES - 2)]} for seed in (3, 99)}
    found = compare(arm, BASE)
    assert (found["training"]["pairs"], found["gates_above"], found["gates"]) == (1, 1, GATES - 1)

  def test_training_is_the_mean_of_the_last_300_steps(self):
    arm = {0: {**BASE[0], "training": [9.0] * 100 + [2.0] * 150 + [2.2] * 150}}
    assert compare(arm, BASE)["training"]["mean"] == pytest.approx(5.0)


class TestArms:
  def test_each_is_paired_with_bf16_of_the_same_rate_and_data(self):
    for arm in ARMS.values():
      base = ARMS[arm.base]
      assert base.config is base.dot_general_cls is None
      assert (base.learning_rate, base.spikes) == (arm.learning_rate, arm.spikes)

  def test_what_was_asked_for_is_trained_with_its_base(self):
    names = lambda *argv: [arm.name for arm in convergence.choose(parse(*argv))]
    assert names("--arms", "delayed, half rate") == ["bf16, half rate", "delayed, half rate"]
    assert set(names()) == {arm.name for arm in QUESTIONS["recipes"]}

  def test_patterns_match_the_model(self):
    for arm in ARMS.values():
      jax.eval_shape(initializer(MICRO, arm), jax.random.key(0))

  def test_perturbed_parameters(self):
    params = {"kernel": jnp.ones((64, 64)), "bias": jnp.zeros(3)}
    new = perturb(params, 0.026, jax.random.key(0))
    np.testing.assert_allclose(np.abs(new["kernel"] - 1), 0.026, rtol=1e-5)
    assert abs(float(new["kernel"].mean()) - 1) < 0.002
    np.testing.assert_array_equal(new["bias"], 0.0)
    assert set(np.unique(perturb(params, 2.0**-23, jax.random.key(0))["kernel"])) == {
      np.float32(1 - 2**-23),
      np.float32(1 + 2**-23),
    }

  def test_one_step_in_eight_has_a_spike(self):
    found = [float(spike(step, jax.random.key(0))) for step in range(400)]
    assert set(found) == {1.0, 4096.0}
    assert 25 < found.count(4096.0) < 80

  def test_rounding_alone(self):
    x = RNG.standard_normal(512).astype(np.float32)
    scale = oracle.scale([np.abs(x).max()], 1.0, "float8_e4m3fn")
    want = oracle.qdq(x, scale, "float8_e4m3fn")
    np.testing.assert_allclose(rounded(jnp.asarray(x), None), want, rtol=1e-6)
    grad = jax.grad(lambda x: jnp.sum(rounded(x, None) * jnp.arange(512.0)))(jnp.asarray(x))
    np.testing.assert_array_equal(grad, np.arange(512.0))
    keys = jax.random.split(jax.random.key(0), 400)
    mean = jax.vmap(lambda key: rounded(jnp.asarray(x), key))(keys).mean(0)
    assert np.abs(mean - x).mean() < 0.2 * np.abs(np.asarray(want) - x).mean()

  @pytest.mark.parametrize("named", [{"inputs": "nearest"}, {"kernels": "nearest"}, {}])
  def test_rounds_one_operand(self, named):
    x, w = jnp.asarray(RNG.standard_normal((4, 8))), jnp.asarray(RNG.standard_normal((8, 2)))
    out = RoundedDot(**named).apply({}, x, w, (((1,), (0,)), ((), ())))
    x = rounded(x, None) if "inputs" in named else x
    w = rounded(w, None) if "kernels" in named else w
    np.testing.assert_array_equal(out, x @ w)


def parse(*argv):
  return convergence.make_options().parse_args(argv)


def trial(name, seed=0, **changes):
  arm = dataclasses.replace(ARMS[name], **changes)
  return run_trial(dataclasses.replace(MICRO, seed=seed), arm, Corpus.read())


@pytest.mark.slow
def test_trials():
  """In one test, because all of them share two compiled programs."""
  bf16, delayed = trial("bf16"), trial("delayed")
  assert (len(bf16["training"]), len(bf16["held_out"])) == (MICRO.steps, GATES)
  assert bf16["held_out"][-1] == bf16["held_out_in_bf16"] < bf16["held_out"][0]
  assert delayed["held_out"][-1] != delayed["held_out_in_bf16"]
  assert delayed["held_out"][-1] == pytest.approx(bf16["held_out"][-1], rel=0.02)
  assert trial("bf16", 1)["training"][0] != bf16["training"][0]

  assert trial("delayed", gates=range(0)) == {**bf16, "arm": "delayed"}
  half, each = GATES // 2, MICRO.steps // 2
  first, last = trial("delayed", gates=range(half)), trial("delayed", gates=range(half, GATES))
  assert first["training"][:each] == delayed["training"][:each]
  assert last["training"][:each] == bf16["training"][:each]
  assert first["training"][each] != delayed["training"][each]
  assert last["training"][-1] != bf16["training"][-1]
  assert first["held_out"][-1] == first["held_out_in_bf16"]


@pytest.mark.slow
def test_state_that_is_reset_stays_as_it_was():
  arm = dataclasses.replace(ARMS["delayed, scales 1"], name="", perturbed=0.0)
  carry = initializer(MICRO, arm)(jax.random.key(0))
  before = jax.tree.map(np.asarray, carry[0][fp8.OVERWRITE_WITH_GRADIENT])
  windows = next(stretches(MICRO, Corpus.read()))
  run = stretch(MICRO, arm, in_fp8=True)
  (variables, _), _ = run(carry, jnp.int32(0), windows, jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, variables[fp8.OVERWRITE_WITH_GRADIENT], before)


@pytest.mark.slow
def test_a_sweep_continues_and_equal_seeds_give_equal_files(tmp_path, monkeypatch, capsys):
  options = ["--preset", "micro", "--arms", "delayed", "--seeds", "2", "--out"]
  convergence.main([*options, str(tmp_path / "a"), "--jobs", "2"])
  assert "FP8 delayed" in capsys.readouterr().out
  convergence.main([*options, str(tmp_path / "b"), "--jobs", "1"])
  own = sorted((tmp_path / "a" / "trials").rglob("*.json"))
  assert len(own) == 4
  for path in own:
    other = tmp_path / "b" / path.relative_to(tmp_path / "a")
    assert path.read_bytes() == other.read_bytes()
  own[0].unlink()
  trained = []
  monkeypatch.setattr(files, "train_arm", lambda *args: str(trained.append(args[3])))
  convergence.main([*options, str(tmp_path / "a"), "--jobs", "1"])
  assert trained == [[0]]
  monkeypatch.undo()
  with pytest.raises(UsageError, match=r"got steps=16 \(there: 32\)"):
    convergence.main([*options, str(tmp_path / "a"), "--report", "--steps", "16"])
  found = json.loads((tmp_path / "b" / "convergence_micro.json").read_text())
  assert found["arms"]["delayed"]["compared"]["training"]["pairs"] == 2
  assert (tmp_path / "b" / "convergence_micro.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_has_what_was_trained(capsys):
  trials = {"bf16": BASE, "delayed": records(0.6), "bf16, one ulp": records(spread=0.01)}
  content = make_content(trials)
  assert content["arms"]["delayed"]["trials"]["3"]["held_out"] == pytest.approx(2.012, rel=0.01)
  show(content, convergence.make_console(convergence.WIDTH))
  printed = capsys.readouterr().out
  assert "FP8 delayed" in printed
  assert "BF16, one ulp" in printed
  environment = {"device": "cpu", "date": "2026-11-27"}
  assert len(draw(content | {"environment": environment}).axes) == 3


def test_steps_must_fill_the_gates():
  config = dataclasses.replace(MICRO, steps=GATES + 1)
  with pytest.raises(UsageError, match=f"--steps: must be a multiple of {GATES}; got 17"):
    run_trial(config, Arm(name="bf16"), Corpus.read())


def test_the_gpu_preset():
  config, corpus = PRESETS_OF_TRIALS["gpu"], Corpus.of_preset("gpu")
  assert 20e6 < config.shape.parameters < 30e6
  assert len(corpus.train) > 5e6
  assert corpus.name == "Python's standard library"
  assert corpus.batch(config, 0).shape == (config.batch_size, config.seq_len + 1)
  config = dataclasses.replace(config, batch_size=1)
  variables, _ = jax.eval_shape(initializer(config, ARMS["delayed"]), jax.random.key(0))
  assert fp8.OVERWRITE_WITH_GRADIENT in variables


@pytest.mark.slow
@pytest.mark.skipif(
  lm.explain.missing_compiler() is not None, reason="JAX's GPU compiler supports only Linux"
)
def test_the_projections_of_an_arm_are_fp8():
  report = explain_arm(MICRO, ARMS["delayed"], "h100")
  assert 57 * report.fp8_gemms == 42 * report.total_gemms > 0


@pytest.mark.parametrize(("arm", "found"), [("delayed", 0), ("bf16", 3), ("flax.linen.fp8_ops", 0)])
def test_an_arm_with_the_wrong_gemms_is_not_trained(monkeypatch, arm, found):
  report = SimpleNamespace(fp8_gemms=found, total_gemms=57, device_kind="H100")
  monkeypatch.setattr(proof, "explain_arm", lambda *_: report)
  with pytest.raises(AssertionError, match=rf"arm '{arm}' must have \w+ FP8 .*; got {found} of 57"):
    proof.count_fp8_gemms(MICRO, ARMS[arm])
  report.fp8_gemms = 42 - report.fp8_gemms if arm != "bf16" else 0
  assert proof.count_fp8_gemms(MICRO, ARMS[arm]) == f"{report.fp8_gemms} of 57 GEMMs are FP8"
