"""Tracing values back through every instruction that forwards them."""

import pytest

from flax_fp8.explain import dataflow, hlo
from flax_fp8.explain.dataflow import Value
from tests.explain.test_schedule import TEXT

MODULE = hlo.parse(TEXT)


def value(computation, name, *index):
  return Value(MODULE.computations[computation].instructions[name], index)


def origins(found):
  return {each.instruction.name for each in dataflow.computed_by(MODULE, found)}


@pytest.mark.parametrize(
  ("start", "expected"),
  [
    (value("main", "z"), {"shallow"}),
    (value("main", "y"), {"x", "twice"}),
    (value("main", "w"), {"left_op", "shallow"}),
    (value("main", "known", 1), {"n"}),
    (value("inner_body", "i"), {"n"}),
    (value("double", "p"), {"x", "twice"}),
    (value("main", "done"), {"rs"}),
    (value("left", "l"), {"shallow"}),
    (value("main", "end"), {"end"}),
  ],
  ids=["call", "loop", "branches", "tuple", "carried", "inside", "async", "argument", "itself"],
)
def test_computed_by(start, expected):
  assert origins(start) == expected


def test_ancestors_follow_the_given_step():
  negations = lambda found: (
    dataflow.operands(MODULE, found) if found.instruction.opcode == "negate" else []
  )
  found = [v.instruction.name for v in dataflow.ancestors(MODULE, value("main", "z"), negations)]
  assert found[0] == "shallow"
  assert set(found) == {"shallow", "x", "twice"}
