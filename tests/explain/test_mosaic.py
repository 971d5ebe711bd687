"""Pallas Mosaic GPU kernels: what their scopes say they compute, and their registers."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import flax_fp8 as fp8
from flax_fp8 import scopes
from flax_fp8.explain import mosaic, sections
from flax_fp8.explain.compile import Memory, Program
from flax_fp8.explain.explain import read_program
from flax_fp8.explain.gemms import Extent
from flax_fp8.explain.mosaic import Registers
from flax_fp8.explain.target import GpuTarget
from flax_fp8.explain.traffic import KernelClass
from tests.explain.programs import spec

M, N, K = 256, 384, 512
E4M3, E5M2, F32, BF16 = "f8e4m3fn", "f8e5m2", "f32", "bf16"


def shape(dtype, *dims):
  layout = ",".join(str(axis) for axis in reversed(range(len(dims))))
  return f"{dtype}[{','.join(map(str, dims))}]{{{layout}}}"


def call(result, operands, op_name, target="mosaic_gpu_v2"):
  """A call as JAX 0.10 prints it, without the kernel in its configuration."""
  return (
    f'{result} custom-call({operands}), custom_call_target="{target}", '
    f'metadata={{op_name="{op_name}"}}, backend_config={{module = "kernel"}}'
  )


def products(forward, backward):
  """The GEMMs of a layer [m, k] @ [k, n], whose operands are already quantized."""
  scales = [shape(F32, 1, K // 128, M), shape(F32, 1, 3, 4)]
  sides = {
    "y": ((BF16, 1, M, N), (E4M3, 1, M, K), (E4M3, 1, N, K), forward),
    "dx": ((BF16, 1, M, K), (E5M2, 1, M, N), (E4M3, 1, K, N), backward),
    "dw": ((BF16, 1, K, N), (E4M3, 1, K, M), (E5M2, 1, N, M), backward),
  }
  lines = []
  for name, (out, lhs, rhs, op_name) in sides.items():
    shapes = [shape(*lhs), shape(*rhs), *scales]
    lines += [f"%{name}{i} = {s} parameter({len(lines) + i})" for i, s in enumerate(shapes)]
    operands = ", ".join(f"%{name}{i}" for i in range(4))
    lines.append(f"%{name} = {call(shape(*out), operands, op_name)}")
  return lines


def program(lines, log=""):
  """A program whose optimized and original text are the same."""
  body = "\n".join(f"  {line}" for line in lines)
  text = f"HloModule m\n\nENTRY %main () -> () {{\n{body}\n  ROOT %end = () tuple()\n}}\n"
  target = GpuTarget.named("h100")
  return Program(text, text, Memory(0, 0, 0, 0), target, "H100", 1, True, True, log)


def report_of(lines, log=""):
  return read_program(program(lines, log), "step")


FORWARD = "jit(f)/jvp(Net)/up/fp8_gemm/body/mpmd_map"
BACKWARD = "jit(f)/transpose(jvp(Net))/up/fp8_gemm/body/mpmd_map"


def test_gemms():
  report = report_of(products(FORWARD, BACKWARD))
  assert [(g.path, g.role.value, g.extent, g.lhs, g.rhs, g.out) for g in report.gemms] == [
    ("Net/up", "fprop", Extent(1, M, N, K), E4M3, E4M3, BF16),
    ("Net/up", "dgrad", Extent(1, M, K, N), E5M2, E4M3, BF16),
    ("Net/up", "wgrad", Extent(1, K, N, M), E4M3, E5M2, BF16),
  ]
  assert {gemm.kernel for gemm in report.gemms} == {"Mosaic GPU"}
  assert report.doubts == ()
  assert sum(gemm.flops for gemm in report.gemms) == 3 * 2 * M * N * K
  assert [total.kind for total in report.classes] == [KernelClass.FP8_GEMM]
  report.assert_fp8()


def test_a_bf16_product_of_this_kind_is_not_fp8():
  lines = [line.replace(E4M3, BF16) for line in products(FORWARD, BACKWARD)[:5]]
  (gemm,) = report_of(lines).gemms
  assert (gemm.is_fp8, gemm.reason) == (False, "FP8 was not asked for")


def test_a_product_within_a_tuple():
  (*parameters, line) = products(FORWARD, BACKWARD)[:5]
  result = shape(BF16, 1, M, N)
  line = line.replace(f"= {result}", f"= ({result}, {shape(F32, 1)})")
  (gemm,) = report_of([*parameters, line]).gemms
  assert (gemm.extent, gemm.out) == (Extent(1, M, N, K), BF16)


@pytest.mark.parametrize(
  "op_name", ["jit(f)/Net/up/my_fp8_gemm/mpmd_map", "jit(f)/Net/mpmd_map"], ids=["near", "none"]
)
def test_without_a_scope_a_kernel_is_unknown(op_name):
  report = report_of(products(op_name, op_name)[:5])
  assert report.gemms == ()
  assert report.doubts == ("mosaic_gpu_v2, times 1: what it computes is unknown",)


def test_a_scope_around_other_operands_is_unknown():
  lines = [line.replace("[1,", "[").replace("2,1,0", "1,0") for line in products(FORWARD, "")[:5]]
  report = report_of(lines)
  assert report.gemms == ()
  assert [kernel.kind for kernel in report.kernels] == [KernelClass.LIBRARY]


def test_the_scope_alone_makes_no_gemm_of_another_call():
  lines = [line.replace("mosaic_gpu_v2", "other") for line in products(FORWARD, BACKWARD)[:5]]
  assert report_of(lines).doubts == ("other, times 1: what it computes is unknown",)


def test_quantizer_writes_both_layouts_at_the_rate_of_memory():
  results = f"({shape(E4M3, M, K)}, {shape(F32, 4, M)}, {shape(E4M3, K, M)}, {shape(F32, 2, K)})"
  lines = [
    f"%x = {shape(BF16, M, K)} parameter(0)",
    f"%q = {call(results, '%x', 'jit(f)/jvp(Net)/up/fp8_quantize/tokens/mpmd_map')}",
  ]
  (kernel,) = report_of(lines).kernels
  assert (kernel.kind, kernel.transposes) == (KernelClass.QUANTIZE, False)
  assert (kernel.read, kernel.written) == (2 * M * K, 2 * M * K + 4 * (4 * M + 2 * K))


def plain(forward, backward):
  """The GEMMs in plain JAX after optimization: each is in a loop over chunks of 128 of K."""
  lines, bodies = [], []
  shapes = {"y": (M, N, K, forward), "dx": (M, K, N, backward), "dw": (K, N, M, backward)}
  for name, (m, n, k, scope) in shapes.items():
    config = (
      '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],'
      '"rhs_contracting_dimensions":["2"],"lhs_batch_dimensions":["0"],'
      '"rhs_batch_dimensions":["0"]}}}'
    )
    metadata = f'metadata={{op_name="{scope}/while/body/closed_call/dot_general"}}'
    bodies.append(
      f"%{name}_body (c: f32[1,{m},{n}]) -> f32[1,{m},{n}] {{\n"
      f"  %a = {shape(E4M3, 1, m, 128)} parameter(0)\n  %b = {shape(E4M3, 1, n, 128)} constant(0)\n"
      f"  ROOT %part = {shape(F32, 1, m, n)} custom-call(%a, %b), "
      f'custom_call_target="__cublas$lt$matmul$f8", {metadata}, backend_config={config}\n}}\n'
    )
    trips = f'backend_config={{"known_trip_count":{{"n":"{k // 128}"}}}}'
    lines.append(f"%{name}0 = {shape(F32, 1, m, n)} parameter({len(lines)})")
    lines.append(
      f"%{name} = {shape(F32, 1, m, n)} while(%{name}0), condition=%never, body=%{name}_body, "
      f'metadata={{op_name="{scope}/while"}}, {trips}'
    )
  made = program(lines)
  text = made.hlo.replace("ENTRY", "\n".join([*bodies, "ENTRY"]))
  return read_program(dataclasses.replace(made, hlo=text, asked=text), "step")


def test_products_in_plain_jax():
  scope = f"fp8_gemm/{scopes.plain_jax('JAX 0.8.1 is older than 0.10')}"
  report = plain(f"jit(f)/jvp(Net)/up/{scope}", f"jit(f)/transpose(jvp(Net))/up/{scope}")
  assert [(g.path, g.role.value, g.extent, g.times, g.is_fp8) for g in report.gemms] == [
    ("Net/up", "fprop", Extent(1, M, N, 128), 4, True),
    ("Net/up", "dgrad", Extent(1, M, K, 128), 3, True),
    ("Net/up", "wgrad", Extent(1, K, N, 128), 2, True),
  ]
  note = "block scales in plain JAX: JAX 0.8.1 is older than 0.10"
  assert {gemm.notes for gemm in report.gemms} == {(note,)}
  text = " ".join(str(report).split())
  assert text.count("block scales in plain JAX") == 1
  assert f"Note: {note} (9 GEMMs)" in text
  assert report.to_dict()["gemm_rows"][0]["notes"] == (note,)


def test_roles_where_the_quantizer_padded():
  tokens = 200  # wgrad contracts 256, the next multiple of 128
  lines = products(FORWARD, BACKWARD)
  padded = [line.replace(f"1,{M},", f"1,{tokens},") for line in lines[:10]] + lines[10:]
  roles = {gemm.extent.k: gemm.role.value for gemm in report_of(padded).gemms}
  assert roles == {K: "fprop", N: "dgrad", M: "wgrad"}


# What ptxas prints with MOSAIC_GPU_DUMP_PTXAS=1, in JAX 0.10.
LOG = """W1127 20:50:02.014606   32000 gpu_compiler.cc:609] a warning before it
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'fp8_gemm_fprop_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for fp8_gemm_fprop_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
ptxas info    : Compile time = 53.147 ms

ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'fp8_gemm_wgrad_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for fp8_gemm_wgrad_mosaic_gpu_kernel
    304 bytes stack frame, 296 bytes spill stores, 300 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 304 bytes cumulative stack size, 1 bytes smem
"""
FOUND = (Registers("fp8_gemm_fprop", 168, 0), Registers("fp8_gemm_wgrad", 168, 300))


def test_registers():
  assert mosaic.read_registers(LOG) == FOUND
  assert mosaic.read_registers(LOG + LOG) == FOUND
  for nothing in ("", "ptxas info    : Used 12 registers\n", LOG.replace("_mosaic_gpu_kernel", "")):
    assert mosaic.read_registers(nothing) == ()


def test_report_of_registers():
  report = report_of(products(FORWARD, BACKWARD), LOG)
  assert report.registers == FOUND
  assert report.to_dict()["registers"][1]["spilled"] == 300
  assert list(sections.register_lines(report.registers)) == [
    "Registers of a thread: fp8_gemm_fprop 168, fp8_gemm_wgrad 168",
    "Warning: fp8_gemm_wgrad spills 300 bytes of registers in each thread",
  ]
  assert "Registers" not in str(report_of(products(FORWARD, BACKWARD)))


@pytest.mark.parametrize(
  "words",
  [
    "UNAVAILABLE: No PTX compilation provider is available. Neither ptxas/nvlink nor nvjtlink",
    "load_ir_module.cc:29] ./libdevice.10.bc:-1:-1: Could not open input file: No such file",
  ],
  ids=["ptxas", "libdevice"],
)
def test_missing_tools(words):
  error = mosaic.missing_tools(words, "nvidia-cuda-nvcc")
  assert "needs ptxas and libdevice" in str(error)
  assert str(error).endswith("Run: pip install nvidia-cuda-nvcc")
  assert mosaic.missing_tools("another error", "nvidia-cuda-nvcc") is None


# Programs that XLA compiles. Only JAX 0.10 and newer pass all operands to the kernel.
NEW = pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="Mosaic kernels need JAX 0.10")


def kernel_call(scope, name, operands, out):
  """Calls a kernel that does almost nothing, in a name scope."""

  def body(*refs):
    refs[-1][0, 0, 0] = jnp.asarray(1, out.dtype)

  body.__name__ = name
  options = {"out_type" if "out_type" in parameters() else "out_shape": out}
  with jax.named_scope(scope):
    return plgpu.kernel(body, **options)(*operands)


def parameters():
  return inspect.signature(plgpu.kernel).parameters


def stacked_gemm(x, kernels):
  """A scan over layers, each of which multiplies."""
  ones = jnp.ones((1, 1, 128), jnp.float32)

  def layer(x, kernel):
    with jax.named_scope("up"):
      out = jax.ShapeDtypeStruct((1, 128, 128), jnp.float32)
      y = kernel_call(scopes.GEMM, "fp8_gemm_test", (x, kernel, ones, ones), out)
    return y.astype(x.dtype), None

  return jax.lax.scan(layer, x, kernels)[0]


def explain_stack():
  fp8_type = jnp.float8_e4m3fn
  args = (spec(1, 128, 128, dtype=fp8_type), spec(3, 1, 128, 128, dtype=fp8_type))
  return fp8.explain(stacked_gemm, *args, target="h100")


@NEW
@pytest.mark.child
@pytest.mark.parametrize("dumps", ["PTXAS PTX SASS", "TO"])
def test_a_compiled_scan_whatever_the_user_dumps(monkeypatch, tmp_path, dumps):
  for dump in dumps.split():
    monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{dump}", str(tmp_path) if dump == "TO" else "1")
  report = explain_stack()
  (gemm,) = report.gemms
  assert (gemm.path, gemm.times, gemm.kernel, gemm.is_fp8) == ("up", 3, "Mosaic GPU", True)
  assert gemm.extent == Extent(1, 128, 128, 128)
  assert report.doubts == ()
  named = [kernel.kernel for kernel in report.registers]
  assert named == ([] if dumps == "TO" else ["fp8_gemm_test"])  # a folder takes ptxas's output too
