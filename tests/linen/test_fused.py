"""Fused projections against float64, against separate layers bit for bit, and under sharding."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flax_fp8 as fp8
from flax_fp8 import formats
from tests.linen.fused_cases import (
  CURRENT,
  HEAD_DIM,
  KEY,
  QKV,
  SCALES,
  SWIGLU,
  TOKENS,
  WIDTHS,
  D,
  X,
  float64,
  init,
  normal,
  separate_qkv,
  separate_swiglu,
)


def error(got, want):
  got = np.asarray(got, np.float64).reshape(want.shape)
  return np.linalg.norm(got - want) / np.linalg.norm(want)


def run(module, params, x, *grads):
  """Returns the module's output and the gradients of its parameters and input."""
  variables = fp8.upgrade_variables(module, {"params": params}, x)

  @jax.jit
  def forward_and_backward(params, x, grads):
    out, pull_back = jax.vjp(lambda p, x: module.apply({**variables, "params": p}, x), params, x)
    return out, pull_back(grads)

  out, (params_grad, x_grad) = forward_and_backward(
    params, x, grads if len(grads) > 1 else grads[0]
  )
  return out, params_grad, x_grad


def heads_grads(scale=None):
  return [
    normal(20 + seed, TOKENS, heads, HEAD_DIM) * (scale or {}).get(name, 1.0)
    for seed, (name, heads) in enumerate(WIDTHS.items())
  ]


def errors_of_qkv(module, scale=None, grad_scale=None):
  """Returns relative errors of outputs and gradients of kernels and input, against float64."""
  separate, grads = separate_qkv(scale=scale), heads_grads(grad_scale)
  out, params_grad, x_grad = run(module, module.from_separate(separate), X, *grads)
  kernels_grad = module.to_separate(params_grad, nn.Dense)
  x, kernels = float64(X), float64({name: leaf["kernel"] for name, leaf in separate.items()})
  flat = dict(
    zip(WIDTHS, (np.asarray(g, np.float64).reshape(TOKENS, -1) for g in grads), strict=True)
  )
  found = {"input": error(x_grad, sum(flat[name] @ kernels[name].T for name in WIDTHS))}
  for name, value in zip(WIDTHS, out, strict=True):
    found[name] = error(value, x @ kernels[name])
    found[f"{name} gradient"] = error(kernels_grad[name]["kernel"], x.T @ flat[name])
  return found


@pytest.mark.parametrize(
  ("name", "kernel_scales"), [*((name, "separate") for name in fp8.RECIPES), ("current", "joint")]
)
def test_qkv_is_near_float64(name, kernel_scales):
  fields = {"first_step": "current", "amax_history_len": 4} if name == "delayed" else {}
  recipe = fp8.get_recipe(name, **fields)
  module = QKV(use_bias=False, recipe=recipe, kernel_scales=kernel_scales)
  forward = formats.E4M3.epsilon / 2
  backward = recipe.fp8_format.backward.epsilon / 2
  for what, found in errors_of_qkv(module).items():
    bound = backward if "gradient" in what or what == "input" else forward
    assert 0 < found < bound, what


@pytest.mark.parametrize("smaller", [2.0**-10, 2.0**-16])
def test_separate_scales_keep_a_small_part(smaller):
  """A smaller key has a larger gradient, because attention uses only query times key."""
  scale, grad_scale = {"key": smaller}, {"key": 1 / smaller}
  found = {
    scales: errors_of_qkv(
      QKV(use_bias=False, recipe=CURRENT, kernel_scales=scales), scale, grad_scale
    )
    for scales in SCALES
  }
  bound = formats.E4M3.epsilon / 2
  assert all(value < 2 * bound for value in found["separate"].values())
  assert found["separate"]["key"] < bound
  if smaller == 2.0**-10:
    assert found["joint"]["key"] < bound
  else:
    assert found["joint"]["key"] > 0.2
    assert found["joint"]["input"] > 0.1


def test_separate_gradients_in_e4m3():
  """With a joint scale, the large gradient of the small key makes that of the query underflow."""
  recipe = fp8.Float8CurrentScaling(fp8_format=fp8.Format.E4M3)
  found = [
    errors_of_qkv(
      QKV(use_bias=False, recipe=recipe, kernel_scales=scales), {"key": 2.0**-16}, {"key": 2.0**16}
    )["query gradient"]
    for scales in SCALES
  ]
  assert found[0] > 0.2
  assert found[1] < formats.E4M3.epsilon / 2


def integers(seed, *shape):
  """Integers from -30 to 30. FP8 rounds them, and float32 sums of the rounded values are exact."""
  made = np.random.default_rng(seed).integers(-30, 31, shape).astype(np.float32)
  made.flat[0] = 30
  return jnp.asarray(made)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("delayed", "bfloat16"), ("current", "float32")])
def test_equal_amaxes_give_the_bits_of_separate_layers(name, dtype):
  """Outputs and kernel gradients are equal. The input's gradient is rounded once, not thrice."""
  recipe = fp8.DelayedScaling(first_step="current") if name == "delayed" else CURRENT
  x = integers(9, TOKENS, D)
  separate = jax.tree.map(lambda kernel: integers(1, *kernel.shape), separate_qkv())
  grads = [integers(2, *grad.shape).astype(dtype) for grad in heads_grads()]
  results = []
  for scales in SCALES:
    module = QKV(use_bias=False, recipe=recipe, dtype=dtype, kernel_scales=scales)
    out, params_grad, x_grad = run(module, module.from_separate(separate), x, *grads)
    results.append((out, module.to_separate(params_grad, nn.Dense), x_grad))
  jax.tree.map(np.testing.assert_array_equal, *results)
  for part, value, grad in zip(WIDTHS, results[0][0], grads, strict=True):
    layer = nn.Dense(
      WIDTHS[part] * HEAD_DIM, use_bias=False, dtype=dtype, dot_general_cls=recipe.dot_general_cls
    )
    out, params_grad, _ = run(layer, separate[part], x, grad.reshape(TOKENS, -1))
    assert value.dtype == out.dtype == dtype
    np.testing.assert_array_equal(value.reshape(TOKENS, -1), out)
    np.testing.assert_array_equal(results[0][1][part]["kernel"], params_grad["kernel"])


def test_swiglu_is_near_float64():
  separate = separate_swiglu()
  grad = normal(30, TOKENS, D)
  x, kernels = float64(X), float64({name: leaf["kernel"] for name, leaf in separate.items()})
  gate, up = x @ kernels["gate"], x @ kernels["up"]
  sigmoid = 1 / (1 + np.exp(-gate))
  hidden_grad = float64(grad) @ kernels["down"].T
  gate_grad = hidden_grad * up * sigmoid * (1 + gate * (1 - sigmoid))
  up_grad = hidden_grad * gate * sigmoid
  want = {
    "down": (gate * sigmoid * up).T @ float64(grad),
    "gate": x.T @ gate_grad,
    "up": x.T @ up_grad,
  }
  for scales in SCALES:
    module = SWIGLU(recipe=CURRENT, kernel_scales=scales)
    out, params_grad, x_grad = run(module, module.from_separate(separate), X, grad)
    # At most five successive roundings, each with a random error within the format's bound.
    bound = formats.E5M2.epsilon / 2
    assert error(out, gate * sigmoid * up @ kernels["down"]) < bound
    assert error(x_grad, gate_grad @ kernels["gate"].T + up_grad @ kernels["up"].T) < bound
    for name, leaf in module.to_separate(params_grad).items():
      assert error(leaf["kernel"], want[name]) < bound, name


def test_bias_dtype_and_leading_axes():
  module = QKV(dtype=jnp.bfloat16, recipe=CURRENT)
  separate = separate_qkv(bias=True)
  out = jax.jit(module.apply)({"params": module.from_separate(separate)}, X.reshape(2, 4, -1, D))
  without = QKV(dtype=jnp.bfloat16, recipe=CURRENT, use_bias=False)
  kernels = {name: {"kernel": leaves["kernel"]} for name, leaves in separate.items()}
  plain = jax.jit(without.apply)({"params": without.from_separate(kernels)}, X)
  for name, value, product in zip(WIDTHS, out, plain, strict=True):
    assert value.dtype == jnp.bfloat16
    assert value.shape == (2, 4, 8, WIDTHS[name], HEAD_DIM)
    bias = separate[name]["bias"].astype(jnp.bfloat16).reshape(1, WIDTHS[name], HEAD_DIM)
    want = product + jnp.broadcast_to(bias, product.shape)
    np.testing.assert_array_equal(value.reshape(want.shape), want)


def test_one_state_for_the_three():
  variables = jax.eval_shape(QKV().init, KEY, X)
  assert list(variables[fp8.OVERWRITE_WITH_GRADIENT]) == ["Fp8DotGeneral_0"]
  variables = jax.eval_shape(SWIGLU().init, KEY, X)
  assert sorted(variables[fp8.OVERWRITE_WITH_GRADIENT]) == ["down", "gate_up"]


def test_scan_stacks_as_separate_layers_do():
  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      return x + SWIGLU(recipe=CURRENT, name="mlp")(x), None

  axes = {"params": 0, fp8.OVERWRITE_WITH_GRADIENT: 0}
  stack = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=2)()
  separate = separate_swiglu((2,))
  params = {"mlp": SWIGLU().from_separate(separate)}
  out, _ = jax.jit(stack.apply)({"params": params}, X, None)
  apply, want = jax.jit(SWIGLU(recipe=CURRENT).apply), X
  for index in range(2):
    params = SWIGLU().from_separate(jax.tree.map(lambda x, i=index: x[i], separate))
    want = want + apply({"params": params}, want)
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("module", "leaf", "names"),
  [
    (QKV(use_bias=False, recipe=CURRENT), "['kernel']", (None, "model", None, None)),
    (
      SWIGLU(recipe=CURRENT, kernel_scales="separate"),
      "['gate_up']['kernel']",
      (None, None, "model"),
    ),
  ],
  ids=["qkv", "swiglu"],
)
def test_tensor_parallel_moves_no_kernel(module, leaf, names):
  """With shards of heads or hidden features, only arrays of the size of the input are reduced."""
  mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
  params = jax.jit(module.init)(KEY, X)["params"]
  shard = lambda path, x: NamedSharding(
    mesh,
    PartitionSpec(*names)
    if jax.tree_util.keystr(path) == leaf
    else PartitionSpec("model")
    if "down" in jax.tree_util.keystr(path)
    else PartitionSpec(),
  )
  sharded = jax.tree.map(jax.device_put, params, jax.tree_util.tree_map_with_path(shard, params))
  x = jax.device_put(X, NamedSharding(mesh, PartitionSpec()))
  apply = jax.jit(lambda p, x: module.apply({"params": p}, x))
  compiled = apply.lower(sharded, x).compile()
  assert "all-gather" not in compiled.as_text()
  assert "all-to-all" not in compiled.as_text()
  got, want = compiled(sharded, x), apply(params, X)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-2), got, want)


def test_no_device_without_fp8(monkeypatch):
  monkeypatch.setattr("flax_fp8.ops.check.capability", lambda **_: (False, "A100: no FP8"))
  for module in (QKV(emulate=False), SWIGLU(emulate=False)):
    with pytest.raises(ValueError, match=r"Fp8DotGeneral: the default device .*A100: no FP8"):
      init(module)
    init(module.clone(emulate=True))
