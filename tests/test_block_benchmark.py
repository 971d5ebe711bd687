"""The benchmark of a Transformer block and a model of them, in small."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import block
import flax_fp8 as fp8
from flax_fp8.explain.traffic import KernelClass
from harness import compiling, programs
from harness.models import ATTENTION, Block, Stack
from harness.names import BF16
from harness.sizes import LLAMA, TINY_LLAMA, block_flops
from lm.config import ModelShape

REPEAT = 2
COMPILED = [BF16, "BF16, fused", "delayed", "rowwise, fused"]
COMPILED += ["block", "block, fused"] if jax.__version_info__ >= (0, 10, 2) else []  # has kernels
SMALL = ModelShape(d_model=256, d_ff=512, layers=3, heads=4, kv_heads=2)
X = jnp.linspace(-1, 1, 16 * 32, dtype=jnp.bfloat16).reshape(1, 16, 32)


def make(kind, name, shape=TINY_LLAMA, length=16):
  return block.program(kind, shape, length, name, REPEAT)


def test_sizes_are_those_of_llama_3_8b():
  """Of 218 million parameters in a block's projections."""
  module = Stack(Block, (LLAMA, block.ALL[BF16], "xla"))
  x = jax.ShapeDtypeStruct((1, 8192, 4096), jnp.bfloat16)
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
  kernels = [leaf for leaf in jax.tree.leaves(shapes) if leaf.ndim == 2]
  assert sum(leaf.size for leaf in kernels) == 218_103_808
  assert block_flops(LLAMA, 8192) == 6 * 8192 * 218_103_808
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("bfloat16")}


@pytest.mark.slow
def test_fused_variants_have_as_many_parameters():
  count = lambda name: sum(leaf.size for leaf in jax.tree.leaves(make("block", name).shapes[1]))
  assert {count(name) for name in block.ALL} == {count(BF16)}


@pytest.mark.slow
def test_attention_is_causal():
  module = Stack(Block, (TINY_LLAMA, block.ALL[BF16], "xla"))
  variables = module.init(jax.random.key(0), X)
  out, other = (module.apply(variables, x) for x in (X, X.at[0, -1].add(1)))
  assert np.array_equal(out[0, :-1], other[0, :-1])
  assert not np.array_equal(out[0, -1], other[0, -1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", block.KINDS)
def test_a_loop_computes_gradients_and_moves_state(kind):
  program = make(kind, "delayed")
  arguments = programs.Arrays().fill(program.shapes)
  _, state, (loss, x_grad, params_grad) = program.fn(*arguments)
  found = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves((loss, x_grad, params_grad))]
  assert all(np.isfinite(leaf).all() and leaf.any() for leaf in found)
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state, arguments[0])
  assert all(jax.tree.leaves(moved))
  assert (loss.shape, loss.dtype, x_grad.shape) == ((), jnp.float32, (1, 16, 32))


@pytest.mark.slow
def test_gradients_are_those_of_half_the_sum_of_squares():
  module = Stack(Block, (TINY_LLAMA, block.ALL[BF16], "xla"))
  program = block.program("block", TINY_LLAMA, 16, BF16, 1)
  state, params, x, one = programs.Arrays().fill(program.shapes)
  assert one == 1
  variables = {"params": params}
  loss = lambda variables, x: (
    jnp.sum(jnp.square(module.apply(variables, x).astype(jnp.float32))) / 2
  )
  wanted, (grads, x_grad) = fp8.value_and_grad(loss, argnums=(0, 1))(variables, x)
  _, _, found = program.fn(state, params, x, one)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-2)
  as_float32 = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree)
  jax.tree.map(close, as_float32(found), as_float32((wanted, x_grad, dict(grads)["params"])))


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", block.KINDS)
@pytest.mark.parametrize("name", COMPILED)
def test_projections_of_every_turn_are_of_the_dtype_that_the_row_says(kind, name):
  """All seven, forward and backward, in every layer and turn; only attention's may differ."""
  program = make(kind, name, SMALL, 256)
  report = fp8.explain(program.fn, *program.shapes, target="h100")
  assert compiling.problems(report, program) == []
  attention = [gemm for gemm in report.gemms if ATTENTION in gemm.path.split("/")]
  others = [gemm for gemm in report.gemms if gemm not in attention]
  layers = SMALL.layers if kind == "model" else 1
  assert sum(gemm.flops for gemm in others) == REPEAT * layers * block_flops(SMALL, 256)
  assert all(gemm.is_fp8 for gemm in others) == (name not in (BF16, "BF16, fused"))
  assert attention
  moving = (KernelClass.QUANTIZE, KernelClass.TRANSPOSE, KernelClass.REDUCE)
  once = [kernel for kernel in report.kernels if kernel.times < REPEAT and kernel.kind in moving]
  assert not [kernel for kernel in once if kernel.read > 2**16]


@pytest.mark.slow
def test_tiny(monkeypatch, capsys, tmp_path):
  command = "block.py --tiny --rounds 2 --repeat 1 --variants delayed --threads 2 --out"
  monkeypatch.setattr(sys, "argv", [*command.split(), str(tmp_path)])
  block.main()
  found = json.loads((tmp_path / "block.json").read_text())
  assert found["measurement"] is False
  assert list(found["found"]) == ["block", "model"]
  for variants in found["found"].values():
    assert list(variants) == [BF16, "delayed"]
    assert variants[BF16]["peak_to_bf16"] == 1
    assert variants["delayed"]["tokens_per_second"] > 0
    assert variants["delayed"]["peak_mib"] >= variants["delayed"]["temp_mib"] > 0
  assert "block, delayed: speed: " in capsys.readouterr().out
  assert (tmp_path / "block.png").exists()
