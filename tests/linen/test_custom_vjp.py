"""Models with custom derivatives, ``nn.custom_vjp``."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_fp8 as fp8

OWG = fp8.OVERWRITE_WITH_GRADIENT
KEY, X = jax.random.key(0), jax.random.normal(jax.random.key(1), (16, 32))
BOTH = ("params", OWG)


def doubled(grads):
  """Doubles the gradients of parameters and keeps those of state."""
  is_own = lambda path: any(getattr(entry, "key", None) == OWG for entry in path)
  scale = lambda path, grad: grad if is_own(path) else 2 * grad
  return jax.tree_util.tree_map_with_path(scale, grads)


class Model(nn.Module):
  backward: object
  variables_of: object = "params"
  dot_general_cls: object = None

  @nn.compact
  def __call__(self, x):
    layer = nn.Dense(16, dot_general_cls=self.dot_general_cls)
    call = lambda layer, x: layer(x)
    if self.backward is None:
      return call(layer, x)
    forward = lambda layer, x: nn.vjp(call, layer, x, vjp_variables=self.variables_of)

    def backward(vjp, grad):
      of_variables, *of_inputs = vjp(grad)
      return (self.backward(of_variables), *of_inputs)

    own = nn.custom_vjp(call, forward, backward, grad_vars=self.variables_of)
    return own(layer, x)


def of(backward, how):
  if how == "converted":
    return fp8.fp8_linear_layers(Model(backward))
  return Model(backward, BOTH if how == "both" else "params", fp8.Fp8DotGeneral)


def gradient(grad, model):
  return grad(lambda v: jnp.sum(model.apply(v, X) ** 2))(model.init(KEY, X))


@pytest.mark.parametrize("grad", [jax.grad, fp8.grad], ids=["jax", "fp8"])
@pytest.mark.parametrize("how", ["both", "converted"])
def test_custom_vjp_does_not_change_the_state(how, grad):
  got, want = (gradient(grad, of(backward, how)) for backward in (doubled, None))
  jax.tree.map(np.testing.assert_array_equal, got[OWG], want[OWG])
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), got["params"], want["params"])
  assert all(leaf.any() for leaf in jax.tree.leaves(want))


def test_state_must_be_an_argument():
  words = r"must take FP8 state as an argument; got(.|\n)*grad_vars=\[\"params\", '_overwrite_with"
  with pytest.raises(TypeError, match=words):
    gradient(fp8.grad, of(lambda grads: grads, "closed over"))


@pytest.mark.parametrize("change", [jnp.sign, lambda x: 2 * x], ids=["sign", "double"])
def test_arithmetic_on_the_cotangents_of_state(change):
  words = "take no arithmetic; got(.|\\n)*In the backward_fn of nn.custom_vjp"
  with pytest.raises(TypeError, match=words):
    gradient(fp8.grad, of(lambda grads: jax.tree.map(change, grads), "converted"))
