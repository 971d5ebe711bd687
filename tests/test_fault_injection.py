"""The benchmark of faults in small: what is skipped never was, and what Flax's state keeps."""

import dataclasses

import jax
import numpy as np
import pytest

import fault_injection
from fault_injection import ARMS, Fault
from lm.model import ModelShape
from lm.text import read_corpus

CONFIG = dataclasses.replace(
  fault_injection.CONFIG,
  shape=ModelShape(d_model=8, d_ff=16, layers=1, heads=2, kv_heads=1),
  steps=12,
  batch_size=2,
  seq_len=16,
  validate_every=6,
  validation_batches=1,
)
SITE = "layers_0/{}/Faulty_0"
FAULTS = {
  3: Fault(3, SITE.format("up"), 0, np.nan, 0.5),
  5: Fault(5, SITE.format("query"), 1, np.inf, 0.0),
  8: Fault(8, SITE.format("down"), 2, -np.inf, 0.9),
}


def run(name):
  return fault_injection.run(CONFIG, ARMS[name], read_corpus(), FAULTS)


@pytest.mark.slow
def test_a_skipped_step_is_as_if_its_batch_had_not_come():
  """Each kind of fault is seen; the state stays finite, and so does the next loss."""
  figures, state = run("flax_fp8, skip_nonfinite")
  _, without = run("flax_fp8, without those batches")
  assert figures["skipped_steps"] == len(FAULTS)
  assert figures["nonfinite_state"] == [0.0] * CONFIG.steps
  assert all(np.isfinite(figures["train"][step + 1]) for step in FAULTS)
  jax.tree.map(np.testing.assert_array_equal, state.params, without.params)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_flax_hides_infinities_and_keeps_what_is_not_finite():
  """Behind the same guard, or optax's: two faults of three are taken for good steps."""
  figures, _ = run("fp8_ops, apply_if_finite")
  assert figures["skipped_steps"] == 1
  assert all(part > 0 for part in figures["nonfinite_state"][3:])


def test_sites_are_those_of_the_model():
  _, none = fault_injection.start(CONFIG, ARMS["flax_fp8, clean"])
  leaves = jax.tree_util.tree_leaves_with_path(none)
  sites = {fault_injection.site_of(path) for path, _ in leaves}
  assert {fault.site for fault in FAULTS.values()} <= sites
  drawn = fault_injection.draw_faults(sorted(sites), 500, 40, 0)
  assert len(drawn) == 40
  assert {fault.kind for fault in drawn.values()} == {0, 1, 2}
