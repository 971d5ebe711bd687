"""Checkpoints restore exactly, on any mesh, or raise an error; the old one is never lost."""

import shutil

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import flax_fp8 as fp8

OWG = fp8.OVERWRITE_WITH_GRADIENT
X = jnp.ones((2, 16))
CLS = fp8.DelayedScaling(amax_history_len=8).dot_general_cls
STATE_PATHS = f"*{OWG}/*"


def make_state(cls):
  """Returns a state after one step, so that no leaf has its initial value."""
  model = nn.Dense(64, dot_general_cls=cls)
  variables = jax.jit(model.init)(jax.random.key(0), X)
  variables = {**variables, "batch_stats": {"none": {}, "mean": jnp.ones(3)}}
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
  state = fp8.TrainState.create(apply_fn=model.apply, params=variables, tx=tx)
  state = state.replace(step=jnp.zeros((), jnp.int32))

  @jax.jit
  def step(state):
    grads = fp8.grad(lambda v: jnp.sum(jnp.sin(state.apply_fn(v, X))))(state.params)
    return state.apply_gradients(grads=grads)

  return step(state)


FP8 = make_state(CLS)
BF16 = FP8.replace(params=fp8.downgrade_variables(FP8.params))


def zeros(tree):
  return jax.tree.map(jnp.zeros_like, tree)


def equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """An FP8 checkpoint for read-only use."""
  fp8.save_checkpoint(directory := tmp_path_factory.mktemp("fp8") / "new", FP8)
  return directory


@pytest.fixture(scope="module")
def saved_bf16(tmp_path_factory):
  fp8.save_checkpoint(directory := tmp_path_factory.mktemp("bf16"), BF16)
  return directory


class TestRoundTrip:
  def test_a_train_state(self, saved):
    got = fp8.restore_checkpoint(str(saved), zeros(FP8))
    equal(got.tree, FP8)
    assert (got.missing, got.extra) == ((), ())
    assert float(got.tree.params[OWG]["Fp8DotGeneral_0"]["input_amax_history"][0]) == 1.0
    equal(got.tree.apply_fn(got.tree.params, X), FP8.apply_fn(FP8.params, X))

  def test_a_relative_path_and_shapes_alone(self, saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    got, *_ = fp8.restore_checkpoint("new", jax.eval_shape(lambda: FP8))
    equal(got, FP8)
    assert got.step.sharding == SingleDeviceSharding(jax.devices()[0])

  @pytest.mark.parametrize("wrap", [dict, flax.core.freeze], ids=["dict", "FrozenDict"])
  def test_variables_and_boxes(self, wrap, tmp_path):
    boxed = nn.with_partitioning(nn.initializers.ones, ("in", None))
    layer = nn.Dense(4, dot_general_cls=CLS, kernel_init=boxed, param_dtype=jnp.bfloat16)
    variables = wrap({**layer.init(jax.random.key(0), X), "count": 3})
    fp8.save_checkpoint(tmp_path, variables)
    got, *_ = fp8.restore_checkpoint(tmp_path, jax.tree.map(lambda x: 0 * x, variables))
    assert type(got) is type(variables)
    assert type(got["count"]) is int
    equal(got, variables)

  def test_checkpoints_of_orbax(self, tmp_path):
    with ocp.CheckpointManager(tmp_path) as manager:
      for step, state in ((10, BF16), (20, FP8)):
        manager.save(step, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
    equal(fp8.restore_checkpoint(tmp_path, zeros(FP8)).tree, FP8)


def place(tree, devices):
  """Returns shardings over the last axis of each leaf if it divides by four."""
  mesh = Mesh(np.array(jax.devices()[:devices]), ("x",))
  spec = lambda leaf: PartitionSpec(*(None,) * (leaf.ndim - 1), "x")
  divides = lambda leaf: leaf.ndim and leaf.shape[-1] % 4 == 0
  return jax.tree.map(
    lambda x: NamedSharding(mesh, spec(x) if divides(x) else PartitionSpec()), tree
  )


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
  """A checkpoint from four devices for read-only use."""
  state = jax.device_put(FP8, place(FP8, 4))
  (state_leaves,) = state.params[OWG].values()
  moments = state.opt_state[1][0].mu["kernel"]
  for leaf in (state.params["params"]["kernel"], moments, state_leaves["input_amax_history"]):
    assert len({shard.index[-1].start for shard in leaf.addressable_shards}) == 4
  fp8.save_checkpoint(directory := tmp_path_factory.mktemp("sharded"), state)
  return directory


class TestMeshes:
  """Saves from four devices, and restores to four, two and one."""

  @pytest.mark.parametrize("devices", [4, 2, 1])
  @pytest.mark.parametrize("concrete", [True, False], ids=["arrays", "shapes"])
  def test_restored(self, sharded, devices, concrete):
    shardings = place(FP8, devices)
    if concrete:
      target = jax.device_put(zeros(FP8), shardings)
    else:
      shape = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
      target = jax.tree.map(shape, FP8, shardings)
    got, *_ = fp8.restore_checkpoint(sharded, target)
    equal(got, FP8)
    equal(jax.tree.map(lambda x: x.sharding, got), shardings)

  def test_a_sharding_that_does_not_divide(self, sharded):
    mesh = Mesh(np.array(jax.devices()[:3]), ("x",))
    place = lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*"x" * bool(x.ndim)))
    )
    with pytest.raises(ValueError, match=r"restore_checkpoint: .*divide.*'params.*history' of"):
      fp8.restore_checkpoint(sharded, jax.tree.map(place, FP8))


class TestParts:
  def test_the_parameters_alone(self, saved):
    target = {"params": {"params": zeros(FP8.params["params"])}}
    got = fp8.restore_checkpoint(saved, target, allow_extra=["*"])
    equal(got.tree["params"]["params"], FP8.params["params"])
    assert {path.split("/")[0] for path in got.extra} == {"opt_state", "params", "step"}
    with pytest.raises(ValueError, match=r"got extra: \['opt_.*more\. If target has no FP8"):
      fp8.restore_checkpoint(saved, target)

  def test_fp8_into_bf16(self, saved):
    with pytest.raises(
      ValueError,
      match=r"restore_checkpoint: the checkpoint must have the leaves of target; got extra: "
      rf"\['params/{OWG}/Fp8DotGeneral_0/input_amax_history', .*\] \.\.\. and 1 more\. If "
      r"target has no FP8 state, .*allow_extra=.*downgrade_variables",
    ):
      fp8.restore_checkpoint(saved, zeros(BF16))
    got = fp8.restore_checkpoint(saved, zeros(BF16), allow_extra=[STATE_PATHS])
    equal(got.tree, BF16)
    assert len(got.extra) == 6

  def test_bf16_into_fp8(self, saved_bf16):
    with pytest.raises(ValueError, match=r"got missing: .*no FP8 state.*upgrade_variables"):
      fp8.restore_checkpoint(saved_bf16, zeros(FP8))
    got = fp8.restore_checkpoint(saved_bf16, FP8, allow_missing=[STATE_PATHS])
    equal(got.tree, FP8)
    assert len(got.missing) == 6
    with pytest.raises(ValueError, match=r"must be arrays; got ShapeDtypeStructs for \['params"):
      fp8.restore_checkpoint(saved_bf16, jax.eval_shape(lambda: FP8), allow_missing=[STATE_PATHS])

  def test_nothing_in_common(self, saved):
    target = {"best": 1.5, "ema": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"got missing: \['best', 'ema'\], extra: \['opt_state"):
      fp8.restore_checkpoint(saved, target)
    got = fp8.restore_checkpoint(saved, target, allow_missing=["best", "e*"], allow_extra=["*"])
    assert got.tree["best"] == 1.5
    assert got.tree["ema"] is target["ema"]
    assert got.missing == ("best", "ema")

  def test_other_shapes_and_dtypes(self, saved):
    longer = make_state(fp8.DelayedScaling(amax_history_len=9).dot_general_cls)
    with pytest.raises(
      ValueError, match=r"others: \['.*input_amax_history float32\(8,\) for float32\(9,\)'.*upgrade"
    ):
      fp8.restore_checkpoint(saved, longer)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), FP8.params["params"])
    target = FP8.replace(params={**FP8.params, "params": half})
    with pytest.raises(ValueError, match=r"kernel float32\(.*\) for bfloat16\(16, 64\)'\]\. Pass"):
      fp8.restore_checkpoint(saved, target)

  def test_patterns_must_not_be_a_string(self, saved):
    with pytest.raises(TypeError, match=r"restore_checkpoint: .*string 'params/\*'. Pass \['"):
      fp8.restore_checkpoint(saved, FP8, allow_extra="params/*")


class TestRefusals:
  @pytest.mark.parametrize("dtype", [fp8.fp32_max_grad, nn.fp8_ops.fp32_max_grad])
  def test_extended_dtypes(self, saved, tmp_path, dtype):
    cast = lambda x: jax.lax.convert_element_type(x, dtype)
    state = {OWG: jax.tree.map(cast, FP8.params[OWG])}
    with pytest.raises(TypeError, match=r"save_checkpoint: leaves .*max_grad.*_amax_history"):
      fp8.save_checkpoint(tmp_path, state)
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match=r"restore_checkpoint: leaves .*Pass the variables from"):
      fp8.restore_checkpoint(saved, state)

  def test_a_path_that_is_no_checkpoint(self, tmp_path):
    (tmp_path / "notes").write_text("none")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "notes"):
      with pytest.raises(ValueError, match=f"finished checkpoint; got {path}, which has none"):
        fp8.restore_checkpoint(path, FP8)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    with pytest.raises(ValueError, match=r"save_checkpoint: .*the file .*notes\. Choose"):
      fp8.save_checkpoint(tmp_path / "notes", FP8)

  def test_an_empty_checkpoint(self, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "0" / "default")
    with pytest.raises(
      ValueError, match=r"restore_checkpoint: the checkpoint must be complete and undamaged; got"
    ):
      fp8.restore_checkpoint(tmp_path / "copy", FP8)


class TestOverwriting:
  def test_only_when_asked(self, tmp_path):
    fp8.save_checkpoint(tmp_path, BF16)
    with pytest.raises(ValueError, match=f"no checkpoint yet; got {tmp_path} with one.*overwrite"):
      fp8.save_checkpoint(tmp_path, FP8)
    equal(fp8.restore_checkpoint(tmp_path, zeros(BF16)).tree, BF16)
    fp8.save_checkpoint(tmp_path, FP8, overwrite=True)
    equal(fp8.restore_checkpoint(tmp_path, zeros(FP8)).tree, FP8)
    assert len(list(tmp_path.iterdir())) == 1
