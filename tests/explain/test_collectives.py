"""Collectives in every text form, and the bytes that a ring sends."""

import pytest

from flax_fp8.explain import collectives, hlo, schedule
from flax_fp8.explain.collectives import Collective

TEXT = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}}

ENTRY %main (x: f8e4m3fn[32,64], y: bf16[16]) -> () {{
  %x = f8e4m3fn[32,64]{{1,0}} parameter(0)
  %y = bf16[16]{{0}} parameter(1)
  %c = {collective}
  ROOT %t = () tuple()
}}
"""


def found(collective):
  module = hlo.parse(TEXT.format(collective=collective))
  return collectives.find(module, schedule.launches(module), devices=8)


FORMS = {
  "gather": (
    "f8e4m3fn[256,64]{1,0} all-gather(%x), dimensions={0}, replica_groups=[1,8]<=[8]",
    [("all-gather", "f8e4m3fn", 8 * 2048, 8)],
  ),
  "gather_start": (
    "((f8e4m3fn[32,64]{1,0}, bf16[16]{0}), (f8e4m3fn[128,64]{1,0}, bf16[64]{0})) "
    "all-gather-start(%x, %y), replica_groups={{0,1,2,3},{4,5,6,7}}",
    [("all-gather", "f8e4m3fn", 4 * 2048, 4), ("all-gather", "bf16", 4 * 32, 4)],
  ),
  "named_mesh": (
    "bf16[16]{0} all-reduce(%y), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add",
    [("all-reduce", "bf16", 32, 4)],
  ),
  "scatter": (
    "bf16[2]{0} reduce-scatter(%y), dimensions={0}, to_apply=%add",
    [("reduce-scatter", "bf16", 32, 8)],
  ),
  "none": ("bf16[16]{0} negate(%y)", []),
}


@pytest.mark.parametrize(("collective", "expected"), FORMS.values(), ids=FORMS)
def test_forms(collective, expected):
  assert [(c.kind, c.dtype, c.bytes, c.group) for c in found(collective)] == expected


def test_reduction():
  assert [c.reduction for c in found(FORMS["named_mesh"][0])] == ["add"]
  assert [c.reduction for c in found(FORMS["gather"][0])] == [""]


@pytest.mark.parametrize(
  ("kind", "sent"),
  [("all-gather", 75), ("reduce-scatter", 75), ("all-reduce", 150), ("collective-permute", 100)],
)
def test_bytes_that_a_ring_sends(kind, sent):
  each = Collective(kind, "bf16", bytes=100, group=4, times=3, path="")
  assert each.sent == 3 * sent
