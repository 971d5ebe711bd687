"""The parser of HLO text, on forms that XLA prints or may print."""

import pytest

from flax_fp8.explain import hlo

TEXT = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(bf16[4,8]{1,0})->f32[4]{0}}

FileNames
1 "some/file.py"

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (x: bf16[4,8], t: (f32[2], s32[])) -> f32[4] {
  %x = bf16[4,8]{1,0:T(8,128)(2,1)S(5)} parameter(0), metadata={op_name="x[\\"k\\"]"}
  %t = (f32[2]{0}, /*index=1*/s32[]) parameter(1)
  %zero = f32[] constant(0)
  %table = f32[2,2]{1,0} constant({
    {1, 2},
    {3, 4} })
  %part = f32[2]{0} get-tuple-element((f32[2]{0}, s32[]) %t), index=0
  %call = (bf16[4,4]{1,0}, s8[16]{0}) custom-call(bf16[4,8]{1,0} %x, bf16[4,8]{1,0} %x), \
custom_call_target="__cublas$gemm", metadata={op_name="jit(f)/net/dot_general" source_line=3}, \
backend_config={"gemm_backend_config":{"epilogue":"a, \\"b\\" }{"},"n":[1,2]}
  ROOT %out = f32[4]{0} reduce(%x, %zero), dimensions={1}, to_apply=%add
}
"""


@pytest.fixture(scope="module")
def module():
  return hlo.parse(TEXT)


def entry(module):
  return module.computations[module.entry].instructions


def test_computations_and_their_roots(module):
  assert module.entry == "main"
  assert {name: c.root_name for name, c in module.computations.items()} == {
    "add": "sum",
    "main": "out",
  }
  assert module.unread == []


def test_shapes(module):
  found = entry(module)
  assert found["x"].shape == hlo.Array("bf16", (4, 8), (1, 0))
  assert found["t"].shape == (hlo.Array("f32", (2,), (0,)), hlo.Array("s32", ()))
  assert [array.bytes for array in hlo.arrays(found["t"].shape)] == [8, 4]


@pytest.mark.parametrize(
  ("array", "size"),
  [
    (hlo.Array("f8e4m3fn", (3, 5)), 15),
    (hlo.Array("bf16", ()), 2),
    (hlo.Array("s4", (3,)), 2),
    (hlo.Array("pred", (7,)), 7),
    (hlo.Array("c64", (2,)), 16),
    (hlo.Array("token", ()), 0),
    (hlo.Array("f4e2m1fn", (4,)), 2),
  ],
  ids=lambda value: value.dtype if isinstance(value, hlo.Array) else None,
)
def test_bytes(array, size):
  assert array.bytes == size


def test_operands_may_have_shapes(module):
  assert entry(module)["part"].operands == ("t",)
  assert entry(module)["call"].operands == ("x", "x")


def test_constants_may_take_several_lines(module):
  assert entry(module)["table"].array == hlo.Array("f32", (2, 2), (1, 0))
  assert "3, 4" in entry(module)["table"].literal


def test_attributes_names_and_configurations(module):
  call = entry(module)["call"]
  assert call.target == "__cublas$gemm"
  assert call.op_name == "jit(f)/net/dot_general"
  assert call.config == {"gemm_backend_config": {"epilogue": 'a, "b" }{'}, "n": [1, 2]}
  assert entry(module)["x"].op_name == 'x["k"]'
  assert entry(module)["zero"].op_name == ""
  assert entry(module)["out"].called("to_apply") == ["add"]


def test_users_callers_and_parameters(module):
  main = module.computations["main"]
  assert [user.name for user in main.users["x"]] == ["call", "call", "out"]
  assert [caller.name for caller in module.callers["add"]] == ["out"]
  assert {number: p.name for number, p in main.parameters.items()} == {0: "x", 1: "t"}


@pytest.mark.parametrize(
  "line",
  [
    "%odd = mystery",
    "%odd = f32[2]{0} broken(%x, (",
    "a line of some new kind",
  ],
)
def test_unread_lines_are_kept(line):
  module = hlo.parse(TEXT.replace("  %zero = f32[] constant(0)\n", f"  {line}\n"))
  assert module.unread == [line]
  assert "out" in entry(module)


def test_unterminated_instructions():
  begun = "  %zero = f32[] constant({"
  module = hlo.parse(TEXT.replace("  %zero = f32[] constant(0)", begun))
  assert module.unread == [begun.strip()]
  assert {"table", "part", "call", "out"} <= entry(module).keys()
  module = hlo.parse("ENTRY %main {\n  ROOT %a = f32[2] constant({\n")
  assert module.unread == ["ROOT %a = f32[2] constant({"]


def test_unread_operands_have_placeholders():
  module = hlo.parse(TEXT.replace("%zero = f32[] constant(0)", "%zero = mystery"))
  x, zero = module.operands(entry(module)["out"])
  assert (x.name, zero.name, zero.opcode, zero.array.bytes) == ("x", "zero", "unread", 0)
  module = hlo.parse(TEXT.replace("  %zero = f32[] constant(0)", "  a line of some new kind"))
  assert module.operands(entry(module)["out"])[1].opcode == "unread"


def test_text_without_percent_signs_and_signatures():
  module = hlo.parse("HloModule f\n\nENTRY main.1 {\n  ROOT a.1 = f32[] parameter(0)\n}\n")
  assert module.computations["main.1"].root.number == 0
