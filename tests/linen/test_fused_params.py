"""Conversion of parameters between separate and fused layers, and its errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8
from tests.linen.fused_cases import (
  HEAD_DIM,
  HEADS,
  HIDDEN,
  KEY,
  KV_HEADS,
  QKV,
  SWIGLU,
  WIDTHS,
  D,
  X,
  init,
  separate_qkv,
  separate_swiglu,
  with_heads,
)


def test_a_key_value_head_is_stored_with_its_queries():
  """Query heads of one group are consecutive, as in ``jax.nn.dot_product_attention``."""
  number = {"query": range(HEADS), "key": (10, 11), "value": (20, 21)}
  of_head = lambda n: jnp.full((D, 1, HEAD_DIM), float(n))
  separate = {
    name: {"kernel": jnp.concatenate(list(map(of_head, heads)), axis=1)}
    for name, heads in number.items()
  }
  kernel = QKV(use_bias=False).from_separate(separate)["kernel"]
  assert kernel.shape == (D, KV_HEADS, 4, HEAD_DIM)
  np.testing.assert_array_equal(kernel[0, :, :, 0], [[0, 1, 10, 20], [2, 3, 11, 21]])


@pytest.mark.parametrize("lead", [(), (3,)], ids=["one", "stacked"])
@pytest.mark.parametrize("bias", [False, True], ids=["kernel", "kernel and bias"])
@pytest.mark.parametrize("layer", [nn.Dense, nn.DenseGeneral])
def test_qkv_parameters_go_both_ways(layer, bias, lead):
  flat = separate_qkv(bias=bias, lead=lead)
  separate = flat if layer is nn.Dense else with_heads(flat)
  module = QKV(use_bias=bias)
  fused = module.from_separate(separate)
  back = module.to_separate(fused, layer)
  assert jax.tree.structure(back) == jax.tree.structure(separate)
  jax.tree.map(np.testing.assert_array_equal, back, separate)
  jax.tree.map(np.testing.assert_array_equal, fused, module.from_separate(with_heads(flat)))


@pytest.mark.parametrize("lead", [(), (3,)], ids=["one", "stacked"])
def test_swiglu_parameters_go_both_ways(lead):
  separate = separate_swiglu(lead)
  fused = SWIGLU().from_separate(separate)
  assert fused["gate_up"]["kernel"].shape == (*lead, D, 2, HIDDEN)
  jax.tree.map(np.testing.assert_array_equal, SWIGLU().to_separate(fused), separate)


def test_parameters_of_flax_attention():
  attention = nn.MultiHeadDotProductAttention(num_heads=HEADS)
  params = jax.jit(attention.init)(KEY, X)["params"]
  module = fp8.Fp8FusedQKV(num_heads=HEADS, head_dim=D // HEADS)
  of_input = {name: params[name] for name in WIDTHS}
  fused = module.from_separate(of_input)
  assert jax.tree.map(jnp.shape, fused) == jax.tree.map(
    jnp.shape, jax.eval_shape(module.init, KEY, X)["params"]
  )
  jax.tree.map(np.testing.assert_array_equal, module.to_separate(fused), of_input)


def with_short_bias():
  separate = separate_qkv(bias=True)
  separate["key"]["bias"] = jnp.ones(5)
  return separate


def of_key(kernel):
  """Parameters with another kernel for the key."""
  return {**separate_qkv(), "key": {"kernel": kernel}}


def of_down(**leaves):
  return {**separate_swiglu(), "down": leaves}


PLAIN = QKV(use_bias=False)
ERRORS = {
  "heads": (
    lambda: init(QKV(num_kv_heads=3)),
    r"Fp8FusedQKV: num_heads must be a positive multiple of num_kv_heads; got num_heads=4, "
    r"num_kv_heads=3\. Change",
  ),
  "scales": (
    lambda: init(QKV(kernel_scales="each")),
    r"Fp8FusedQKV: kernel_scales must be one of \('joint', 'separate'\); got .*'each'\. Pass",
  ),
  "scales of the MLP": (
    lambda: init(SWIGLU(kernel_scales=None)),
    r"Fp8SwiGLU: kernel_scales must be one of \('joint', 'separate'\); got kernel_scales=None",
  ),
  "missing part": (
    lambda: QKV().from_separate({"query": {}}),
    r"Fp8FusedQKV\.from_separate: the keys must be query, key, value, and nothing else; got "
    r"\['query'\]\. Pass",
  ),
  "missing bias": (
    lambda: QKV().from_separate(separate_qkv()),
    r"from_separate: query: the keys must be kernel, bias, and nothing else; got \['kernel'\]",
  ),
  "no dict": (
    lambda: QKV().from_separate(X),
    r"Fp8FusedQKV\.from_separate: the keys must be .*; got ArrayImpl",
  ),
  "width": (
    lambda: QKV(head_dim=8, use_bias=False).from_separate(separate_qkv()),
    r"Fp8FusedQKV\.from_separate: the kernel of query must have the shape \[\.\.\., D, 32\] or "
    r"\[\.\.\., D, 4, 8\]; got shape \(48, 64\)\. Change",
  ),
  "bias": (
    lambda: QKV().from_separate(with_short_bias()),
    r"the bias of key must have the shape \[\.\.\., 32\] or \[\.\.\., 2, 16\]; got shape \(5,\)",
  ),
  "inputs": (
    lambda: PLAIN.from_separate(of_key(jnp.ones((D + 1, 32)))),
    r"the parts must have one dtype and the same axes before the features; got kernels query "
    r"\(48,\) float32, key \(49,\) float32, value \(48,\) float32\. Pass",
  ),
  "dtype": (
    lambda: PLAIN.from_separate(of_key(jnp.ones((D, 32), jnp.bfloat16))),
    r"must have one dtype .* key \(48,\) bfloat16",
  ),
  "layer": (
    lambda: QKV().to_separate({}, nn.Conv),
    r"Fp8FusedQKV\.to_separate: layer must be nn\.Dense or nn\.DenseGeneral; got layer=.*Conv.*Cho",
  ),
  "fused without bias": (
    lambda: QKV().to_separate({"kernel": X}),
    r"Fp8FusedQKV\.to_separate: the keys must be kernel, bias, and nothing else; got \['kernel'\]",
  ),
  "fused shape": (
    lambda: PLAIN.to_separate({"kernel": X}),
    r"Fp8FusedQKV\.to_separate: the kernel must have the shape \[\.\.\., D, 2, 4, 16\]; got kernel "
    r"of shape \(64, 48\)\. Pass",
  ),
  "fused rank": (
    lambda: PLAIN.to_separate({"kernel": jnp.ones((2, 4, 16))}),
    r"got kernel of shape \(2, 4, 16\)",
  ),
  "missing up": (
    lambda: SWIGLU().from_separate({"gate": {"kernel": X}}),
    r"Fp8SwiGLU\.from_separate: the keys must be gate, up, down, and nothing else; got \['gate'\]",
  ),
  "shape of down": (
    lambda: SWIGLU().from_separate(of_down(kernel=X)),
    r"Fp8SwiGLU\.from_separate: the kernel of down must have the shape \(80, 48\), .*; got shape "
    r"\(64, 48\)\. Pass three kernels",
  ),
  "leaves of down": (
    lambda: SWIGLU().from_separate(of_down(bias=X)),
    r"Fp8SwiGLU\.from_separate: down: the keys must be kernel, and nothing else; got \['bias'\]",
  ),
  "fused without down": (
    lambda: SWIGLU().to_separate({"gate_up": {}}),
    r"Fp8SwiGLU\.to_separate: the keys must be gate_up, down, and nothing else; got \['gate_up'\]",
  ),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()
