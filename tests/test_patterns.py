"""A pattern matches the same module everywhere."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import flax_fp8 as fp8
from flax_fp8.explain.gemms import Extent, Gemm, GemmRole
from flax_fp8.explain.report import Report
from flax_fp8.patterns import matches_path

PATH = "mlp/up/Fp8DotGeneral_0"


@pytest.mark.parametrize(
  ("pattern", "meant"),
  [
    (PATH, True),
    ("mlp/up", True),
    ("Net/mlp/up", True),
    (f"Net/{PATH}", True),
    ("*/up", True),
    ("*up", True),
    (re.compile(r"up$"), True),
    (re.compile(r"^Net/mlp"), True),
    (re.compile(r"^mlp"), True),
    ("up", False),
    ("*Net*", False),
    ("Other/mlp/up", False),
    (re.compile(r"^up"), False),
  ],
  ids=str,
)
def test_spellings(pattern, meant):
  assert matches_path(pattern, PATH, "Net") == meant


def test_the_model_itself():
  assert matches_path("", "Fp8Einsum_0")
  assert matches_path("codec", "codec/encode_Fp8Einsum_0")


class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(48, name="head")(nn.Dense(32, name="up")(x))


def reported(batch=1):
  """Makes a report of two GEMMs in high precision."""
  extent = Extent(batch, 8, 16, 32)
  types = {"lhs": "bf16", "rhs": "bf16", "out": "bf16", "kernel": "cuBLASLt", "times": 1}
  gemms = tuple(
    Gemm(path=f"Net/{name}", role=GemmRole.FPROP, extent=extent, bytes=1, reason="none", **types)
    for name in ("up", "head")
  )
  fields = {field.name: () for field in dataclasses.fields(Report)}
  return Report(**fields | {"name": "net", "device_kind": "H100", "gemms": gemms})


PATTERNS = ["head", "Net/head", "*/head", re.compile("head"), re.compile("^Net/head$")]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_conversion_and_assertion_agree(pattern):
  x = jax.ShapeDtypeStruct((4, 32), jnp.float32)
  said = fp8.Fp8Config(exclude=(pattern,), default_exclude=()).report(Net(), x)
  assert [row.layer.path for row in said.taken] == ["up"]
  with pytest.raises(AssertionError, match="got 1 that is not") as caught:
    reported().assert_fp8([pattern])
  assert "Net/up" in str(caught.value)


def test_an_assertion_shows_the_batch():
  with pytest.raises(AssertionError, match=r"Net/up fprop, 4\*8x16x32 by cuBLASLt"):
    reported(batch=4).assert_fp8()


def test_unmatched():
  with pytest.raises(ValueError, match=r"must match a module that has a GEMM; got 'heed'"):
    reported().assert_fp8(["heed"])
  with pytest.raises(TypeError, match="exclude must be a sequence of patterns"):
    reported().assert_fp8(re.compile("head"))
