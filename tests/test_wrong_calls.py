"""Every wrong call raises an error that says what is wrong and what to do."""

from __future__ import annotations

import re

import pytest

from tests.wrong_calls import TABLE, Wrong
from tests.wrong_training_calls import TRAINING_TABLE

CALLS = (*TABLE, *TRAINING_TABLE)
LONGEST = 600
ARRAYS = ("[[", "Array(", "ShapedArray", "array(")


def name_of(case: Wrong) -> str:
  """Makes the same name in every process, without addresses of functions."""
  return re.sub(r" at 0x\w+", "", f"{case.name}: {case.what}")


@pytest.mark.parametrize("case", CALLS, ids=name_of)
def test_the_error_says_what_to_do(case: Wrong) -> None:
  with pytest.raises(case.error) as caught:
    case.call()
  message = str(caught.value)
  assert re.search(case.words, message, re.DOTALL), message
  assert case.name in message
  assert len(message) <= LONGEST
  assert not any(word in message for word in ARRAYS), message


def test_the_table_is_as_long_as_it_says() -> None:
  assert len(CALLS) >= 200
  ids = [(case.name, case.what) for case in CALLS]
  assert len({*ids}) == len(ids)
