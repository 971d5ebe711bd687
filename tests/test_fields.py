"""Argument checks: NumPy scalars are accepted, and errors show arrays without their values."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from flax_fp8 import fields


def test_numpy_scalars_make_the_same_recipe() -> None:
  given = fp8.DelayedScaling(
    amax_history_len=np.int64(4),
    interval=np.uint8(2),
    margin=np.float32(1.5),
    power_of_two=np.True_,
  )
  plain = fp8.DelayedScaling(amax_history_len=4, interval=2, margin=1.5, power_of_two=True)
  assert given == plain
  assert hash(given) == hash(plain)
  assert repr(given) == repr(plain)
  assert given.dot_general_cls is plain.dot_general_cls


def test_numpy_scalars_make_the_same_config() -> None:
  given = fp8.Fp8Config(skip_first=np.int32(1), emulate=np.False_)
  assert given == fp8.Fp8Config(skip_first=1)
  assert repr(given) == repr(fp8.Fp8Config(skip_first=1))


@pytest.mark.parametrize(
  ("value", "shown"),
  [
    (jnp.ones((2, 3)), "float32[2, 3]"),
    (np.ones(2, np.int8), "int8[2]"),
    ({"x": [jnp.ones(2), 1]}, "{'x': [float32[2], 1]}"),
    (jax.ShapeDtypeStruct((4,), jnp.bfloat16), "bfloat16[4]"),
    (np.float32(1.5), "np.float32(1.5)"),
    (nn.Dense, "<class 'Dense'>"),
    ("x" * 1000, f"'{'x' * 159}..."),
    (nn.Dense(np.ones(3)), "Dense"),
    ({1: 1, "x": 2}, "dict"),
  ],
  ids=["array", "numpy", "tree", "shape", "scalar", "class", "long", "holds an array", "keys"],
)
def test_show(value: object, shown: str) -> None:
  assert fields.show(value) == shown
