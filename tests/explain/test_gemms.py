"""GEMMs of every kind of kernel that XLA may choose, from HLO text."""

import pytest

from flax_fp8.explain import asked, gemms, hlo, roles, schedule
from flax_fp8.explain.gemms import Extent, GemmRole

# HLO of a compiler that timed kernels on a GPU: Triton GEMMs, with swapped operands or K split into
# batches, and a product without a library.
TEMPLATE = """HloModule m

%inner (ia: bf16[64,32]) -> bf16[64,32] {{
  %ia = bf16[64,32]{{1,0}} parameter(0)
  ROOT %copied = bf16[64,32]{{1,0}} copy(%ia)
}}

%fused (a: bf16[64,32], b: bf16[32,16]) -> bf16[64,16] {{
  %a = bf16[64,32]{{1,0}} parameter(0)
  %b = bf16[32,16]{{1,0}} parameter(1)
  %nested = bf16[64,32]{{1,0}} fusion(%a), kind=kCustom, calls=%inner
  ROOT %d = bf16[64,16]{{1,0}} dot(%nested, %b), lhs_contracting_dims={{1}}, \
rhs_contracting_dims={{0}}, metadata={{op_name="jit(f)/Net/up/dot_general"}}
}}

ENTRY %main (x: bf16[64,32], w: bf16[32,16]) -> bf16[64,16] {{
  %x = bf16[64,32]{{1,0}} parameter(0)
  %w = bf16[32,16]{{1,0}} parameter(1)
  ROOT %out = {kernel}
}}
"""
DIMENSIONS = (
  '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
  '"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}'
)


def fusion(kind):
  config = '{"fusion_backend_config":{"kind":"' + kind + '"}}'
  return f"bf16[64,16]{{1,0}} fusion(%x, %w), kind=kCustom, calls=%fused, backend_config={config}"


def call(target):
  name = 'metadata={op_name="jit(f)/Net/up/dot_general"}'
  shape = "(bf16[64,16]{1,0}, s8[4096]{0})"
  config = f"backend_config={DIMENSIONS}"
  return f'{shape} custom-call(%x, %w), custom_call_target="{target}", {name}, {config}'


KERNELS = {
  "triton": (fusion("__triton_nested_gemm_fusion"), "Triton"),
  "cudnn": (fusion("__cudnn$fusion"), "cuDNN"),
  "loop": ("bf16[64,16]{1,0} fusion(%x, %w), kind=kLoop, calls=%fused", "XLA"),
  "cublas": (call("__cublas$gemm"), "cuBLAS"),
  "cublaslt": (call("__cublas$lt$matmul"), "cuBLASLt"),
  "fp8": (call("__cublas$lt$matmul$f8"), "cuBLASLt FP8"),
  "new": (call("__cublas$lt$matmul$new"), "__cublas$lt$matmul$new"),
}


def sites(text):
  module = hlo.parse(text)
  return module, gemms.find(module, schedule.launches(module))


@pytest.mark.parametrize(("kernel", "maker"), KERNELS.values(), ids=KERNELS)
def test_kernels(kernel, maker):
  _, (site,) = sites(TEMPLATE.format(kernel=kernel))
  assert site.kernel == maker
  assert site.extent == Extent(1, 64, 16, 32)
  assert site.path == "Net/up"


@pytest.mark.parametrize("name", KERNELS)
def test_fp8_needs_matrix_units(name):
  text = TEMPLATE.format(kernel=KERNELS[name][0]).replace("bf16[64,32]", "f8e4m3fn[64,32]")
  module, (site,) = sites(text.replace("bf16[32,16]", "f8e5m2[32,16]"))
  assert gemms.is_fp8(module, site) == (name != "loop")
  module, (site,) = sites(text)  # only one operand
  assert not gemms.is_fp8(module, site)


def test_a_call_that_is_no_product_is_none():
  kernel = 'bf16[64,16]{1,0} custom-call(%x, %w), custom_call_target="__cudnn$convForward"'
  assert sites(TEMPLATE.format(kernel=kernel))[1] == []


def test_a_lost_name_is_taken_from_a_neighbor():
  kernel = call("__cublas$gemm").replace(', metadata={op_name="jit(f)/Net/up/dot_general"}', "")
  text = TEMPLATE.format(kernel=kernel).replace("ROOT %out", "%out").removesuffix("}\n")
  name = 'metadata={op_name="Net/up/add"}'
  tail = f"  ROOT %g = bf16[64,16]{{1,0}} get-tuple-element(%out), index=0, {name}\n}}\n"
  _, (site,) = sites(text + tail)
  assert site.path == "Net/up"


def dot(name, lhs, rhs, shape, contract, where):
  axes = "lhs_contracting_dims={{{}}}, rhs_contracting_dims={{{}}}".format(*contract)
  batch = ", lhs_batch_dims={0}, rhs_batch_dims={0}" if shape.count(",") == 2 else ""
  place = f'metadata={{op_name="jit(f)/{where}/dot_general"}}'
  return f"  %{name} = bf16[{shape}]{{1,0}} dot(%{lhs}, %{rhs}), {axes}{batch}, {place}\n"


def step(m, n, k, body):
  """Returns a program with x [m, k], w [k, n], g [m, n], and the products in ``body``."""
  head = f"x: bf16[{m},{k}], w: bf16[{k},{n}], g: bf16[{m},{n}]"
  lines = "".join(
    f"  %{name} = bf16[{shape}]{{1,0}} parameter({index})\n"
    for index, (name, shape) in enumerate(
      {"x": f"{m},{k}", "w": f"{k},{n}", "g": f"{m},{n}"}.items()
    )
  )
  return f"HloModule m\n\nENTRY %main ({head}) -> () {{\n{lines}{body}  ROOT %t = () tuple()\n}}\n"


FORWARD, BACKWARD = "jvp(Net)/up", "transpose(jvp(Net))/up"


def found_roles(text, original=None):
  module, found = sites(text)
  products = asked.asked_for(hlo.parse(original or text))
  return roles.roles(module, found, products)


def test_roles_by_size():
  body = dot("y", "x", "w", "64,16", (1, 0), FORWARD)
  body += dot("dw", "x", "g", "32,16", (0, 0), BACKWARD)
  body += dot("dx", "g", "w", "64,32", (1, 1), BACKWARD)
  assert found_roles(step(64, 16, 32, body)) == [GemmRole.FPROP, GemmRole.WGRAD, GemmRole.DGRAD]


def test_roles_of_a_square_by_the_operand_that_is_shared():
  body = dot("y", "x", "w", "32,32", (1, 0), FORWARD)
  body += dot("dw", "x", "g", "32,32", (0, 0), BACKWARD)
  body += dot("dx", "g", "w", "32,32", (1, 1), BACKWARD)
  assert found_roles(step(32, 32, 32, body)) == [GemmRole.FPROP, GemmRole.WGRAD, GemmRole.DGRAD]


def test_roles_where_the_compiler_exchanged_operands():
  original = dot("y", "x", "w", "64,16", (1, 0), FORWARD)
  gradient = dot("dw", "x", "g", "32,16", (0, 0), BACKWARD)
  exchanged = dot("y", "w", "x", "16,64", (0, 1), FORWARD)
  found = found_roles(step(64, 16, 32, exchanged + gradient), step(64, 16, 32, original))
  assert found == [GemmRole.FPROP, GemmRole.WGRAD]


def test_roles_where_the_compiler_split_k():
  original = dot("y", "x", "w", "64,16", (1, 0), FORWARD)
  original += dot("dw", "x", "g", "32,16", (0, 0), BACKWARD)
  body = dot("y", "x", "w", "64,16", (1, 0), FORWARD)
  body += "  %xs = bf16[4,16,32]{2,1,0} bitcast(%x)\n  %gs = bf16[4,16,16]{2,1,0} bitcast(%g)\n"
  body += dot("dw", "xs", "gs", "4,32,16", (1, 1), BACKWARD)
  found = found_roles(step(64, 16, 32, body), step(64, 16, 32, original))
  assert found == [GemmRole.FPROP, GemmRole.WGRAD]


def test_an_undetermined_role_is_backward():
  body = dot("y", "x", "w", "32,32", (1, 0), FORWARD)
  body += dot("dd", "g", "g", "32,32", (0, 0), BACKWARD)
  assert found_roles(step(32, 32, 32, body)) == [GemmRole.FPROP, GemmRole.BACKWARD]


def test_recomputed_forward_products():
  body = dot("y", "x", "w", "64,16", (1, 0), FORWARD)
  body += dot("y2", "x", "w", "64,16", (1, 0), "transpose(jvp(Net))/rematted_computation/up")
  assert found_roles(step(64, 16, 32, body)) == [GemmRole.FPROP, GemmRole.REMAT]
