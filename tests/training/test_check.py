"""``check_train_step`` on loops that users write: right ones pass, wrong ones are named."""

import pytest

import flax_fp8 as fp8
from tests.training import loops


@pytest.mark.parametrize("loop", loops.LOOPS, ids=lambda loop: loop.name)
def test_loop(loop):
  report = fp8.check_train_step(*loop.make())
  assert report.kinds == loop.kinds, report
  assert report.ok == (not loop.kinds)
