"""FLOPs of cuDNN's attention, from calls as XLA prints them for a GPU."""

import dataclasses

import pytest

from flax_fp8.explain import attention, gemms, hlo, roofline, schedule, traffic
from flax_fp8.explain.target import GpuTarget

QUERY, KEY = "bf16[2,1024,8,64]{3,2,1,0}", "bf16[2,512,2,64]{3,2,1,0}"
SCORES = 2 * 8 * 1024 * 512  # batch, heads, queries, keys
HEAD_DIM = 64
CONFIG = (
  '{"cudnn_fmha_backend_config":{"dropout_rate":0,"fmha_scale":0.125,'
  '"intermediate_tensor_shape":{"dimensions":["2","8","1024","512"],"element_type":"BF16"},'
  '"mask_type":"%s","sliding_window_length":%d},"operation_queue_id":"0"}'
)


def program(target, mask="NO_MASK", window=0):
  """A program of one attention call."""
  out = "(bf16[2,8,1024,64]{3,1,2,0}, f32[2,8,1024]{2,1,0}, u8[256]{0})"
  return hlo.parse(f"""HloModule attention

ENTRY %main (q: bf16[2,1024,8,64], k: bf16[2,512,2,64], v: bf16[2,512,2,64]) -> {out} {{
  %q = {QUERY} parameter(0)
  %k = {KEY} parameter(1)
  %v = {KEY} parameter(2)
  ROOT %attend = {out} custom-call(%q, %k, %v), custom_call_target="{target}", \
backend_config={CONFIG % (mask, window)}
}}
""")


def flops(*given):
  module = program(*given)
  return attention.flops(module, module.computations[module.entry].root)


@pytest.mark.parametrize(
  ("target", "products"),
  [
    ("__cudnn$fmhaSoftmax", 2),
    ("__cudnn$fmhaScaleBiasSoftmaxDropout", 2),
    ("__cudnn$fmhaSoftmaxF8", 2),
    ("__cudnn$fmhaSoftmaxBackward", 5),
    ("__cudnn$fmhaSoftmaxBackwardF8", 5),
  ],
)
def test_products_of_each_pass(target, products):
  assert flops(target) == products * 2 * SCORES * HEAD_DIM


@pytest.mark.parametrize(
  ("mask", "window", "kept"),
  [
    *(("NO_MASK", 0, 1), ("PADDING", 0, 1)),
    *(("CAUSAL", 0, 1 / 2), ("PADDING_CAUSAL", 0, 1 / 2)),
    *(("CAUSAL", 128, 1 / 4), ("CAUSAL", 512, 1 / 2)),
  ],
)
def test_what_a_mask_leaves_out_does_not_count(mask, window, kept):
  assert flops("__cudnn$fmhaSoftmax", mask, window) == 2 * 2 * SCORES * HEAD_DIM * kept


def test_other_calls_have_none():
  assert flops("__cudnn$convForward") == 0


def test_a_call_that_does_not_say_its_scores_has_none():
  module = program("__cudnn$fmhaSoftmax")
  call = module.computations[module.entry].root
  config = '{"cudnn_fmha_backend_config":{"mask_type":"CAUSAL"}}'
  attributes = {**call.attributes, "backend_config": config}
  assert attention.flops(module, dataclasses.replace(call, attributes=attributes)) == 0


def test_the_estimate_has_the_time_of_attention():
  module = program("__cudnn$fmhaSoftmax")
  launched = schedule.launches(module)
  (kernel,) = traffic.kernels(module, launched, gemms.find(module, launched))
  assert (kernel.kind, kernel.operand) == (traffic.KernelClass.LIBRARY, "bf16")
  assert kernel.flops == 2 * 2 * SCORES * HEAD_DIM
  h100 = GpuTarget.named("h100")
  seconds = kernel.flops / (roofline.SUSTAINED_ATTENTION["bf16"] * h100.peak_flops["bf16"])
  assert roofline.estimate([kernel], [], h100) == pytest.approx(seconds + roofline.LAUNCH_SECONDS)
