"""Kernels and bytes of whole programs against sums by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import flax_fp8 as fp8
from flax_fp8.explain import gemms, hlo, schedule, traffic
from flax_fp8.explain.traffic import KernelClass
from tests.explain.programs import spec

MATRIX = 512 * 256  # elements


def totals(report):
  return {
    total.kind: (total.kernels, total.bytes)
    for total in report.classes
    if total.bytes > 64  # counters and indices
  }


def test_one_fused_kernel():
  """Reads two inputs and writes one result, without temporaries."""
  x = spec(512, 256, dtype=jnp.float32)
  report = fp8.explain(lambda x, y: jnp.tanh(x) * y + 1, x, x, target="h100")
  assert totals(report) == {KernelClass.ELEMENTWISE: (1, 3 * 4 * MATRIX)}
  assert report.launches == 1
  assert report.bytes_outside_gemms == 3 * 4 * MATRIX


@pytest.mark.parametrize("layers", [5, 7])
def test_a_scan_counts_once_a_layer(layers):
  """Each iteration multiplies by its kernel and applies tanh.

  Older XLA first copies the kernel from the stack. In newer XLA, cuBLAS reads the stack.
  """
  fn = lambda x, w: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
  report = fp8.explain(fn, spec(512, 256), spec(layers, 256, 256), target="h100")
  x, kernel, index = 2 * MATRIX, 2 * 256 * 256, 16 * layers  # bytes; at most the size of indices
  found = {kind: moved for kind, (_, moved) in totals(report).items()}
  assert found[KernelClass.GEMM] - layers * (x + kernel + x) in range(index)
  assert found[KernelClass.ELEMENTWISE] - layers * (x + x) in range(index)
  slices = {k.name: k.times for k in report.kernels if k.written == kernel}
  assert set(slices.values()) <= {layers}
  copied = 2 * x + len(slices) * layers * 2 * kernel  # x is copied once, before the loop
  assert found[KernelClass.COPY] - copied in range(index)
  assert report.gemms[0].times == layers
  assert report.gemms[0].flops == layers * 2 * 512 * 256 * 256


def test_a_quantization_in_both_layouts():
  """XLA reads x once per layout, and writes each layout with one byte per element."""
  q = lambda x: jnp.clip(x.astype(jnp.float32) * 2, -448, 448).astype(jnp.float8_e4m3fn)
  report = fp8.explain(lambda x: (q(x), q(x.T)), spec(512, 256), target="h100")
  kinds = {kernel.kind for kernel in report.kernels}
  assert kinds <= {KernelClass.QUANTIZE, KernelClass.TRANSPOSE}
  written = sum(kernel.times * kernel.written for kernel in report.kernels)
  assert written == 2 * MATRIX
  quantized = [kernel for kernel in report.kernels if kernel.kind is KernelClass.QUANTIZE]
  assert all(kernel.read == 2 * MATRIX for kernel in quantized)


def test_a_layer_forward_and_backward():
  """A BF16 Dense layer: the operands and results of three GEMMs, and the loss."""
  m, n, k = 512, 256, 128
  loss = lambda w, x: jnp.mean((x @ w).astype(jnp.float32) ** 2)
  report = fp8.explain(jax.grad(loss), spec(k, n), spec(m, k), target="h100")
  operands = m * k + k * n + m * n  # fprop; wgrad: x, the output gradient, the kernel gradient
  assert totals(report)[KernelClass.GEMM] == (2, 2 * 2 * operands)


def test_a_fusion_reads_only_its_slice():
  report = fp8.explain(lambda x, i: x[i] * 2, spec(8, 2048), spec(dtype=jnp.int32), target="h100")
  (kernel,) = report.kernels
  assert (kernel.read, kernel.written) == (2 * 2048 + 4, 2 * 2048)


@pytest.mark.parametrize(
  ("other", "read"),
  [("slice(%square), slice={[1:2], [0:1024]}", 2 * 2048), ("negate(%s)", 2 * 1024),
   ("reverse(%square), dimensions={1}", 2 * 2048)],
  ids=["two slices", "one slice", "slice and whole"],
)  # fmt: skip
def test_arithmetic_before_a_slice_reads_only_the_slice(other, read):
  """A fusion computes only the used elements of elementwise operations."""
  text = f"""HloModule m

%body (p: bf16[2,1024]) -> f32[1,1024] {{
  %p = bf16[2,1024]{{1,0}} parameter(0)
  %wide = f32[2,1024]{{1,0}} convert(%p)
  %square = f32[2,1024]{{1,0}} multiply(%wide, %wide)
  %s = f32[1,1024]{{1,0}} slice(%square), slice={{[0:1], [0:1024]}}
  %r = f32[1,1024]{{1,0}} {other}
  ROOT %out = f32[1,1024]{{1,0}} add(%s, %r)
}}

ENTRY %main (p: bf16[2,1024]) -> f32[1,1024] {{
  %p = bf16[2,1024]{{1,0}} parameter(0)
  ROOT %f = f32[1,1024]{{1,0}} fusion(%p), kind=kLoop, calls=%body
}}
"""
  module = hlo.parse(text)
  launched = schedule.launches(module)
  (kernel,) = traffic.kernels(module, launched, gemms.find(module, launched))
  assert kernel.read == read


def test_a_product_written_into_a_stack_writes_its_slice():
  """In newer XLA, cuBLAS writes to the stack. Older XLA copies the result there."""
  fn = lambda x, w: lax.scan(lambda x, w: (x, x @ w), x, w)[1]
  report = fp8.explain(fn, spec(512, 256), spec(5, 256, 256), target="h100")
  written = {k.name: k.written for k in report.kernels if k.kind is KernelClass.GEMM}
  (gemm,) = report.gemms
  # one batched launch, or one launch per iteration
  assert gemm.times * sum(written.values()) == 5 * 2 * MATRIX


def test_an_update_in_place_writes_only_the_update():
  fn = jax.jit(lambda x, u: lax.dynamic_update_slice(x, u, (2, 0)), donate_argnums=0)
  report = fp8.explain(fn, spec(8, 2048), spec(1, 2048), target="h100")
  (kernel,) = report.kernels
  assert (kernel.read - 2 * 2048 <= 8, kernel.written) == (True, 2 * 2048)
  assert report.memory.alias == 2 * 8 * 2048


CLASSES = {
  "fusion_to_fp8": ("f8e4m3fn[8,8]{1,0}", "convert(%p)", KernelClass.QUANTIZE),
  "cast": ("f32[8,8]{1,0}", "convert(%p)", KernelClass.ELEMENTWISE),
  "transpose": ("bf16[8,8]{1,0}", "transpose(%p), dimensions={1,0}", KernelClass.TRANSPOSE),
  "pad": ("bf16[16,8]{1,0}", "pad(%p, %c), padding=0_8x0_0", KernelClass.PAD),
  "slice": ("bf16[4,8]{1,0}", "slice(%p), slice={[0:4], [0:8]}", KernelClass.COPY),
  "reduce": ("bf16[8]{0}", "reduce(%p, %c), dimensions={0}, to_apply=%add", KernelClass.REDUCE),
  "sine": ("bf16[8,8]{1,0}", "sine(%p)", KernelClass.ELEMENTWISE),
  "copy": ("bf16[8,8]{1,0}", "copy(%p)", KernelClass.COPY),
  "relayout": ("bf16[8,8]{0,1}", "copy(%p)", KernelClass.TRANSPOSE),
  "library": ("bf16[8,8]{1,0}", 'custom-call(%p), custom_call_target="lib"', KernelClass.LIBRARY),
  "unknown": ("bf16[8,8]{1,0}", "from-the-future(%p)", KernelClass.UNKNOWN),
  "all_gather": ("bf16[64,8]{1,0}", "all-gather(%p), dimensions={0}", KernelClass.COLLECTIVE),
}


@pytest.mark.parametrize(("shape", "operation", "kind"), CLASSES.values(), ids=CLASSES)
def test_classes(shape, operation, kind):
  text = f"""HloModule m

%add (a: bf16[], b: bf16[]) -> bf16[] {{
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %s = bf16[] add(%a, %b)
}}

ENTRY %main (p: bf16[8,8]) -> {shape} {{
  %p = bf16[8,8]{{1,0}} parameter(0)
  %c = bf16[] constant(0)
  ROOT %r = {shape} {operation}
}}
"""
  module = hlo.parse(text)
  launched = schedule.launches(module)
  (kernel,) = traffic.kernels(module, launched, gemms.find(module, launched))
  assert kernel.kind is kind
  assert kernel.what == {"library": "lib", "unknown": "from-the-future"}.get(
    kind.value.split()[0], ""
  )


# JAX 0.12 puts the slice that a custom call reads, and the update of its result, into a fusion.
FUSED_CALL = """HloModule m

%called (stack: bf16[4,8,8], i: s32[]) -> (f8e4m3fn[8,8], f32[8], f8e4m3fn[8,8]) {{
  %stack = bf16[4,8,8]{{2,1,0}} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,8,8]{{2,1,0}} dynamic-slice(%stack, %i, %zero, %zero), \
dynamic_slice_sizes={{1,8,8}}
  %x = bf16[8,8]{{1,0}} bitcast(%slice)
  ROOT %call = (f8e4m3fn[8,8]{{1,0}}, f32[8]{{0}}, f8e4m3fn[8,8]{{1,0}}) custom-call(%x), \
custom_call_target="{target}"
}}

ENTRY %main (stack: bf16[4,8,8], i: s32[]) -> (f8e4m3fn[8,8], f32[8], f8e4m3fn[8,8]) {{
  %stack = bf16[4,8,8]{{2,1,0}} parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = (f8e4m3fn[8,8]{{1,0}}, f32[8]{{0}}, f8e4m3fn[8,8]{{1,0}}) fusion(%stack, %i), \
kind=kCustom, calls=%called
}}
"""


def test_a_call_in_a_fusion_is_a_call_and_writes_all_its_results():
  module = hlo.parse(FUSED_CALL.format(target="lib"))
  (kernel,) = traffic.kernels(module, schedule.launches(module), [])
  assert (kernel.kind, kernel.what) == (KernelClass.LIBRARY, "lib")
  assert (kernel.read, kernel.written) == (2 * 64 + 4, 64 + 4 * 8 + 64)
