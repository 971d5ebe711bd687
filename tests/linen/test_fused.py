"""Fused projections: against float64, against separate layers, and their parameters both ways."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flax_fp8 as fp8
from flax_fp8 import formats

KEY = jax.random.key(0)
TOKENS, D, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 64, 48, 4, 2, 16, 80
WIDTHS = {"query": HEADS, "key": KV_HEADS, "value": KV_HEADS}
X = jnp.asarray(np.random.default_rng(99).normal(size=(TOKENS, D)), jnp.float32)
CURRENT = fp8.Float8CurrentScaling()
QKV = functools.partial(
  fp8.Fp8FusedQKV, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, emulate=True
)
SWIGLU = functools.partial(fp8.Fp8SwiGLU, hidden_features=HIDDEN, emulate=True)
SCALES = ("joint", "separate")


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def separate_qkv(bias=False, lead=(), scale=None):
  """Parameters of three ``nn.Dense``; those named in ``scale`` are multiplied by it."""
  made = {}
  for seed, (name, heads) in enumerate(WIDTHS.items()):
    factor = (scale or {}).get(name, 1.0) / np.sqrt(D)
    made[name] = {"kernel": normal(seed, *lead, D, heads * HEAD_DIM) * factor}
    if bias:
      made[name]["bias"] = normal(seed + 10, *lead, heads * HEAD_DIM)
  return made


def separate_swiglu(lead=()):
  shapes = {"gate": (D, HIDDEN), "up": (D, HIDDEN), "down": (HIDDEN, D)}
  return {
    name: {"kernel": normal(seed, *lead, *shape) / 8}
    for seed, (name, shape) in enumerate(shapes.items())
  }


def with_heads(separate):
  """The same parameters as ``nn.DenseGeneral`` has them."""
  return jax.tree.map(lambda x: x.reshape(*x.shape[:-1], -1, HEAD_DIM), separate)


def float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def error(got, want):
  got = np.asarray(got, np.float64).reshape(want.shape)
  return np.linalg.norm(got - want) / np.linalg.norm(want)


def run(module, params, x, *grads):
  """The module's output and the gradients of its parameters and input."""
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
  """Relative errors of outputs, kernels' gradients and the input's gradient, against float64."""
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


@pytest.mark.parametrize("kernel_scales", SCALES)
@pytest.mark.parametrize("recipe", [fp8.get_recipe(name) for name in fp8.RECIPES], ids=fp8.RECIPES)
def test_qkv_is_near_float64(recipe, kernel_scales):
  if isinstance(recipe, fp8.DelayedScaling):
    recipe = fp8.DelayedScaling(first_step="current", amax_history_len=4)
  module = QKV(use_bias=False, recipe=recipe, kernel_scales=kernel_scales)
  forward = formats.E4M3.epsilon / 2
  backward = recipe.fp8_format.backward.epsilon / 2
  for name, found in errors_of_qkv(module).items():
    bound = backward if "gradient" in name or name == "input" else forward
    assert 0 < found < bound, name


# A kernel so much smaller than the others, and the error of its part: first measured, then bounded.
@pytest.mark.parametrize("smaller", [2.0**-10, 2.0**-16])
def test_separate_scales_keep_a_small_part(smaller):
  """The key's gradient is as much larger: attention counts nothing but query times key."""
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
  """Joint, the large gradient of the small key drowns that of the query."""
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
  """From -30 to 30, which FP8 has to round: in float32 the sums of its values are exact."""
  made = np.random.default_rng(seed).integers(-30, 31, shape).astype(np.float32)
  made.flat[0] = 30
  return jnp.asarray(made)


@pytest.mark.parametrize(("name", "dtype"), [("delayed", "bfloat16"), ("current", "float32")])
def test_equal_amaxes_make_the_separate_layers_to_the_bit(name, dtype):
  """Outputs and kernels' gradients; the input's is rounded once, not three times."""
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
    # Five roundings in a row at most, of which each is at random within the format's.
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


def test_a_key_value_head_stands_with_its_queries():
  """Query heads are consecutive, as ``jax.nn.dot_product_attention`` groups them."""
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


def test_initial_parameters_are_those_of_separate_layers():
  """Each part is drawn alone, so that initialisers which look at both sides see their own."""
  seen = []

  def spy(key, shape, dtype):
    seen.append((shape, jnp.dtype(dtype).name))
    return nn.initializers.lecun_normal()(key, shape, dtype)

  module = QKV(kernel_init=spy, bias_init=spy_bias(seen), param_dtype=jnp.bfloat16)
  params = jax.jit(module.init)(KEY, X)["params"]
  assert [shape for shape, _ in seen[:3]] == [(D, heads * HEAD_DIM) for heads in WIDTHS.values()]
  assert [shape for shape, _ in seen[3:]] == [(heads * HEAD_DIM,) for heads in WIDTHS.values()]
  assert {dtype for _, dtype in seen} == {"bfloat16"}
  parts = module.to_separate(params)
  for leaves in parts.values():
    deviation = float(np.std(float64(leaves["kernel"])))
    assert abs(deviation * np.sqrt(D) - 1) < 0.1  # 768 draws or more: 4 standard errors
  assert not np.array_equal(parts["key"]["kernel"], parts["value"]["kernel"])


def spy_bias(seen):
  def init(key, shape, dtype):
    del key
    seen.append((shape, jnp.dtype(dtype).name))
    return jnp.zeros(shape, dtype)

  return init


def boxed(names):
  return nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)


def test_axis_names_stay_with_the_parameters():
  names = ("embed", "kv_heads", None, None)
  shapes = jax.eval_shape(QKV(kernel_init=boxed(names), use_bias=False).init, KEY, X)
  assert nn.get_partition_spec(shapes)["params"]["kernel"] == PartitionSpec(*names)
  module = SWIGLU(
    kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, None, "model")),
    down_kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), ("model", None)),
  )
  spec = nn.get_partition_spec(jax.eval_shape(module.init, KEY, X))["params"]
  assert spec["gate_up"]["kernel"] == PartitionSpec(None, None, "model")
  assert spec["down"]["kernel"] == PartitionSpec("model", None)
  with jax.set_mesh(Mesh(np.array(jax.devices()[:2]), ("model",))):
    again = nn.get_partition_spec(jax.eval_shape(module.init, KEY, X))["params"]
  assert again == spec


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
  """Split over heads or hidden features: the one thing gathered or summed is as small as D."""
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


@pytest.mark.parametrize("amax", [0.0, np.nan, np.inf, 2.0**-120])
def test_factors_of_odd_parts(amax):
  """What no power of two can help stays as it is, and does not disturb the others."""
  parts = QKV()._parts()
  kernel = parts.join({name: jnp.ones((D, heads, HEAD_DIM)) for name, heads in WIDTHS.items()})
  kernel = kernel.at[:, :, 3].set(amax).at[:, :, 2].set(0.3)
  factors = {name: float(value) for name, value in parts.factors(kernel).items()}
  usable = np.isfinite(amax)
  assert factors["query"] == 1
  assert factors["key"] == (2 if usable else 1)
  assert factors["value"] == (2.0**120 if amax == 2.0**-120 else 1)


@pytest.mark.parametrize("ratio", [1.0, 1.99, 2.0, 3.9, 4.0, 1000.0])
def test_factors_never_enlarge_the_largest(ratio):
  parts = SWIGLU()._parts()
  gate = jnp.full((D, 1, HIDDEN), 3.0)
  factors = parts.factors(parts.join({"gate": gate, "up": gate / ratio}))
  assert float(factors["gate"]) == 1
  assert float(factors["up"]) == 2 ** np.floor(np.log2(ratio))


def with_short_bias():
  separate = separate_qkv(bias=True)
  separate["key"]["bias"] = jnp.ones(5)
  return separate


def of_key(kernel):
  """Parameters in which the key's kernel is another."""
  return {**separate_qkv(), "key": {"kernel": kernel}}


def of_down(**leaves):
  return {**separate_swiglu(), "down": leaves}


def init(module):
  return jax.eval_shape(module.init, KEY, X)


PLAIN = QKV(use_bias=False)
ERRORS = {
  "heads": (
    lambda: init(QKV(num_kv_heads=3)),
    r"Fp8FusedQKV: num_heads must be a positive multiple of num_kv_heads; got num_heads=4, "
    r"num_kv_heads=3\. Change",
  ),
  "scales": (
    lambda: init(QKV(kernel_scales="each")),
    r"Fp8FusedQKV: kernel_scales must be 'joint' or 'separate'; got kernel_scales='each'\. Choose",
  ),
  "scales of the MLP": (
    lambda: init(SWIGLU(kernel_scales=None)),
    r"Fp8SwiGLU: kernel_scales must be 'joint' or 'separate'; got kernel_scales=None",
  ),
  "missing part": (
    lambda: QKV().from_separate({"query": {}}),
    r"Fp8FusedQKV\.from_separate: must hold query, key, value, and nothing else; got "
    r"\['query'\]\. Pass",
  ),
  "missing bias": (
    lambda: QKV().from_separate(separate_qkv()),
    r"from_separate: query: must hold kernel, bias, and nothing else; got \['kernel'\]",
  ),
  "no dict": (
    lambda: QKV().from_separate(X),
    r"Fp8FusedQKV\.from_separate: must hold .*; got ArrayImpl",
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
    r"the parts must be of one dtype and have equal axes before their features; got kernels query "
    r"\(48,\) float32, key \(49,\) float32, value \(48,\) float32\. Take",
  ),
  "dtype": (
    lambda: PLAIN.from_separate(of_key(jnp.ones((D, 32), jnp.bfloat16))),
    r"must be of one dtype .* key \(48,\) bfloat16",
  ),
  "layer": (
    lambda: QKV().to_separate({}, nn.Conv),
    r"Fp8FusedQKV\.to_separate: layer must be nn\.Dense or nn\.DenseGeneral; got layer=.*Conv.*Cho",
  ),
  "fused without bias": (
    lambda: QKV().to_separate({"kernel": X}),
    r"Fp8FusedQKV\.to_separate: must hold kernel, bias, and nothing else; got \['kernel'\]",
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
    r"Fp8SwiGLU\.from_separate: must hold gate, up, down, and nothing else; got \['gate'\]",
  ),
  "shape of down": (
    lambda: SWIGLU().from_separate(of_down(kernel=X)),
    r"Fp8SwiGLU\.from_separate: the kernel of down must have the shape \(80, 48\), .*; got shape "
    r"\(64, 48\)\. Take",
  ),
  "leaves of down": (
    lambda: SWIGLU().from_separate(of_down(bias=X)),
    r"Fp8SwiGLU\.from_separate: down: must hold kernel, and nothing else; got \['bias'\]",
  ),
  "fused without down": (
    lambda: SWIGLU().to_separate({"gate_up": {}}),
    r"Fp8SwiGLU\.to_separate: must hold gate_up, down, and nothing else; got \['gate_up'\]",
  ),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_no_device_without_fp8(monkeypatch):
  monkeypatch.setattr("flax_fp8.ops.check.capability", lambda **_: (False, "A100: no FP8"))
  for module in (QKV(emulate=False), SWIGLU(emulate=False)):
    with pytest.raises(ValueError, match=r"Fp8DotGeneral: the default device .*A100: no FP8"):
      init(module)
    init(module.clone(emulate=True))
