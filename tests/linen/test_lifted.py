"""The own axis of scales and histories among the axes of lifted transformations."""

import numpy as np
import pytest

from flax_fp8.linen.lifted import lifted_first, own_axes, own_back, own_last

SHAPES = {
  "unlifted": ((1,), (16,), 0),
  "leading": ((3, 1), (3, 16), 1),
  "trailing": ((1, 3), (16, 3), 0),
  "a history as long as the stack": ((1, 16), (16, 16), 0),
  "a history as long as the leading stack": ((16, 1), (16, 16), 1),
  "a stack of one in front": ((1, 1), (1, 16), 1),
  "a stack of one behind": ((1, 1), (16, 1), 0),
  "between two": ((2, 1, 3), (2, 16, 3), 1),
  "behind two": ((1, 2, 3), (16, 2, 3), 0),
  "a history of one": ((1, 3), (1, 3), 0),
  "a history of one behind a stack": ((3, 1), (3, 1), 1),
}


@pytest.mark.parametrize(("scale", "history", "axis"), SHAPES.values(), ids=SHAPES)
def test_own_axes(scale, history, axis):
  shapes = {"input_scale": scale, "input_amax_history": history, "input_amax": scale}
  assert own_axes(shapes) == dict.fromkeys(shapes, axis)
  assert own_axes({"input_scale": scale})["input_scale"] in (
    axis,
    len(scale) - 1,
  )  # sizes of 1 hold the same values


def test_lifted_axes_are_moved_and_moved_back():
  history = np.arange(24.0).reshape(2, 4, 3)
  moved = lifted_first({"scale": np.ones((2, 1, 3)), "amax_history": history})
  np.testing.assert_array_equal(moved["amax_history"], history.transpose(0, 2, 1))
  assert moved["scale"].shape == (2, 3, 1)
  for axis in range(3):
    np.testing.assert_array_equal(own_back(own_last(history, axis), axis), history)
  nothing = np.float32(1)
  assert own_last(nothing, 0) is nothing
  assert own_back(nothing, 0) is nothing
  assert own_axes({"scale": ()}) == {"scale": 0}
