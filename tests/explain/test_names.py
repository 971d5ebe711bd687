"""Module paths and passes from JAX name stacks."""

import pytest

from flax_fp8.explain import names
from flax_fp8.explain.names import Phase

NAMES = {
  "jit(call)/call_exported/jit(loss)/jvp(MLP)/up/dot_general": ("MLP/up", Phase.FORWARD),
  "jit(loss)/transpose(jvp(MLP))/down/Dot_0/transpose": ("MLP/down/Dot_0", Phase.BACKWARD),
  "jit(f)/jvp(Net)/while/body/closed_call/layers/layers.attend/key/dot_general": (
    "Net/layers/key",
    Phase.FORWARD,
  ),
  "jit(f)/transpose(jvp(Net))/while/body/closed_call/checkpoint/rematted_computation/up/dot": (
    "Net/up",
    Phase.RECOMPUTED,
  ),
  "jit(f)/Net/vmap(layer)/vmap(ab,bc->ac)/dot_general": ("Net/layer", Phase.FORWARD),
  "jit(f)/cond/branch_1_fun/Net/dot_general": ("Net", Phase.FORWARD),
  "jit(f)/jvp()/dot_general": ("", Phase.FORWARD),
  "jit(f)/transpose(jvp(Net))/up/fp8_gemm/body/mpmd_map": ("Net/up", Phase.BACKWARD),
  "jit(f)/transpose(jvp(fp8_gemm))/body/mpmd_map": ("", Phase.BACKWARD),
  "jit(f)/Net/fp8_gemm/plain_jax(JAX 0.8.1)/while/body/dot_general": ("Net", Phase.FORWARD),
  "": ("", Phase.FORWARD),
}


@pytest.mark.parametrize(("op_name", "expected"), NAMES.items(), ids=range(len(NAMES)))
def test_path_and_phase(op_name, expected):
  assert (names.model_path(op_name), names.phase(op_name)) == expected


SCOPES = {
  "jit(f)/Net/fp8_gemm/body/mpmd_map": "fp8_gemm",
  "jit(f)/Net/vmap(fp8_quantize)/tokens/mpmd_map": "fp8_quantize",
  "jit(f)/fp8_quantize/fp8_gemm/call": "fp8_gemm",
  "jit(f)/Net/my_fp8_gemm/call": "",
  "": "",
}


@pytest.mark.parametrize(("op_name", "scope"), SCOPES.items(), ids=range(len(SCOPES)))
def test_scope_of_a_kernel(op_name, scope):
  assert names.kernel_scope(op_name) == scope


def test_slashes_in_parentheses_do_not_split():
  assert names.split("jit(a/b)/c") == ["jit(a/b)", "c"]


def test_a_body_that_two_loops_share():
  name = "jit(f)/jvp(Net)/up/while/body/closed_call/dot_general"
  loop = "jit(f)/transpose(jvp(Net))/down/while"
  moved = "jit(f)/transpose(jvp(Net))/down/while/body/closed_call/dot_general"
  assert names.within_loop(name, loop) == moved
  assert names.within_loop(moved, loop) == moved
  for stays in ((name, ""), ("jit(f)/up/dot_general", loop)):
    assert names.within_loop(*stays) == stays[0]
  unrolled = f"{loop}/body/inner/while/body/dot_general"  # one iteration, so XLA removed the loop
  assert names.within_loop(unrolled, loop) == unrolled
