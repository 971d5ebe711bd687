"""Training with ``flax.linen.fp8_ops`` continues in flax_fp8, bit for bit."""

from typing import Any

import flax.core
import flax.linen as nn
import flax.linen.fp8_ops as reference
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_fp8 as fp8

OWG = fp8.OVERWRITE_WITH_GRADIENT
LENGTH = 4
RECIPE = fp8.DelayedScaling(amax_history_len=LENGTH)
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 16)), jnp.float32)


def theirs(cls):
  return lambda **fields: cls(amax_history_length=LENGTH, **fields)


class Model(nn.Module):
  """Two Dense, a DenseGeneral with a name chosen by the user, and an einsum over experts."""

  dot: Any
  einsum: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.relu(nn.Dense(32, dot_general_cls=self.dot)(x))
    x = nn.DenseGeneral((4, 8), dot_general_cls=lambda: self.dot(name="by_hand"))(x)
    x = nn.relu(x.reshape(*x.shape[:-2], 32))
    w = self.param("w", nn.initializers.normal(0.2), (3, 32, 16))
    x = self.einsum()("ebk,ekn->ebn", x, w)
    return nn.Dense(8, dot_general_cls=self.dot)(x)


FLAX = Model(theirs(reference.Fp8DotGeneral), theirs(reference.Fp8Einsum))
OURS = Model(RECIPE.dot_general_cls, RECIPE.einsum_cls)
TX = optax.adam(1e-2)


def stepper(model):
  """Returns a jitted forward and backward pass. As in test_parity, ``update`` is compiled apart."""

  @jax.jit
  def differentiate(variables, x):
    out, vjp = jax.vjp(model.apply, variables, x)
    return out, vjp(jnp.sin(x.size * out))

  return differentiate


@jax.jit
def update(variables, opt_state, grads):
  updates, opt_state = TX.update(grads["params"], opt_state)
  params = optax.apply_updates(variables["params"], updates)
  return {"params": params, OWG: grads[OWG]}, opt_state


def run(step, variables, opt_state, steps):
  for t in steps:
    out, grads = step(variables, X * (1 + 0.5 * np.sin(t, dtype=np.float32)))
    variables, opt_state = update(variables, opt_state, grads[0])
    yield jax.device_get((variables, opt_state, out, grads))


def equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def trained():
  """Six steps of Flax, so that every slot of a history has been overwritten."""
  variables = FLAX.init(jax.random.key(0), X)
  *_, last = run(stepper(FLAX), variables, TX.init(variables["params"]), range(6))
  return last[:2]


def renamed(tree):
  """Renames Flax's modules to the names of flax_fp8."""
  if isinstance(tree, tuple):
    return tuple(map(renamed, tree))
  new = dict(tree)
  state = dict(tree[OWG])
  for layer in ("Dense_0", "Dense_1"):
    state[layer] = {"Fp8DotGeneral_0": state[layer]["Fp8DirectDotGeneralOp_0"]}
  return {**new, OWG: state}


def test_training_continues(trained):
  variables, opt_state = trained
  converted = fp8.from_flax_fp8_ops(variables)
  equal(converted, renamed(variables))
  scales = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(converted[OWG])
            if "_scale" in str(path)]  # fmt: skip
  assert len(scales) == 12
  assert all(leaf != 1 for leaf in scales)  # every scale has been updated
  pairs = zip(
    run(stepper(FLAX), variables, opt_state, range(6, 16)),
    run(stepper(OURS), converted, opt_state, range(6, 16)),
    strict=True,
  )
  for flax_step, our_step in pairs:
    after, moments, out, (grads, *rest) = flax_step
    equal((renamed(after), moments, out, (renamed(grads), *rest)), our_step)


def state_of(cls, **fields):
  """Variables of one layer of Flax, with a different value in each leaf."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(reference.warnings, "warn", lambda *_: None)
    layer = nn.Dense(4, dot_general_cls=lambda: theirs(cls)(**fields))
    variables = layer.init(jax.random.key(0), X)
  leaves = iter(range(1, 99))
  return {**variables, OWG: jax.tree.map(lambda x: x + float(next(leaves)), variables[OWG])}


def test_deprecated_classes_convert():
  for cls in (
    reference.Fp8DirectDotGeneralOp,
    reference.Fp8DotGeneralOp,
    reference.NANOOFp8DotGeneralOp,
  ):
    variables = state_of(cls)
    (leaves,) = variables[OWG].values()
    equal(fp8.from_flax_fp8_ops(variables)[OWG], {"Fp8DotGeneral_0": leaves})


def test_extended_dtypes_and_frozen_dicts():
  variables = state_of(reference.Fp8DotGeneral)
  want = fp8.from_flax_fp8_ops(variables)
  for dtype in (reference.fp32_max_grad, fp8.fp32_max_grad):
    cast = jax.tree.map(lambda x, d=dtype: jax.lax.convert_element_type(x, d), variables[OWG])
    got = fp8.from_flax_fp8_ops(flax.core.freeze({**variables, OWG: cast}))
    assert isinstance(got, flax.core.FrozenDict)
    assert {leaf.dtype for leaf in jax.tree.leaves(got[OWG])} == {jnp.dtype("float32")}
    equal(flax.core.unfreeze(got), want)
    assert got["params"]["kernel"] is variables["params"]["kernel"]


@pytest.mark.parametrize("axis", [0, 1])
def test_stacked_state(axis):
  stack = lambda x: jnp.stack([x, x + 1, x + 2], axis)
  variables = state_of(reference.Fp8DotGeneral)
  stacked = {**variables, OWG: jax.tree.map(stack, variables[OWG])}
  want = jax.tree.map(stack, fp8.from_flax_fp8_ops(variables)[OWG])
  equal(fp8.from_flax_fp8_ops(stacked)[OWG], want)


def test_invalid_amaxes_and_scales_are_replaced():
  variables = state_of(reference.Fp8DotGeneral)
  (leaves,) = variables[OWG].values()
  leaves["input_amax_history"] = jnp.array([1.0, jnp.nan, jnp.inf, -jnp.inf])
  leaves["input_scale"], leaves["kernel_scale"] = jnp.zeros(1), jnp.array([-jnp.inf])
  (got,) = fp8.from_flax_fp8_ops(variables)[OWG].values()
  np.testing.assert_array_equal(got["input_amax_history"], [1, 0, 0, 0])
  assert (got["input_scale"], got["kernel_scale"]) == (1.0, 1.0)
  assert got["output_grad_scale"] == leaves["output_grad_scale"]


class TestRefusals:
  def test_no_state(self):
    plain = nn.Dense(4).init(jax.random.key(0), X)
    with pytest.raises(
      ValueError, match=r"from_flax_fp8_ops: .*got collections \['params'\].*upgrade_variables"
    ):
      fp8.from_flax_fp8_ops(plain)
    with pytest.raises(ValueError, match=r"got collections \['_over.*', 'params'\] without FP8"):
      fp8.from_flax_fp8_ops({**plain, OWG: {}})
    with pytest.raises(ValueError, match=r"from_flax_fp8_ops: .*'params'; got \['bias', 'kernel'"):
      fp8.from_flax_fp8_ops(plain["params"])

  @pytest.mark.parametrize(
    ("change", "message"),
    [
      ({"input_scale": None}, r", missing: \['input_scale'\]\. Pass"),
      ({"input_steps_to_update": jnp.zeros(1)}, r"extra: \['input_steps_to_update'\]\. Pass"),
      ({"kernel_scale": jnp.ones(2)}, r"kernel_scale \(2,\).*for scales \(\.\.\., 1\)"),
      ({"kernel_scale": jnp.ones(())}, r"kernel_scale \(\)"),
      ({"kernel_amax_history": jnp.ones(5)}, r"kernel_amax_history \(5,\)"),
      ({"kernel_amax_history": jnp.ones((2, LENGTH))}, r"kernel_amax_history \(2, 4\)"),
      ({"input_scale": jnp.ones(1, jnp.bfloat16)}, r"/input_scale', dtype=bfloat16 for float32"),
      ({"input_scale": 1.0}, r"/input_scale', dtype=None for float32"),
    ],
    ids=["missing", "extra", "scale", "rank", "length", "stack", "dtype", "scalar"],
  )
  def test_malformed_state(self, change, message):
    variables = state_of(reference.Fp8DotGeneral)
    ((name, leaves),) = variables[OWG].items()
    leaves = {key: leaf for key, leaf in {**leaves, **change}.items() if leaf is not None}
    broken = {**variables, OWG: {"Dense_0": {name: leaves}}}
    with pytest.raises(ValueError, match=f"from_flax_fp8_ops: state.*Dense_0/{name}.*{message}"):
      fp8.from_flax_fp8_ops(broken)

  def test_consistent_shapes_that_are_not_state(self):
    variables = state_of(reference.Fp8DotGeneral)
    ((name, leaves),) = variables[OWG].items()
    for scale, history in [((3,), (4,)), ((1, 3), (4, 2)), ((1,), (0,))]:
      shapes = {key: scale if key.endswith("_scale") else history for key in leaves}
      broken = {key: jnp.ones(shape) for key, shape in shapes.items()}
      with pytest.raises(ValueError, match=r"from_flax_fp8_ops: state.*for scales"):
        fp8.from_flax_fp8_ops({**variables, OWG: {name: broken}})

  def test_two_names_that_become_one(self):
    variables = state_of(reference.Fp8DotGeneral)
    (leaves,) = variables[OWG].values()
    state = {"Fp8DirectDotGeneralOp_0": leaves, "Fp8DotGeneralOp_0": leaves}
    with pytest.raises(ValueError, match=r"different names .* at 'the top'\. Rename"):
      fp8.from_flax_fp8_ops({**variables, OWG: state})
