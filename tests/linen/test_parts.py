"""The parts of a fused kernel: initialization and scale factors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from tests.linen.fused_cases import HEAD_DIM, HIDDEN, KEY, QKV, SWIGLU, WIDTHS, D, X, float64


def test_initial_parameters_are_those_of_separate_layers():
  """Each part is initialized separately, so initializers that use both sizes see the right ones."""
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


@pytest.mark.parametrize("amax", [0.0, np.nan, np.inf, 2.0**-120])
def test_factors_of_odd_parts(amax):
  """Parts that no power of two can scale keep factor 1 and do not change the others."""
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
